"""Quantised bases on an NVIDIA GPU: the kernels and products of fp8 at Llama's shapes, nf4 against bitsandbytes' own
layers, and whole steps, one by one and as CUDA graphs."""

import importlib.util

import pytest
import torch
from test_decoder_cuda import FAMILIES, base, gradient, rows  # noqa: F401

from lorikit.config import LoraSettings, ModelConfig
from lorikit.data.pack import pack
from lorikit.model.decoder_batch import lay_out
from lorikit.model.decoder_config import LINEAR, linear_name
from lorikit.model.decoder_graph import bucket_of, fill_bucket
from lorikit.model.engine import Sampling
from lorikit.model.frozen import allocator
from lorikit.model.kernels.fp8 import FP8, quantize_rows, quantize_rows_reference, transpose
from lorikit.model.load import load_base, load_engine
from test_frozen import dense_twin, relative
from test_kernels import DTYPES, fresh_numbers  # noqa: F401
from test_kernels_fp8 import check_extremes, check_products, check_rows

EIGHT_BITS = torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 9)
pytestmark = pytest.mark.gpu
needs_eight_bits = pytest.mark.skipif(not EIGHT_BITS, reason="needs a GPU of compute capability 8.9 or higher")
needs_bitsandbytes = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="needs bitsandbytes (the extra quant)"
)
QUANTISED = pytest.mark.parametrize(
    "quantization", [pytest.param("fp8", marks=needs_eight_bits), pytest.param("nf4", marks=needs_bitsandbytes)]
)
TOKENS = pytest.mark.parametrize("tokens", [1, 129, 1042])


@needs_eight_bits
@DTYPES
@TOKENS
@pytest.mark.parametrize("width", [576, 4096, 14336, 28672, 57344])
def test_every_element_becomes_the_nearest_number_at_its_rows_scale(tokens, width, dtype):
    check_rows(tokens, width, dtype, "cuda")
    check_rows(tokens, width, dtype, "cuda", columns=True)


@needs_eight_bits
def test_nan_and_infinity_stay_visible():
    check_extremes("cuda")


@needs_eight_bits
@TOKENS
def test_the_kernel_gives_the_bytes_of_the_reference(tokens):
    x, columns = torch.randn(tokens, 14336, device="cuda").bfloat16(), torch.rand(14336, device="cuda")
    for factors in (None, columns):
        got, want = quantize_rows(x, factors, 16), quantize_rows_reference(x, factors, 16)
        assert torch.equal(got[0].view(torch.uint8), want[0].view(torch.uint8))
        assert torch.equal(got[1], want[1])


@needs_eight_bits
@pytest.mark.parametrize("shape", [(6144, 4096), (28672, 4096), (4096, 14336), (16, 16), (130, 257)])
def test_the_transposed_bytes_are_the_bytes(shape):
    values = torch.randint(0, 256, shape, dtype=torch.uint8, device="cuda").view(FP8)
    assert torch.equal(transpose(values).view(torch.uint8), values.view(torch.uint8).t())


@needs_eight_bits
@TOKENS
@pytest.mark.parametrize("sizes", [(6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336), (960, 576), (16, 16)])
def test_products_are_those_of_the_quantised_operands(tokens, sizes):
    check_products(tokens, *sizes, torch.bfloat16, "cuda")


@QUANTISED
def test_rows_of_a_fused_weight_are_the_weights_of_its_matrices(quantization):
    weight = allocator(quantization, torch.bfloat16, torch.device("cuda"))([4096, 1024, 1024], 4096)
    for place in weight.places():
        place.put(torch.randn(place.shape, dtype=torch.bfloat16))
    x, grad = (torch.randn(77, width, device="cuda").bfloat16() for width in (4096, 2048))
    assert relative(weight[4096:].forward(x).float(), weight.forward(x)[:, 4096:].float()) <= 1e-2
    exact = grad.double() @ weight[4096:].dense().double()
    assert relative(weight[4096:].input_gradient(grad).double(), exact) <= 0.05


def build(base, quantization, dtype="bfloat16", engine="decoder", dropout=0.0):  # noqa: F811
    config = ModelConfig(name_or_path="tiny", dtype=dtype, engine=engine, device="cuda", quantization=quantization)
    made = load_engine(config, base, new_adapter=LoraSettings(r=8, lora_dropout=dropout), seed=3)
    state, generator = made.adapter_state(), torch.Generator().manual_seed(1)
    for name in sorted(state):
        if "lora_B" in name:
            state[name] = torch.randn(state[name].shape, generator=generator) * 0.05
    made.load_adapter_state(state)
    made.train()
    return made


@QUANTISED
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_a_replayed_graph_gives_what_its_kernels_give_one_by_one(base, quantization, dropout):  # noqa: F811
    engine = build(base, quantization, dropout=dropout)
    for seed in range(4):  # two buckets, each used again
        batch = pack(rows(seed % 2, count=9 + 20 * (seed % 2)))
        torch.manual_seed(seed)
        loss, graphed = gradient(engine, batch)
        torch.manual_seed(seed)
        number, at = engine._draw_seed(), lay_out(batch)
        bucket = bucket_of(at)
        filled = fill_bucket(batch, at, bucket)
        moved = type(filled)(**{k: getattr(filled, k).cuda() for k in filled.__dataclass_fields__})
        engine.clear_gradient()
        eager = engine._loss_sum(moved.packed(bucket.longest), number)
        eager.backward()
        assert loss == pytest.approx(float(eager.detach()), rel=1e-3)
        del eager
        for name, p in zip(engine.parameter_names(), engine.parameters(), strict=True):
            assert relative(p.grad, graphed[name]) <= 2e-2, f"step {seed}, {name}"
    assert len(engine._graphs) == 2


@QUANTISED
def test_gradients_are_those_of_the_dense_values_within_what_quantised_activations_cost(base, quantization):  # noqa: F811
    engine = build(base, quantization)
    twin = dense_twin(engine)
    twin.train()
    batch = pack(rows(3))
    loss, got = gradient(engine, batch)
    want_loss, want = gradient(twin, batch)
    assert loss == pytest.approx(want_loss, rel=1e-3 if quantization == "nf4" else 2e-2)
    off = sorted(relative(got[name], want[name]) for name in want)
    assert off[len(off) // 2] <= (1e-2 if quantization == "nf4" else 0.25)


@QUANTISED
def test_an_optimizer_step_reaches_the_graph_and_steps_take_no_further_memory(base, quantization):  # noqa: F811
    engine = build(base, quantization)
    batch = pack(rows(1))
    before, _ = gradient(engine, batch)
    optimizer = torch.optim.AdamW(engine.parameters(), lr=1e-2, fused=True)
    used = []
    for _ in range(8):
        loss, _ = gradient(engine, batch)
        optimizer.step()
        used.append(torch.cuda.memory_allocated())
    assert loss < 0.9 * before
    assert max(used[2:]) == min(used[2:])


@QUANTISED
def test_an_answer_comes_token_by_token(base, quantization):  # noqa: F811
    prompts = [e.input_ids for e in rows(4)]
    tokens = list(build(base, quantization).generate(prompts, Sampling(max_new_tokens=5, temperature=0), frozenset()))
    assert sorted(t.prompt for t in tokens if t.finish) == list(range(len(prompts)))


@QUANTISED
def test_the_base_takes_the_memory_of_its_bits(quantization):
    sizes = [28672, 4096]
    before = torch.cuda.memory_allocated()
    weight = allocator(quantization, torch.bfloat16, torch.device("cuda"))(sizes[:1], sizes[1])
    weight.places()[0].put(torch.randn(sizes, dtype=torch.bfloat16))
    share = (torch.cuda.memory_allocated() - before) / (sizes[0] * sizes[1])
    assert share <= {"fp8": 1.01, "nf4": 0.53}[quantization]


@needs_bitsandbytes
def test_nf4_is_transformers_with_bitsandbytes_and_both_engines_compute_with_it(base):  # noqa: F811
    config = ModelConfig(name_or_path="tiny", dtype="float32", device="cuda", quantization="nf4")
    import bitsandbytes

    theirs, ours = load_base(config, base), build(base, "nf4", "float32")
    for number, layer in enumerate(ours.weights.layers):
        for fused, names in (("qkv", LINEAR[:3]), ("o", LINEAR[3:4]), ("gate_up", LINEAR[4:6]), ("down", LINEAR[6:])):
            weight = getattr(layer, fused)
            for name, part in zip(names, weight.dense().split(weight.rows), strict=True):
                peer = theirs.get_submodule(linear_name(number, name)).weight
                assert torch.equal(part, bitsandbytes.functional.dequantize_4bit(peer.data, peer.quant_state)), name
    batch = pack(rows(2))
    loss, got = gradient(ours, batch)
    want_loss, want = gradient(build(base, "nf4", "float32", "generic"), batch)
    assert loss == pytest.approx(want_loss, rel=1e-4)
    assert all(relative(got[name], want[name]) <= 1e-3 for name in want)
