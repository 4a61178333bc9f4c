"""Quantised bases: what is stored, what the decoder computes with it, how it is loaded, and what is refused."""

import dataclasses
import importlib.util
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM

from lorikit.config import LoraSettings, ModelConfig
from lorikit.data.pack import pack
from lorikit.errors import ConfigError, ModelError
from lorikit.hub import Resolved
from lorikit.model import decoder_load, frozen
from lorikit.model.decoder import DecoderEngine
from lorikit.model.decoder_config import LINEAR, linear_name
from lorikit.model.engine import Sampling
from lorikit.model.frozen import Dense, Fp8, Nf4, allocator
from lorikit.model.kernels.fp8 import quantize_rows
from lorikit.model.load import load_base, load_engine
from tiny_decoder import gradients, randomize_b, rows, save, settings

needs_bitsandbytes = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="needs bitsandbytes (the extra quant)"
)
NF4 = pytest.param("nf4", marks=needs_bitsandbytes)
QUANTISED = pytest.mark.parametrize("quantization", ["fp8", NF4])
FUSED = ("qkv", "o", "gate_up", "down")
WIDE = {"hidden_size": 64, "intermediate_size": 160, "heads": 2}  # widths that bitsandbytes packs on every CPU


def engine_of(base, quantization, dtype="float32", **lora):
    new = LoraSettings(**{"r": 4, "lora_dropout": 0.0} | lora)
    engine = load_engine(settings(quantization=quantization, dtype=dtype), base, new_adapter=new, seed=3)
    assert isinstance(engine, DecoderEngine)
    randomize_b(engine)
    return engine


def dense_twin(engine):
    """The same engine over the values that the quantised weights stand for."""
    layers = tuple(
        dataclasses.replace(
            layer, **{n: Dense(getattr(layer, n).dense().clone(), getattr(layer, n).rows) for n in FUSED}
        )
        for layer in engine.weights.layers
    )
    weights = dataclasses.replace(engine.weights, layers=layers)
    return DecoderEngine(engine.shape, weights, engine.adapter)


def relative(got, want):
    return float((got - want).norm() / want.norm())


@QUANTISED
@pytest.mark.parametrize("family", ["llama with biases", "qwen2", "qwen3", "mistral"])
def test_what_is_stored_is_close_to_the_base_and_everything_else_is_the_base(quantization, family, tmp_path):
    base = save(tmp_path, family, **WIDE)
    plain, quantised = (load_engine(settings(quantization=q), base).weights for q in ("none", quantization))
    for want, got in zip(plain.layers, quantised.layers, strict=True):
        for name in FUSED:
            weight = getattr(got, name)
            assert type(weight) is {"fp8": Fp8, "nf4": Nf4}[quantization]
            assert 0 < relative(weight.dense(), getattr(want, name).dense()) < {"fp8": 0.035, "nf4": 0.11}[quantization]
        for field in dataclasses.fields(want):
            if field.name not in FUSED and getattr(want, field.name) is not None:
                assert torch.equal(getattr(got, field.name), getattr(want, field.name)), field.name
    assert torch.equal(plain.embed, quantised.embed) and torch.equal(plain.head, quantised.head)


@needs_bitsandbytes
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_nf4_weights_are_those_of_transformers_with_bitsandbytes_to_the_byte(dtype, tmp_path):
    import bitsandbytes

    wide = WIDE | {"intermediate_size": 192}  # of other rows than multiples of 64 theirs are wrong on a CPU
    base = save(tmp_path, "qwen2", dtype=torch.bfloat16, **wide)
    config = settings(quantization="nf4", dtype=dtype)
    theirs = load_base(config, base)
    engine = load_engine(config, base)
    groups = {"qkv": LINEAR[:3], "o": LINEAR[3:4], "gate_up": LINEAR[4:6], "down": LINEAR[6:]}
    for number, layer in enumerate(engine.weights.layers):
        for fused, names in groups.items():
            weight = getattr(layer, fused)
            for name, part in zip(names, weight.dense().split(weight.rows), strict=True):
                peer = theirs.get_submodule(linear_name(number, name)).weight
                assert isinstance(peer, bitsandbytes.nn.Params4bit)
                want = bitsandbytes.functional.dequantize_4bit(peer.data, peer.quant_state)
                assert part.dtype == getattr(torch, dtype)
                assert torch.equal(part, want), f"layer {number} {name}"


def test_fp8_is_quantised_from_the_values_of_the_file_whatever_the_dtype(tmp_path):
    base = save(tmp_path, "llama")
    exact = AutoModelForCausalLM.from_pretrained(base.path).get_submodule(linear_name(1, "down_proj")).weight
    weight = load_engine(settings(quantization="fp8", dtype="bfloat16"), base).weights.layers[1].down
    values, scales = quantize_rows(exact.detach())
    assert torch.equal(weight.values.view(torch.uint8), values.view(torch.uint8))
    assert torch.equal(weight.scales, scales)


@needs_bitsandbytes
@pytest.mark.parametrize("family", ["llama with biases", "qwen2", "qwen3"])
def test_with_nf4_losses_gradients_and_answers_are_those_of_its_dense_values(family, tmp_path):
    engine = engine_of(save(tmp_path, family, num_hidden_layers=3), "nf4")
    twin = dense_twin(engine)
    batch = pack(rows(one_token=True))
    loss, got = gradients(engine, batch)
    want_loss, want = gradients(twin, batch)
    assert torch.allclose(loss, want_loss, rtol=1e-6)
    for name in want:
        assert (got[name] - want[name]).abs().max() <= 1e-6 * want[name].abs().max(), name
    prompts, greedy = [e.input_ids for e in rows(4)], Sampling(max_new_tokens=6, temperature=0)
    answers = [[(t.prompt, t.id) for t in e.generate(prompts, greedy, frozenset())] for e in (engine, twin)]
    assert answers[0] == answers[1]


@needs_bitsandbytes
def test_with_nf4_in_bfloat16_the_gradients_are_as_close_to_float32_as_those_of_its_dense_values(tmp_path):
    engine = engine_of(save(tmp_path, "llama", dtype=torch.bfloat16), "nf4", "bfloat16")
    _, got = gradients(engine, pack(rows()))
    _, want = gradients(dense_twin(engine), pack(rows()))
    assert all(relative(got[name], want[name]) <= 1e-6 for name in want)


def test_with_fp8_losses_and_gradients_are_off_by_what_quantised_activations_cost(tmp_path):
    """Two operands of a product are each off by 2.6 % (root mean square of a step of 1/8, uniform), a product of many
    terms so by 3.7 %; the errors of some ten products in a row add up as if by chance: 12 %, and 20 % are allowed."""
    base = save(tmp_path, "llama", hidden_size=96, intermediate_size=160, num_hidden_layers=2)
    off, losses = [], []
    for seed in range(5):
        engine = engine_of(base, "fp8", r=8)
        batch = pack(rows(8, seed=seed, longest=30))
        loss, got = gradients(engine, batch)
        want_loss, want = gradients(dense_twin(engine), batch)
        losses.append(abs(float(loss / want_loss) - 1))
        off += [relative(got[name], want[name]) for name in want]
    assert max(losses) <= 0.01
    assert min(off) > 0 and sorted(off)[len(off) // 2] <= 0.2 and max(off) <= 0.4


@QUANTISED
def test_gradient_checkpointing_changes_no_gradient(quantization, tmp_path):
    base, grads = save(tmp_path, "qwen3", num_hidden_layers=3), []
    for checkpointing in (False, True):
        new = LoraSettings(lora_dropout=0.25)
        engine = load_engine(
            settings(quantization=quantization), base, new_adapter=new, seed=3, gradient_checkpointing=checkpointing
        )
        randomize_b(engine)
        engine.train()
        torch.manual_seed(11)
        grads.append(gradients(engine, pack(rows()))[1])
    assert all(torch.equal(grads[0][n], grads[1][n]) and grads[0][n].abs().max() > 0 for n in grads[0])


@QUANTISED
def test_a_step_of_the_optimizer_lowers_the_loss(quantization, tmp_path):
    engine = engine_of(save(tmp_path, "llama"), quantization, "bfloat16")
    optimizer = torch.optim.AdamW(engine.parameters(), lr=0.01)
    losses = []
    for _ in range(6):
        loss, _ = gradients(engine, pack(rows()))
        optimizer.step()
        losses.append(float(loss))
    assert losses[-1] < 0.95 * losses[0]


@QUANTISED
def test_weights_in_several_files_are_those_of_one(quantization, tmp_path):
    one = save(tmp_path / "one", "qwen2", num_hidden_layers=3)
    AutoModelForCausalLM.from_pretrained(one.path).save_pretrained(tmp_path / "many", max_shard_size="20KB")
    many = Resolved(tmp_path / "many", "org/many", "path", None)
    a, b = (load_engine(settings(quantization=quantization), base).token_losses(pack(rows())) for base in (one, many))
    assert torch.equal(a, b)


@pytest.mark.parametrize("quantization", ["none", "fp8", NF4])
def test_rows_of_a_weight_are_whole_matrices_of_it(quantization):
    weight = allocator(quantization, torch.float32, torch.device("cpu"))([64, 32, 32], 48)
    for place in weight.places():
        place.put(torch.randn(place.shape, dtype=torch.float16))
    x, grad = torch.randn(5, 48), torch.randn(5, 64)
    assert torch.equal(weight[:64].dense(), weight.dense()[:64])
    assert torch.equal(weight[64:].dense(), weight.dense()[64:])
    assert torch.allclose(weight[64:].forward(x), weight.forward(x)[:, 64:], atol=1e-5)
    wide = torch.cat([torch.zeros(5, 64), grad], 1)
    assert relative(weight[64:].input_gradient(grad), weight.input_gradient(wide)) <= 1e-5
    with pytest.raises(AssertionError, match="cut through"):
        weight[:50].dense()


def test_fp8_weights_that_are_kept_transposed_too_are_the_same_weights():
    one, two = (allocator("fp8", torch.float32, torch.device("cpu"))([64, 32, 32], 48) for _ in range(2))
    two.keep_turned()
    for a, b in zip(one.places(), two.places(), strict=True):
        matrix = torch.randn(a.shape)
        a.put(matrix)
        b.put(matrix)
    assert torch.equal(one.dense(), two.dense())
    assert not one.turned and torch.equal(two.turned[0].float(), two.values.float().t())


def test_without_bitsandbytes_nf4_says_what_to_install_before_anything_is_read(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)  # as if it were not installed
    nothing = Resolved(tmp_path / "not there", "org/tiny", "path", None)
    for engine in ("auto", "decoder", "generic"):
        with pytest.raises(ConfigError, match=r"pip install 'lorikit\[quant\]'") as raised:
            load_engine(settings(quantization="nf4", engine=engine), nothing)
        assert "\n" not in str(raised.value)


@QUANTISED
@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"engine": "generic"}, "model.engine is generic"),
        ({"attn_implementation": "eager"}, "attn_implementation is set"),
    ],
)
def test_on_a_cpu_only_the_decoder_computes_with_quantised_weights(quantization, changes, said, tmp_path):
    with pytest.raises(ConfigError, match=said) as raised:
        load_engine(settings(quantization=quantization, **changes), save(tmp_path, "llama"))
    assert f"model.quantization {quantization}" in str(raised.value)


def test_a_gpu_that_cannot_multiply_8_bits_and_a_type_that_does_not_go_with_them_are_refused(monkeypatch):
    gpu = torch.device("cuda:0")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "an older GPU")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    with pytest.raises(ModelError, match=r"an older GPU has 8\.0.*nf4"):
        frozen.check("fp8", torch.bfloat16, gpu)
    with pytest.raises(ConfigError, match=r"model\.dtype is float16"):
        frozen.check("fp8", torch.float16, gpu)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 9))
    frozen.check("fp8", torch.bfloat16, gpu)
    frozen.check("fp8", torch.float32, torch.device("cpu"))


def test_widths_that_8_bit_products_do_not_take_are_named(tmp_path):
    config = ModelConfig(name_or_path="org/tiny", quantization="fp8")
    odd = save(tmp_path / "odd", "llama", hidden_size=24, intermediate_size=40)
    said = decoder_load.plan(config, odd, None, None, torch.device("cuda"))
    assert said == "fp8 needs multiples of 16, and it has hidden_size 24, intermediate_size 40"
    even = save(tmp_path / "even", "llama", hidden_size=32, intermediate_size=48)
    assert isinstance(decoder_load.plan(config, even, None, None, torch.device("cuda")), decoder_load.Plan)
    assert isinstance(decoder_load.plan(config, odd, None, None, torch.device("cpu")), decoder_load.Plan)
