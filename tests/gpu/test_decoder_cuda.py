"""The decoder on an NVIDIA GPU: eager and as a CUDA graph, against transformers + peft in float32."""

import random

import pytest
import torch

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")]

from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config  # noqa: E402

from lorikit.config import LoraSettings, ModelConfig  # noqa: E402
from lorikit.data.pack import pack  # noqa: E402
from lorikit.data.values import IGNORE, Example  # noqa: E402
from lorikit.hub import Resolved  # noqa: E402
from lorikit.model.decoder import DecoderEngine  # noqa: E402
from lorikit.model.decoder_batch import lay_out  # noqa: E402
from lorikit.model.decoder_graph import bucket_of, fill_bucket  # noqa: E402
from lorikit.model.decoder_memory import Keep, passing_bytes  # noqa: E402
from lorikit.model.engine import Sampling  # noqa: E402
from lorikit.model.load import load_engine  # noqa: E402

SIZES = {
    "vocab_size": 997, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 3, "num_attention_heads": 8,
    "num_key_value_heads": 2, "head_dim": 64, "max_position_embeddings": 1024, "bos_token_id": 1, "eos_token_id": 2,
    "pad_token_id": 0,
}  # fmt: skip
FAMILIES = {
    "llama": LlamaConfig(**SIZES),
    "mistral with a sliding window": MistralConfig(**SIZES, sliding_window=8),
    "qwen2": Qwen2Config(**SIZES, tie_word_embeddings=True),
    "qwen3": Qwen3Config(**SIZES),
}


@pytest.fixture(scope="module", params=FAMILIES)
def base(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(FAMILIES[request.param])
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() > 1:
                p.mul_(2)
    model.save_pretrained(folder)
    return Resolved(folder, "tiny", "path", None)


def build(base, engine, dtype, dropout=0.0):
    made = load_engine(
        ModelConfig(name_or_path="tiny", dtype=dtype, engine=engine, device="cuda"),
        base,
        new_adapter=LoraSettings(r=8, lora_dropout=dropout),
        seed=3,
    )
    state = made.adapter_state()
    generator = torch.Generator().manual_seed(1)
    for name in sorted(state):
        if "lora_B" in name:
            state[name] = torch.randn(state[name].shape, generator=generator) * 0.05
    made.load_adapter_state(state)
    made.train()
    return made


def rows(seed, count=9, prefix=()):
    rng = random.Random(seed)
    examples = []
    for k in range(count):
        ids = [*prefix] + [rng.randrange(3, 997) for _ in range(rng.choice([1, 2, 17, 64, 65, 130]))]
        cut = max(len(ids) // 2, len(prefix))
        examples.append(Example(ids, [IGNORE] * cut + ids[cut:], f"row:{k}"))
    return examples


def gradient(engine, batch):
    engine.clear_gradient()
    loss = engine.add_gradient(batch)
    return float(loss), {
        n: p.grad.float().clone() for n, p in zip(engine.parameter_names(), engine.parameters(), strict=True)
    }


def close(ours, exact, peer, tolerance):
    for name, want in exact.items():
        assert want.abs().max() > 0, name
        error, allowed = (ours[name] - want).norm(), 1.5 * (peer[name] - want).norm() + tolerance * want.norm()
        assert error <= allowed, f"{name}: {error} > {allowed}"


@pytest.mark.parametrize("prefix", [0, 23])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_step_is_as_close_to_float32_as_transformers_and_peft_are(base, dtype, prefix):
    batch = pack(rows(random.randrange(10**6), prefix=range(7, 7 + prefix)))
    exact_loss, exact = gradient(build(base, "generic", "float32"), batch)
    peer_loss, peer = gradient(build(base, "generic", dtype), batch)
    engine = build(base, "decoder", dtype)
    assert isinstance(engine, DecoderEngine)
    loss, ours = gradient(engine, batch)
    tolerance = 1e-4 if dtype == "float32" else 2e-2
    assert abs(loss - exact_loss) <= 2 * abs(peer_loss - exact_loss) + tolerance * exact_loss
    close(ours, exact, peer, tolerance)
    assert bool(engine._graphs) == (dtype == "bfloat16")


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_a_replayed_graph_gives_what_its_kernels_give_one_by_one(base, dropout):
    engine = build(base, "decoder", "bfloat16", dropout)
    for seed in range(4):  # several buckets, each used again
        batch = pack(rows(seed % 2, count=9 + 20 * (seed % 2), prefix=range(9, 9 + 30 * (seed % 2))))
        torch.manual_seed(seed)
        loss, graphed = gradient(engine, batch)
        torch.manual_seed(seed)
        number = engine._draw_seed()
        at = lay_out(batch)
        bucket = bucket_of(at)
        filled = fill_bucket(batch, at, bucket)
        moved = type(filled)(**{k: getattr(filled, k).cuda() for k in filled.__dataclass_fields__})
        engine.clear_gradient()
        eager = engine._loss_sum(moved.packed(bucket.longest), number)
        eager.backward()
        assert loss == pytest.approx(float(eager), rel=1e-3)
        del eager
        for name, p in zip(engine.parameter_names(), engine.parameters(), strict=True):
            error, size = float((p.grad - graphed[name]).norm()), float(graphed[name].norm())
            assert error <= 1e-2 * size, f"step {seed}, {name}: {error} of {size}"
    assert len(engine._graphs) == 2


@pytest.mark.parametrize("level", [Keep.HOST, Keep.INPUT, Keep.PRODUCTS, Keep.GATE_UP])
def test_how_much_the_layers_keep_changes_no_gradient(base, level):
    batch = pack(rows(5))
    engine = build(base, "decoder", "bfloat16", 0.1)
    engine._takes_graphs = level > Keep.HOST  # which is without graphs: other sizes of products round otherwise
    torch.manual_seed(4)
    want_loss, want = gradient(engine, batch)
    engine = build(base, "decoder", "bfloat16", 0.1)
    engine.highest = level
    torch.manual_seed(4)
    loss, got = gradient(engine, batch)
    assert bool(engine._graphs) == (level > Keep.HOST)
    assert loss == pytest.approx(want_loss, rel=1e-3)
    for name, value in want.items():
        assert (got[name] - value).norm() <= 2e-2 * value.norm() > 0, name


def test_a_limit_on_the_memory_is_kept(base):
    engine = build(base, "decoder", "bfloat16", 0.1)
    batch = pack([Example(list(range(3, 990)), list(range(3, 990)), f"row:{k}") for k in range(8)])
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    gradient(engine, batch)
    free = torch.cuda.max_memory_allocated()
    limited = build(base, "decoder", "bfloat16", 0.1)
    limited._free = passing_bytes(limited.shape, batch.num_tokens, 2)  # room for nothing that is kept
    assert set(limited.levels(batch.num_tokens)) == {Keep.HOST}
    torch.cuda.reset_peak_memory_stats()
    gradient(limited, batch)
    assert torch.cuda.max_memory_allocated() < free


def test_an_optimizer_step_reaches_the_graph(base):
    engine = build(base, "decoder", "bfloat16")
    batch = pack(rows(1))
    before, _ = gradient(engine, batch)
    optimizer = torch.optim.AdamW(engine.parameters(), lr=1e-2, fused=True)
    for _ in range(8):
        loss, _ = gradient(engine, batch)
        optimizer.step()
    assert loss < 0.9 * before


def test_greedy_generation_is_the_generic_engines(base):
    prompts = [e.input_ids for e in rows(4)]
    sampling = Sampling(max_new_tokens=10, temperature=0, repetition_penalty=1.0)
    answers = []
    for kind in ("generic", "decoder"):
        got = {k: [] for k in range(len(prompts))}
        for token in build(base, kind, "float32").generate(prompts, sampling, frozenset({2})):
            got[token.prompt].append(token.id)
        answers.append(got)
    assert answers[0] == answers[1]
