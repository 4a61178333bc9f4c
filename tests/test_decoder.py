"""The decoder against transformers + peft themselves, on tiny models with random weights that transformers saved."""

import json
import random
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch.nn.functional import cross_entropy
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LogitsProcessorList,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from lorikit.config import LoraSettings, ModelConfig
from lorikit.data.pack import pack
from lorikit.data.values import IGNORE, Example
from lorikit.errors import ConfigError, ModelError
from lorikit.hub import Resolved
from lorikit.model import decoder_generate, decoder_loss, lora
from lorikit.model.decoder_config import decoder_shape, inverse_frequencies, supported
from lorikit.model.engine import Sampling
from lorikit.model.kernels.dropout import dropout_mask
from lorikit.model.load import load_engine
from lorikit.model.sampling import next_tokens, probabilities

LLAMA3 = {"rope_type": "llama3", "rope_theta": 100.0, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3 |= {"original_max_position_embeddings": 16}
LINEAR = {"rope_type": "linear", "rope_theta": 500.0, "factor": 3.0}
FAMILIES = {
    "llama": (LlamaConfig, {}),
    "llama with biases": (LlamaConfig, {"attention_bias": True, "mlp_bias": True}),
    "llama 3.1": (LlamaConfig, {"rope_parameters": LLAMA3, "tie_word_embeddings": True}),
    "llama stretched": (LlamaConfig, {"rope_parameters": LINEAR, "rms_norm_eps": 0.01}),
    "mistral": (MistralConfig, {"sliding_window": 5}),
    "mistral without a window": (MistralConfig, {"sliding_window": None}),
    "qwen2": (Qwen2Config, {"tie_word_embeddings": True}),
    "qwen2 with windows above": (
        Qwen2Config,
        {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1},
    ),
    "qwen3": (Qwen3Config, {}),
    "qwen3 with biases": (Qwen3Config, {"attention_bias": True}),
}
HEADS = [(4, 2, 8), (3, 1, 8), (4, 4, 16), (6, 3, 4), (2, 1, 24)]
TARGETS = [
    "all-linear",
    ["q_proj", "v_proj"],
    "o_proj",
    ["down_proj"],
    ["gate_proj", "k_proj"],
    r".*\.1\..*(up|o)_proj",
]
VOCABULARY = 97


def save(folder, family, seed=0, *, dtype=torch.float32, **changes):
    """A model of two or three layers with weights large enough that attention is not uniform."""
    kind, values = FAMILIES[family]
    heads, kv_heads, head_dim = HEADS[changes.pop("heads", 0)]
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": heads, "num_key_value_heads": kv_heads, "head_dim": head_dim}
    sizes |= {"max_position_embeddings": 128, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(kind(**sizes | values | changes))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.dim() > 1:
                p.mul_(4)
            else:
                p.add_(torch.randn_like(p) * 0.2 if "norm" in name else torch.randn_like(p) * 0.5)
    model.to(dtype).save_pretrained(folder)
    return Resolved(Path(folder), "org/tiny", "path", None)


def settings(**values):
    return ModelConfig(name_or_path="org/tiny", device="cpu", **values)


def rows(count=5, seed=0, longest=17, one_token=False):
    """Rows whose labels come in several stretches, as those of a conversation of several turns."""
    rng = random.Random(seed)
    examples = []
    for k in range(count):
        ids = [rng.randrange(3, VOCABULARY) for _ in range(rng.randint(2, longest))]
        labels = [i if rng.random() < 0.5 else IGNORE for i in ids[:-1]] + ids[-1:]
        labels = labels[: -rng.randint(1, 3)] + [IGNORE] * 3 if len(ids) > 6 and k % 2 else labels
        examples.append(Example(ids, labels[: len(ids)] + [IGNORE] * (len(ids) - len(labels)), f"row:{k}"))
    if one_token:
        examples.insert(1, Example([5], [5], "one"))
        examples.append(Example([7, 8, 9], [IGNORE] * 3, "none"))
    return examples


def randomize_b(engine, seed=1):
    generator = torch.Generator().manual_seed(seed)
    state = engine.adapter_state()
    for name, value in state.items():
        if "lora_B" in name:
            value.normal_(0, 0.1, generator=generator)
    engine.load_adapter_state(state)


def peer_of(base, engine, dtype=torch.float32):
    """transformers + peft with the weights of the base and the adapter of the engine."""
    model = AutoModelForCausalLM.from_pretrained(base.path, dtype=dtype)
    values = engine.adapter_config()
    names = ("r", "lora_alpha", "lora_dropout", "target_modules", "use_rslora")
    peer = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **{n: values[n] for n in names}))
    own = {lora.saved_name(n): p for n, p in peer.named_parameters() if p.requires_grad}
    state = engine.adapter_state()
    assert list(own) == list(state)
    with torch.no_grad():
        for name, p in own.items():
            p.copy_(state[name])
    return peer, own


def peer_loss(peer, examples):
    total = torch.zeros(())
    for example in examples:  # a row at a time: no padding can disturb it
        ids, labels = torch.tensor([example.input_ids]), torch.tensor(example.labels)
        total = total + cross_entropy(peer(input_ids=ids).logits[0, :-1].float(), labels[1:], reduction="sum")
    return total


def gradients(engine, batch):
    for p in engine.parameters():
        p.grad = None
    loss = engine.loss_sum(batch)
    loss.backward()
    return loss.detach(), {n: p.grad for n, p in zip(engine.parameter_names(), engine.parameters(), strict=True)}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("draw", range(3))
def test_loss_and_every_gradient_are_those_of_transformers_and_peft(family, draw, tmp_path):
    rng = random.Random(f"{family} {draw}")
    base = save(tmp_path, family, seed=draw, heads=rng.randrange(len(HEADS)), num_hidden_layers=rng.choice([1, 2, 3]))
    targets = TARGETS[0] if draw == 0 else rng.choice(TARGETS[1:-1])
    chosen = LoraSettings(
        r=rng.choice([1, 3, 8, 64]), lora_dropout=0.0, target_modules=targets, use_rslora=rng.random() < 0.5
    )
    engine = load_engine(settings(), base, new_adapter=chosen, seed=3)
    assert engine.name == "decoder"
    randomize_b(engine)
    engine.train()
    examples = rows(seed=draw, one_token=True)
    loss, ours = gradients(engine, pack(examples))
    peer, theirs = peer_of(base, engine)
    total = peer_loss(peer, examples)
    total.backward()
    assert torch.allclose(loss, total, rtol=1e-5)
    for name, p in theirs.items():
        scale = p.grad.abs().max()
        assert (ours[name] - p.grad).abs().max() <= 1e-4 * scale + 1e-6, name


def test_adapters_on_some_layers_only_leave_those_below_without_a_graph(tmp_path):
    base = save(tmp_path, "llama", num_hidden_layers=4)
    pattern = r".*\.(2)\.(mlp\.down|self_attn\.q)_proj"
    engine = load_engine(settings(), base, new_adapter=LoraSettings(r=2, lora_dropout=0.0, target_modules=pattern))
    randomize_b(engine)
    _, ours = gradients(engine, pack(rows()))
    peer, theirs = peer_of(base, engine)
    peer_loss(peer, rows()).backward()
    assert len(ours) == 4
    for name, p in theirs.items():
        assert torch.allclose(ours[name], p.grad, rtol=1e-3, atol=1e-5 * float(p.grad.abs().max())), name
    names, nodes = [], [engine.loss_sum(pack(rows())).grad_fn]
    while nodes:
        node = nodes.pop()
        names.append(type(node).__name__)
        nodes += [n for n, _ in node.next_functions if n is not None]
    assert names.count("_LayerBackward") == 2, "the adapted layer and the one above it, nothing below"


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3 with biases"])
def test_in_bfloat16_it_is_as_close_to_float32_as_pefts_own_bfloat16(family, tmp_path):
    base = save(tmp_path, family, dtype=torch.bfloat16, num_hidden_layers=3, hidden_size=64)
    off = {"ours": [], "theirs": []}
    for seed in range(9):
        new = LoraSettings(r=4, lora_dropout=0.0)
        exact, half = (
            load_engine(settings(dtype=d), base, new_adapter=new, seed=seed) for d in ("float32", "bfloat16")
        )
        randomize_b(exact, seed)
        half.load_adapter_state(exact.adapter_state())
        examples = rows(seed=seed)
        _, want = gradients(exact, pack(examples))
        _, ours = gradients(half, pack(examples))
        assert all(g.dtype == torch.float32 for g in ours.values())
        peer, theirs = peer_of(base, half, torch.bfloat16)
        peer_loss(peer, examples).backward()
        for who, grads in (("ours", ours), ("theirs", {n: p.grad for n, p in theirs.items()})):
            errors = [float((grads[n].float() - want[n]).norm() / want[n].norm()) for n in want]
            off[who].append(sum(errors) / len(errors))
    # Of one batch either may be the better by chance, by up to a factor of two; over several they are alike.
    typical = {who: sorted(errors)[len(errors) // 2] for who, errors in off.items()}
    assert 0 < typical["ours"] <= 1.1 * typical["theirs"], off


def test_the_initial_adapter_is_pefts_to_the_byte(tmp_path):
    base = save(tmp_path, "qwen3")
    for targets in TARGETS:
        new = LoraSettings(r=4, target_modules=targets)
        one, other = (load_engine(settings(engine=e), base, new_adapter=new, seed=5) for e in ("decoder", "generic"))
        assert one.name == "decoder" and other.name == "generic"
        assert one.parameter_names() == other.parameter_names()
        assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


class _Masked(torch.nn.Module):
    """A dropout whose mask is given."""

    def __init__(self, p, seed, stream):
        super().__init__()
        self.p, self.seed, self.stream = p, seed, stream

    def forward(self, x):
        mask = dropout_mask(self.seed, self.stream, x.shape[1:], self.p)
        return x * mask / (1 - self.p)


def test_with_dropout_the_gradients_are_those_of_peft_under_the_same_masks(tmp_path):
    base = save(tmp_path, "llama")
    engine = load_engine(settings(), base, new_adapter=LoraSettings(r=4, lora_dropout=0.3), seed=3)
    randomize_b(engine)
    engine.train()
    ids = rows(1, seed=4, longest=17)[0].input_ids * 2
    torch.manual_seed(21)
    loss, ours = gradients(engine, pack([Example(ids, ids, "all")]))
    torch.manual_seed(21)
    seed = int(torch.randint(1 << 31, ()))
    peer, theirs = peer_of(base, engine)
    modules = [m for m in peer.modules() if hasattr(m, "lora_dropout")]
    for stream, module in enumerate(modules):
        module.lora_dropout["default"] = _Masked(0.3, seed, stream)
    total = cross_entropy(peer(input_ids=torch.tensor([ids[:-1]])).logits[0], torch.tensor(ids[1:]), reduction="sum")
    total.backward()
    assert torch.allclose(loss, total, rtol=1e-5)
    for name, p in theirs.items():
        assert (ours[name] - p.grad).abs().max() <= 1e-4 * p.grad.abs().max(), name


def test_dropout_follows_torchs_seed_and_is_off_outside_of_training(tmp_path):
    base = save(tmp_path, "llama")
    engine = load_engine(settings(), base, new_adapter=LoraSettings(r=4, lora_dropout=0.3), seed=3)
    randomize_b(engine)
    batch = pack(rows())
    quiet = [engine.loss_sum(batch).item() for _ in range(2)]
    engine.train()
    noisy = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        noisy.append(engine.loss_sum(batch).item())
    engine.train(False)
    assert engine.loss_sum(batch).item() == quiet[0] == quiet[1] != noisy[0]
    assert noisy[0] == noisy[1] != noisy[2]


def test_gradient_checkpointing_changes_no_gradient(tmp_path):
    base = save(tmp_path, "qwen3", num_hidden_layers=3)
    grads = []
    for checkpointing in (False, True):
        new = LoraSettings(lora_dropout=0.25)
        engine = load_engine(settings(), base, new_adapter=new, seed=3, gradient_checkpointing=checkpointing)
        randomize_b(engine)
        engine.train()
        torch.manual_seed(11)
        grads.append(gradients(engine, pack(rows()))[1])
    assert all(torch.equal(grads[0][n], grads[1][n]) and grads[0][n].abs().max() > 0 for n in grads[0])


def test_logits_in_many_chunks_give_the_loss_of_one(tmp_path, monkeypatch):
    engine = load_engine(settings(), save(tmp_path, "llama"), new_adapter=LoraSettings(lora_dropout=0.0))
    randomize_b(engine)
    whole, want = gradients(engine, pack(rows()))
    losses = engine.token_losses(pack(rows()))
    monkeypatch.setattr(decoder_loss, "_CHUNK_CPU", 7 * VOCABULARY)
    loss, got = gradients(engine, pack(rows()))
    assert torch.allclose(loss, whole, rtol=1e-6)
    assert all(torch.allclose(got[n], want[n], rtol=1e-4, atol=1e-6) for n in want)
    assert torch.allclose(engine.token_losses(pack(rows())), losses)
    assert torch.allclose(losses.sum(), whole)


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2 with windows above"])
def test_a_row_gives_the_same_losses_whatever_stands_beside_it(family, tmp_path):
    engine = load_engine(settings(), save(tmp_path, family))
    wanted = rows(1, seed=5)[0]
    alone = engine.token_losses(pack([wanted]))
    for seed in (6, 7):
        beside = engine.token_losses(pack([*rows(3, seed=seed), wanted]))
        assert torch.allclose(beside[-len(alone) :], alone, rtol=1e-4, atol=1e-5)


def test_a_batch_without_any_label_has_the_loss_zero_and_a_gradient(tmp_path):
    engine = load_engine(settings(), save(tmp_path, "llama"), new_adapter=LoraSettings())
    batch = pack([Example([3, 4], [IGNORE, IGNORE], "none"), Example([5], [5], "one")])
    loss, grads = gradients(engine, batch)
    assert loss == 0
    assert all((g == 0).all() for g in grads.values())
    assert engine.token_losses(batch).shape == (0,)


def test_without_adapter_is_the_base(tmp_path):
    base = save(tmp_path, "llama")
    batch = pack(rows())
    before = load_engine(settings(), base).token_losses(batch)
    engine = load_engine(settings(), base, new_adapter=LoraSettings())
    randomize_b(engine)
    assert not torch.allclose(engine.token_losses(batch), before, atol=1e-3)
    with engine.without_adapter():
        assert torch.equal(engine.token_losses(batch), before)
    assert not torch.equal(engine.token_losses(batch), before)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("penalty", [1.0, 1.3])
def test_greedy_generation_is_transformers_own_token_by_token(family, penalty, tmp_path, monkeypatch):
    monkeypatch.setattr(decoder_generate, "_GROWTH", 4)  # so that the cache grows several times
    base = save(tmp_path, family)
    engine = load_engine(settings(), base, new_adapter=LoraSettings(r=4))
    randomize_b(engine)
    peer, _ = peer_of(base, engine)
    prompts = [e.input_ids for e in rows(7, seed=9)] + [[5]]
    stops = frozenset({2, 11, 23})
    got, finishes = {k: [] for k in range(8)}, {}
    wanted = Sampling(max_new_tokens=14, temperature=0, repetition_penalty=penalty)
    engine.train()
    for token in engine.generate(prompts, wanted, stops):
        assert token.prompt not in finishes
        got[token.prompt].append(token.id)
        if token.finish:
            finishes[token.prompt] = token.finish
    for k, prompt in enumerate(prompts):
        out = peer.eval().generate(
            input_ids=torch.tensor([prompt]), max_new_tokens=14, do_sample=False, eos_token_id=sorted(stops),
            pad_token_id=0, repetition_penalty=penalty,
        )  # fmt: skip
        want = out[0, len(prompt) :].tolist()
        assert got[k] == want
        assert finishes[k] == ("stop" if want[-1] in stops else "length")


def test_a_seed_repeats_a_sampled_answer_and_leaves_the_callers_random_state_alone(tmp_path):
    engine = load_engine(settings(), save(tmp_path, "llama"))
    torch.manual_seed(0)
    before = torch.random.get_rng_state()

    def answer(seed):
        sampling = Sampling(max_new_tokens=20, temperature=1.5, top_p=1.0, seed=seed)
        return [t.id for t in engine.generate([[3, 4, 5]], sampling, frozenset())]

    assert answer(4) == answer(4) != answer(5)
    assert answer(None) != answer(None)
    assert torch.equal(before, torch.random.get_rng_state())


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(temperature=0.7, top_p=1.0, top_k=0, repetition_penalty=1.0),
        Sampling(temperature=1.3, top_p=0.8, top_k=0, repetition_penalty=1.2),
        Sampling(temperature=0.5, top_p=0.9, top_k=7, repetition_penalty=1.1),
        Sampling(temperature=1.0, top_p=0.01, top_k=0, repetition_penalty=2.0),
        Sampling(temperature=1.0, top_p=1.0, top_k=1000, repetition_penalty=1.0),
    ],
)
def test_tokens_are_drawn_from_the_distribution_of_transformers(sampling):
    torch.manual_seed(0)
    logits, held = torch.randn(6, 50) * 3, torch.randint(0, 50, (6, 12))
    steps = [
        RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty),
        TemperatureLogitsWarper(sampling.temperature),
    ]
    steps += [TopKLogitsWarper(sampling.top_k)] if sampling.top_k else []
    steps += [TopPLogitsWarper(sampling.top_p)] if sampling.top_p < 1 else []
    want = LogitsProcessorList(steps)(held, logits.clone()).softmax(1)
    seen = torch.zeros(6, 50, dtype=torch.bool).scatter_(1, held, True)
    got = probabilities(logits, seen, sampling)
    assert torch.allclose(got, want, atol=1e-6)
    drawn = next_tokens(logits, seen, sampling, torch.Generator().manual_seed(0))
    assert (want.gather(1, drawn[:, None]) > 0).all()


@pytest.mark.parametrize("family", FAMILIES)
def test_the_frequencies_of_rope_are_transformers_own(family):
    kind, values = FAMILIES[family]
    config = kind(
        hidden_size=24,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=32,
        num_hidden_layers=1,
        vocab_size=8,
        **values,
    )
    model = AutoModelForCausalLM.from_config(config)
    shape = decoder_shape(json.loads(config.to_json_string(use_diff=False)))
    assert torch.allclose(inverse_frequencies(shape.rope, 32), model.model.rotary_emb.inv_freq, rtol=1e-6)


def test_a_config_of_older_transformers_is_read_too():
    old = {"model_type": "llama", "vocab_size": 9, "hidden_size": 64, "intermediate_size": 8, "num_hidden_layers": 2}
    old |= {"num_attention_heads": 4, "rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 2.0}}
    shape = decoder_shape(old)
    assert (shape.kv_heads, shape.head_dim, shape.rope.theta, shape.rope.kind) == (4, 16, 5e5, "linear")
    assert shape.windows == (0, 0) and shape.eps == 1e-6 and not shape.tied


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"model_type": "gemma2"}, "model_type gemma2"),
        ({"model_type": None}, "model_type None"),
        ({"hidden_act": "gelu"}, "hidden_act is gelu"),
        ({"attention_dropout": 0.1}, "attention_dropout"),
        ({"quantization_config": {"quant_method": "awq"}}, "quantization_config"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 2}}, "yarn"),
        ({"rope_parameters": None, "rope_scaling": {"rope_type": "dynamic"}}, "dynamic"),
        ({"rope_parameters": {"rope_type": "llama3", "factor": 2.0}}, "low_freq_factor"),
        ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "part of a head"),
        ({"num_key_value_heads": 3}, "do not fit together"),
        ({"head_dim": 7}, "do not fit together"),
        ({"hidden_size": "wide"}, "no usable hidden_size"),
        ({"layer_types": ["sliding_attention"]}, "layer_types"),
    ],
)
def test_a_config_that_it_does_not_compute_is_named_with_the_reason(change, said):
    config = json.loads(LlamaConfig(num_hidden_layers=1).to_json_string(use_diff=False))
    assert supported(config) is None
    assert said in supported(config | change)


def test_weights_in_several_files_are_those_of_one(tmp_path):
    one = save(tmp_path / "one", "qwen2")
    model = AutoModelForCausalLM.from_pretrained(one.path)
    model.save_pretrained(tmp_path / "many", max_shard_size="20KB")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 2
    many = Resolved(tmp_path / "many", "org/many", "path", None)
    a, b = (load_engine(settings(engine="decoder"), base).token_losses(pack(rows())) for base in (one, many))
    assert torch.equal(a, b)


def test_weights_that_do_not_fit_the_config_are_left_to_the_other_engine(tmp_path):
    base = save(tmp_path, "llama")
    config = json.loads((tmp_path / "config.json").read_text())
    for change, said in (
        ({"num_hidden_layers": 3}, "hold no model.layers.2"),
        ({"intermediate_size": 50}, "config.json says"),
        ({"tie_word_embeddings": True}, "weights of both"),
    ):
        (tmp_path / "config.json").write_text(json.dumps(config | change))
        with pytest.raises(ModelError, match=said):
            load_engine(settings(engine="decoder"), base)
    (tmp_path / "config.json").write_text(json.dumps(config))
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-50])
    with pytest.raises(ModelError, match="org/tiny"):
        load_engine(settings(), base)


@pytest.mark.parametrize(
    ("changes", "new", "said"),
    [
        ({"attn_implementation": "eager"}, {}, "attn_implementation"),
        ({"device_map": "auto", "device": "auto"}, {}, "device_map"),
        ({"trust_remote_code": True}, {}, "trust_remote_code"),
        ({}, {"init_lora_weights": "gaussian"}, "init_lora_weights"),
    ],
)
def test_what_the_decoder_does_not_do_goes_to_the_generic_engine_which_says_why(changes, new, said, tmp_path):
    base = save(tmp_path, "llama")
    values = {"name_or_path": "org/tiny", "device": "cpu"} | changes
    engine = load_engine(ModelConfig(**values), base, new_adapter=LoraSettings(**new))
    assert engine.name == "generic" and said in engine.choice
    with pytest.raises(ModelError, match=said):
        load_engine(ModelConfig(**values, engine="decoder"), base, new_adapter=LoraSettings(**new))
    assert load_engine(settings(engine="generic"), base).choice == ""


@pytest.mark.parametrize("targets", ["nothing_like_it", ["q_proj", "wrong_proj"], r".*\.attn\.(q|k)", "([", []])
def test_a_target_that_matches_nothing_is_an_error_that_lists_what_exists(targets, tmp_path):
    with pytest.raises(ConfigError, match=r"lora\.target_modules"):
        load_engine(settings(), save(tmp_path, "llama"), new_adapter=LoraSettings(target_modules=targets))


def test_the_saved_folder_is_pefts_own_and_comes_back(tmp_path):
    base = save(tmp_path / "base", "qwen3")
    new = LoraSettings(r=4, target_modules=["q_proj", "up_proj"], use_rslora=True)
    engine = load_engine(settings(), base, new_adapter=new)
    randomize_b(engine)
    (tmp_path / "adapter").mkdir()
    lora.save_adapter(tmp_path / "adapter", engine, base_name="org/tiny", base_revision="abc", card="")
    peer = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base.path), tmp_path / "adapter").eval()
    examples = rows()
    with torch.no_grad():
        assert torch.allclose(engine.loss_sum(pack(examples)), peer_loss(peer, examples), rtol=1e-5)
    for name in ("decoder", "generic"):
        again = load_engine(settings(engine=name), base, adapter=tmp_path / "adapter")
        assert again.parameters() == []
        assert torch.allclose(again.token_losses(pack(examples)), engine.token_losses(pack(examples)), atol=1e-5)
    further = LoraSettings(r=4, use_rslora=True, init_adapter=str(tmp_path / "adapter"))
    assert len(load_engine(settings(engine="decoder"), base, new_adapter=further).parameters()) == 8


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"bias": "all"}, "bias all"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"rank_pattern": {"q_proj": 2}}, "rank_pattern"),
        ({"target_modules": ["q_proj", "lm_head"]}, "lm_head"),
        ({"target_modules": ".*_proj|lm_head"}, "lm_head"),
        ({"target_modules": None}, "target_modules None"),
        ({"r": None}, "no r"),
        ({"a_future_setting": 3}, "a_future_setting"),
    ],
)
def test_an_adapter_that_is_more_than_plain_lora_is_not_the_decoders(change, said, tmp_path):
    base = save(tmp_path / "base", "llama")
    engine = load_engine(settings(), base, new_adapter=LoraSettings(target_modules=["q_proj"]))
    folder = tmp_path / "adapter"
    folder.mkdir()
    lora.save_adapter(folder, engine, base_name="org/tiny", base_revision=None, card="")
    values = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(values | change))
    with pytest.raises(ModelError, match=said):
        load_engine(settings(engine="decoder"), base, adapter=folder)


def test_an_adapter_state_that_does_not_fit_is_refused_with_every_reason_at_once(tmp_path):
    engine = load_engine(settings(), save(tmp_path, "llama"), new_adapter=LoraSettings())
    state = engine.adapter_state()
    names = sorted(state)
    del state[names[0]]
    state |= {"unheard.of": torch.zeros(1), names[1]: torch.zeros(3, 3)}
    state[names[2]] = torch.full_like(state[names[2]], float("nan"))
    with pytest.raises(ModelError) as raised:
        engine.load_adapter_state(state)
    assert all(part in str(raised.value) for part in (names[0], "unheard.of", "(3, 3)", "NaN"))


def test_a_step_of_the_optimizer_reaches_the_layers(tmp_path):
    engine = load_engine(
        settings(dtype="bfloat16"), save(tmp_path, "llama"), new_adapter=LoraSettings(lora_dropout=0.0)
    )
    optimizer = torch.optim.AdamW(engine.parameters(), lr=0.01, fused=True)
    losses = []
    for _ in range(6):
        loss, _ = gradients(engine, pack(rows()))
        optimizer.step()
        losses.append(float(loss))
    assert all(after < before for before, after in pairwise(losses))
