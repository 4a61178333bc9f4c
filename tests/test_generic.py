"""The generic engine against transformers + peft themselves, on tiny models with random weights."""

import copy
import random

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
)

from lorikit.config import LoraSettings
from lorikit.data.pack import pack
from lorikit.data.values import IGNORE, Example
from lorikit.errors import ConfigError, ModelError
from lorikit.model import lora
from lorikit.model.engine import Sampling
from lorikit.model.generic import GenericEngine

SMALL = dict(  # noqa: C408
    vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    head_dim=8, max_position_embeddings=128, bos_token_id=1, eos_token_id=2, pad_token_id=0,
)  # fmt: skip
FAMILIES = {
    "llama": (LlamaConfig(**SMALL), "packed"),
    "mistral with a sliding window": (MistralConfig(**SMALL, sliding_window=4), "packed"),
    "qwen2": (Qwen2Config(**SMALL, tie_word_embeddings=True), "packed"),
    "qwen3": (Qwen3Config(**SMALL), "packed"),
    "gemma2 with soft caps": (Gemma2Config(**SMALL, sliding_window=4, query_pre_attn_scalar=8), "masked"),
    "mamba": (MambaConfig(vocab_size=97, hidden_size=32, state_size=4, num_hidden_layers=2), "rows"),
}


def build(config, seed=0):
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(copy.deepcopy(config))
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() > 1:
                p.mul_(4)  # larger than the usual init, so that attention is not uniform
    return model.eval()


def rows(count=5, seed=0, longest=17):
    rng = random.Random(seed)
    examples = []
    for k in range(count):
        ids = [rng.randrange(3, 97) for _ in range(rng.randint(2, longest))]
        cut = rng.randint(1, len(ids) - 1)
        examples.append(Example(ids, [IGNORE] * cut + ids[cut:], f"row:{k}"))
    return examples


def randomize_b(model, seed=1):
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.normal_(0, 0.1)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_packed_batch_gives_the_loss_and_the_gradients_of_transformers_and_peft_on_padded_rows(family):
    config, way = FAMILIES[family]
    targets = ["in_proj"] if family == "mamba" else "all-linear"
    adapted = lora.add_adapter(build(config), LoraSettings(target_modules=targets, lora_dropout=0.0), seed=3)
    randomize_b(adapted)
    engine = GenericEngine(adapted)
    assert engine.isolation == way
    engine.train()
    batch = pack(rows())
    loss = engine.loss_sum(batch)
    loss.backward()
    ours = {n: p.grad.clone() for n, p in adapted.named_parameters() if p.requires_grad}

    peer = get_peft_model(build(config), LoraConfig(
        task_type="CAUSAL_LM", r=8, lora_alpha=32, target_modules=targets, lora_dropout=0.0))  # fmt: skip
    peer.load_state_dict(adapted.state_dict())
    total = torch.zeros(())
    for example in rows():  # a row at a time with transformers' own loss: no padding can disturb it
        ids, labels = torch.tensor([example.input_ids]), torch.tensor([example.labels])
        total = total + peer(input_ids=ids, labels=labels).loss * int((labels[:, 1:] != IGNORE).sum())
    total.backward()
    theirs = {n: p.grad for n, p in peer.named_parameters() if p.requires_grad}
    assert torch.allclose(loss, total, rtol=1e-5)
    assert ours.keys() == theirs.keys()
    for name, grad in theirs.items():
        assert grad.abs().max() > 0, name
        assert (ours[name] - grad).abs().max() <= 1e-4 * grad.abs().max() + 1e-7, name


@pytest.mark.parametrize("family", FAMILIES)
def test_a_row_gives_the_same_losses_whatever_stands_beside_it(family):
    engine = GenericEngine(build(FAMILIES[family][0]))
    wanted = rows(1, seed=5)[0]
    alone = engine.token_losses(pack([wanted]))
    for seed in (6, 7):
        others = rows(3, seed=seed)
        beside = engine.token_losses(pack([*others, wanted]))
        assert torch.allclose(beside[-len(alone) :], alone, rtol=1e-4, atol=1e-5)


def test_an_attention_named_by_the_user_is_kept():
    engine = GenericEngine(build(FAMILIES["llama"][0]), attention="sdpa")
    assert engine.isolation == "masked"
    assert engine.base.config._attn_implementation == "sdpa"


def test_gradient_checkpointing_changes_no_gradient():
    grads = []
    for checkpointing in (False, True):
        adapted = lora.add_adapter(build(FAMILIES["llama"][0]), LoraSettings(lora_dropout=0.25), seed=3)
        randomize_b(adapted)
        if checkpointing:
            adapted.base_model.model.gradient_checkpointing_enable({"use_reentrant": False})
            adapted.base_model.model.enable_input_require_grads()
        engine = GenericEngine(adapted)
        engine.train()
        torch.manual_seed(11)
        engine.loss_sum(pack(rows())).backward()
        grads.append([p.grad for p in engine.parameters()])
    assert all(torch.equal(a, b) and a.abs().max() > 0 for a, b in zip(*grads, strict=True))


def test_the_adapter_starts_as_pefts_does_and_is_float32_on_a_bfloat16_base():
    base = build(FAMILIES["llama"][0]).to(torch.bfloat16)
    adapted = lora.add_adapter(base, LoraSettings(r=4), seed=3)
    state = GenericEngine(adapted).adapter_state()
    assert all(v.dtype == torch.float32 for v in state.values())
    assert all((v == 0).all() for k, v in state.items() if "lora_B" in k)
    bound = (1 / 32) ** 0.5  # kaiming-uniform with a = sqrt(5): 1 / sqrt(inputs)
    spread = max(float(v.abs().max()) for k, v in state.items() if "q_proj.lora_A" in k)
    assert 0.9 * bound < spread <= bound


def test_without_adapter_is_the_base():
    base = build(FAMILIES["llama"][0])
    batch = pack(rows())
    before = GenericEngine(base).token_losses(batch)
    adapted = lora.add_adapter(base, LoraSettings(), seed=3)
    randomize_b(adapted)
    engine = GenericEngine(adapted)
    assert not torch.allclose(engine.token_losses(batch), before, atol=1e-3)
    with engine.without_adapter():
        assert torch.equal(engine.token_losses(batch), before)


@pytest.mark.parametrize(
    ("targets", "said"),
    [
        ("nothing_like_it", "nothing_like_it"),
        (["q_proj", "wrong_proj"], "wrong_proj"),
        (r".*\.attn\.(q|k)", "matches no linear layer"),
        (r"([", "no regular expression"),
        ([], "an empty list"),
    ],
)
def test_a_target_that_matches_nothing_is_an_error_that_lists_what_exists(targets, said):
    with pytest.raises(ConfigError) as raised:
        lora.add_adapter(build(FAMILIES["llama"][0]), LoraSettings(target_modules=targets), seed=0)
    assert said in str(raised.value)
    if "regular" not in said:
        assert "down_proj" in str(raised.value)
        assert "q_proj" in str(raised.value)


@pytest.mark.parametrize(
    ("targets", "count"),
    [
        ("all-linear", 14),
        (["q_proj", "v_proj"], 4),
        ("o_proj", 2),
        ("layers.0.self_attn.q_proj", 1),
        (r".*\.1\.mlp\..*", 3),
    ],
)
def test_targets_are_a_word_a_list_a_suffix_a_regular_expression_or_all(targets, count):
    adapted = lora.add_adapter(build(FAMILIES["llama"][0]), LoraSettings(target_modules=targets), seed=0)
    assert len(GenericEngine(adapted).parameters()) == 2 * count


def test_an_adapter_state_that_does_not_fit_is_refused_with_every_reason_at_once():
    engine = GenericEngine(lora.add_adapter(build(FAMILIES["llama"][0]), LoraSettings(), seed=0))
    state = engine.adapter_state()
    names = sorted(state)
    del state[names[0]]
    state["unheard.of"] = torch.zeros(1)
    state[names[1]] = torch.zeros(3, 3)
    state[names[2]] = torch.full_like(state[names[2]], float("nan"))
    with pytest.raises(ModelError) as raised:
        engine.load_adapter_state(state)
    for part in (names[0], "unheard.of", "(3, 3)", "NaN"):
        assert part in str(raised.value)


def test_greedy_generation_is_transformers_own_for_every_prompt_of_a_batch():
    model = build(FAMILIES["llama"][0])
    engine = GenericEngine(model)
    prompts = [e.input_ids for e in rows(7, seed=9)]
    stops = frozenset({2, 5})
    got = {k: [] for k in range(7)}
    finishes = {}
    for token in engine.generate(prompts, Sampling(max_new_tokens=12, temperature=0, repetition_penalty=1.0), stops):
        assert token.prompt not in finishes
        got[token.prompt].append(token.id)
        if token.finish:
            finishes[token.prompt] = token.finish
    assert engine.base.config._attn_implementation == "lorikit_packed"
    plain = build(FAMILIES["llama"][0])
    for k, prompt in enumerate(prompts):
        out = plain.generate(
            torch.tensor([prompt]), max_new_tokens=12, do_sample=False, eos_token_id=[2, 5], pad_token_id=0
        )
        want = out[0, len(prompt) :].tolist()
        assert got[k] == want
        assert finishes[k] == ("stop" if want[-1] in stops else "length")


def test_a_seed_repeats_a_sampled_answer_and_leaves_the_callers_random_state_alone():
    engine = GenericEngine(build(FAMILIES["llama"][0]))
    sampling = Sampling(max_new_tokens=20, temperature=1.5, top_p=1.0, seed=4)
    torch.manual_seed(0)
    before = torch.random.get_rng_state()
    first, second = ([t.id for t in engine.generate([[3, 4, 5]], sampling, frozenset())] for _ in range(2))
    other = Sampling(max_new_tokens=20, temperature=1.5, top_p=1.0, seed=5)
    third = [t.id for t in engine.generate([[3, 4, 5]], other, frozenset())]
    assert first == second != third
    assert torch.equal(before, torch.random.get_rng_state())


def test_closing_the_stream_stops_the_generation():
    engine = GenericEngine(build(FAMILIES["llama"][0]))
    stream = engine.generate([[3, 4, 5]], Sampling(max_new_tokens=100, temperature=0), frozenset())
    assert next(stream).prompt == 0
    stream.close()
    assert engine.isolation == "packed"
    assert torch.isfinite(engine.loss_sum(pack(rows())))


def test_the_saved_folder_is_pefts_own_and_gives_the_same_logits(tmp_path):
    adapted = lora.add_adapter(
        build(FAMILIES["qwen3"][0]), LoraSettings(r=4, target_modules=["q_proj", "up_proj"]), seed=0
    )
    randomize_b(adapted)
    engine = GenericEngine(adapted)
    lora.save_adapter(tmp_path, engine, base_name="org/base", base_revision="abc", card="# card")
    assert {f.name for f in tmp_path.iterdir()} == {"adapter_config.json", "adapter_model.safetensors", "README.md"}
    loaded = PeftModel.from_pretrained(build(FAMILIES["qwen3"][0]), str(tmp_path))
    assert loaded.peft_config["default"].base_model_name_or_path == "org/base"
    ids = torch.tensor([rows(1)[0].input_ids])
    engine.train(False)
    with torch.no_grad():
        want = loaded.eval()(input_ids=ids).logits
        assert torch.equal(build(FAMILIES["qwen3"][0])(input_ids=ids).logits, want) is False
    again = GenericEngine(lora.load_adapter(build(FAMILIES["qwen3"][0]), tmp_path, trainable=False))
    batch = pack(rows())
    assert torch.equal(again.token_losses(batch), engine.token_losses(batch))
    assert again.parameters() == []
    assert (
        len(GenericEngine(lora.load_adapter(build(FAMILIES["qwen3"][0]), tmp_path, trainable=True)).parameters()) == 8
    )
    with torch.no_grad():
        assert torch.allclose(again.model(input_ids=ids, logits_to_keep=0, use_cache=False,
            cu_seq_lens_q=torch.tensor([0, ids.shape[1]]), max_length_q=ids.shape[1]).logits, want, atol=1e-5)  # fmt: skip


def test_a_damaged_or_foreign_adapter_folder_says_what_is_wrong(tmp_path):
    engine = GenericEngine(lora.add_adapter(build(FAMILIES["llama"][0]), LoraSettings(), seed=0))
    lora.save_adapter(tmp_path, engine, base_name="b", base_revision=None, card="")
    weights, config = tmp_path / lora.WEIGHTS, tmp_path / lora.CONFIG
    good = weights.read_bytes(), config.read_text()

    def refused(model=None):
        with pytest.raises(ModelError) as raised:
            lora.load_adapter(model or build(FAMILIES["llama"][0]), tmp_path, trainable=False)
        return str(raised.value)

    wider = LlamaConfig(**SMALL | {"hidden_size": 64, "num_hidden_layers": 3})
    said = refused(build(wider))
    assert "missing" in said and "other shapes" in said
    weights.write_bytes(good[0][: len(good[0]) // 2])
    assert "cut off" in refused()
    weights.unlink()
    (tmp_path / "adapter_model.bin").write_bytes(b"x")
    assert "pickle" in refused()
    weights.write_bytes(good[0])
    for text, said in (("{", "cannot be read"), ('{"peft_type": "IA3"}', "IA3"), ("[]", "None")):
        config.write_text(text)
        assert said in refused()
    config.unlink()
    assert "no adapter_config.json" in refused()
