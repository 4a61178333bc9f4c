"""Memory and time of a run, predicted: held to what torch allocates here, and to what an H100 was measured at."""

import json
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import Gemma2Config, MixtralConfig

import tiny_decoder as tiny
from hollow_model import LLAMA3_8B, save_hollow
from lorikit.config import LoraSettings, load_config
from lorikit.data.pack import pack
from lorikit.data.values import IGNORE, Example
from lorikit.errors import ConfigError
from lorikit.hub import Resolved
from lorikit.model.decoder_config import LINEAR, decoder_shape
from lorikit.model.decoder_memory import Keep
from lorikit.model.load import load_engine
from lorikit.train import cost_decoder, cost_generic
from lorikit.train.advice import advice, gib, seconds
from lorikit.train.cost import (
    GIB,
    GPUS,
    Forward,
    Ledger,
    Row,
    Stored,
    attended_pairs,
    cut_forward_of,
    forward_of,
    known_gpu,
    row_of,
    step_seconds,
)
from lorikit.train.live import LiveBytes
from lorikit.train.plan_costs import choose_target, costs_of
from lorikit.train.predict import predict

SIZES = {"hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 4}
SHAPE = decoder_shape(LLAMA3_8B)
ROWS = tiny.rows(12, longest=60)


def peak_of(engine, batch):
    engine.add_gradient(batch)  # tables and the gradient's buffers are there afterwards, as in every later step
    engine.clear_gradient()
    with LiveBytes() as live:
        engine.add_gradient(batch)
    return live.peak


def decoder_cost(engine, keep):
    shape, adapter = engine.shape, engine.adapter
    modules = tuple(frozenset(s.name for s in adapter.slots if s.layer == n) for n in range(shape.layers))
    levels = (keep,) * shape.layers
    return cost_decoder.DecoderCost(shape, modules, adapter.rank, adapter.dropout, levels, 4, 4, False, Stored(4))


@pytest.mark.parametrize("keep", [Keep.INPUT, Keep.PRODUCTS, Keep.GATE_UP, Keep.ALL])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize(
    ("family", "targets", "changes"),
    [
        ("llama", "all-linear", {}),
        ("llama", ["q_proj", "v_proj"], {"num_hidden_layers": 9, "heads": 2}),
        ("llama", ["down_proj"], {}),
        ("llama", r".*\.[23]\..*(up|o)_proj", {}),
        ("qwen2", "all-linear", {"vocab_size": 3000}),
        ("qwen3", "all-linear", {}),
    ],
)
def test_the_decoder_takes_the_memory_that_its_replay_says(tmp_path, family, targets, changes, dropout, keep):
    base = tiny.save(tmp_path, family, **SIZES | changes)
    lora = LoraSettings(r=4, lora_dropout=dropout, target_modules=targets)
    engine = load_engine(tiny.settings(engine="decoder"), base, new_adapter=lora)
    engine.highest = keep
    engine.train()
    ledger, forward = Ledger(), cut_forward_of([row_of(row) for row in ROWS])
    kept = cost_decoder.training(decoder_cost(engine, keep), forward, ledger)
    assert ledger.peak == pytest.approx(peak_of(engine, pack(ROWS)), rel=0.1)
    assert ledger.total == 0 and not any(ledger.held.values())
    assert sum(kept) == ledger.at_peak["activations"] or sum(kept) > ledger.at_peak["activations"] > 0
    engine.train(False)
    with LiveBytes() as live:
        engine.token_losses(pack(ROWS))
    cost_decoder.evaluation(decoder_cost(engine, keep), forward, evaluated := Ledger())
    assert evaluated.peak == pytest.approx(live.peak, rel=0.1)


@pytest.mark.parametrize("checkpoint", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize(
    ("family", "targets", "changes"),
    [
        ("llama", "all-linear", {}),
        ("qwen3", ["q_proj", "v_proj"], {}),
        ("qwen2", "all-linear", {"vocab_size": 3000}),
        ("mistral", "all-linear", {}),
    ],
)
def test_the_generic_engine_takes_the_memory_that_its_model_without_values_says(
    tmp_path, family, targets, changes, dropout, checkpoint
):
    base = tiny.save(tmp_path, family, **SIZES | changes)
    model, lora = tiny.settings(engine="generic"), LoraSettings(r=4, lora_dropout=dropout, target_modules=targets)
    engine = load_engine(model, base, new_adapter=lora, gradient_checkpointing=checkpoint)
    assert engine.isolation == "packed"
    bare, wrapped = cost_generic.build(model, tmp_path, torch.float32, lora, checkpoint=checkpoint, kernels=False)
    assert {p.device.type for p in wrapped.parameters()} == {"meta"}
    forward = forward_of([row_of(row) for row in ROWS])
    engine.train()
    cost_generic.run(bare, wrapped, forward, ledger := Ledger(), training=True, kernels=False)
    assert ledger.peak == pytest.approx(peak_of(engine, pack(ROWS)), rel=0.05)
    engine.train(False)
    with LiveBytes() as live:
        engine.token_losses(pack(ROWS))
    cost_generic.run(bare, wrapped, forward, evaluated := Ledger(), training=False, kernels=False)
    assert evaluated.peak == pytest.approx(live.peak, rel=0.05)


@pytest.mark.parametrize("engine", ["decoder", "generic"])
@pytest.mark.parametrize("family", ["llama with biases", "qwen2", "qwen3 with biases"])
def test_weights_and_adapter_are_counted_to_the_byte(tmp_path, engine, family):
    base = tiny.save(tmp_path, family)
    config = a_run(engine=engine)
    loaded = load_engine(config.model, base, new_adapter=config.lora)
    costs = costs_of(config, base, choose_target(config.model, None, None, seconds=0.01))
    trained = sum(p.numel() for p in loaded.parameters())
    assert sum(costs.by_target.values()) == trained
    assert costs.static["adapter"] == trained * (16 if engine == "decoder" else 12)
    if engine == "decoder":
        w = loaded.weights
        tensors = [w.embed, w.norm, *(t for layer in w.layers for t in tensors_of(layer))]
        tensors += [] if w.head is w.embed else [w.head]
    else:
        tensors = [p for p in loaded.model.parameters() if not p.requires_grad] + list(loaded.model.buffers())
    assert costs.static["weights"] == sum(t.numel() * t.element_size() for t in tensors)


def tensors_of(layer):
    values = [value for name in layer.__slots__ if (value := getattr(layer, name)) is not None]
    return [value if isinstance(value, torch.Tensor) else value.weight for value in values]


def a_run(**model):
    return load_config(
        model={"name_or_path": "org/tiny", "device": "cpu", **model},
        data={"train": "none"},
        train={"output_dir": "none"},
    )


def on_h100(keep, linear=None):
    everything = (frozenset(LINEAR),) * 32
    return cost_decoder.DecoderCost(SHAPE, everything, 8, 0.1, (keep,) * 32, 2, 2, True, linear or Stored(2))


def whole(cost, forward):
    ledger = Ledger(GPUS["h100"])
    for part, size in cost_decoder.static_bytes(cost).items():
        ledger.take(part, size)
    cost_decoder.training(cost, forward, ledger)
    return ledger


def test_the_decoder_on_an_h100_is_predicted_as_it_was_measured():
    """benchmarks/results/train_h100.jsonl, the long rows train_h200.jsonl, whose memory holds all that layers can keep."""
    lengths = (65,) * 18 + (64,) + (0,) * 13  # its largest bucket, 1,234 tokens in 1,280
    tutorial = whole(on_h100(Keep.ALL), Forward((*lengths, 46), (*lengths, 46), 768, bucket=True))
    assert tutorial.peak / GIB == pytest.approx(20.98, rel=0.1)
    mean = (64,) * 16
    typical = whole(on_h100(Keep.ALL), Forward(mean, mean, 512, bucket=True))
    assert step_seconds(typical, graph=True) == pytest.approx(0.058, rel=0.15)
    long = whole(on_h100(Keep.ALL), Forward((4095,) * 4, (2048,) * 4, 8192))
    assert long.peak / GIB == pytest.approx(84.0, rel=0.1)
    assert 16384 / step_seconds(long, graph=False) == pytest.approx(15536, rel=0.15)


@pytest.mark.parametrize(("checkpoint", "peak", "ms"), [(False, 28.13, 284.7), (True, 16.39, 591.1)])
def test_the_generic_engine_on_an_h100_is_predicted_as_it_was_measured(tmp_path, checkpoint, peak, ms):
    """benchmarks/results/train_h100.json; the largest step had 1,219 tokens, 463 of them labelled."""
    (tmp_path / "config.json").write_text(json.dumps(LLAMA3_8B))
    options = {"checkpoint": checkpoint, "kernels": True}
    bare, wrapped = cost_generic.build(
        tiny.settings(engine="generic"), tmp_path, torch.bfloat16, LoraSettings(), **options
    )
    ledger, lengths = Ledger(GPUS["h100"]), (76,) * 16 + (3,)
    for part, size in cost_generic.static_bytes(bare, wrapped).items():
        ledger.take(part, size)
    cost_generic.run(bare, wrapped, Forward(lengths, lengths, 463), ledger, training=True, kernels=True)
    assert ledger.peak / GIB == pytest.approx(peak, rel=0.1)
    assert step_seconds(ledger, graph=False) * 1000 == pytest.approx(ms, rel=0.2)


def test_fewer_bits_a_weight_take_less_memory_by_just_that():
    linear = SHAPE.layers * sum(rows * columns for rows, columns in map(SHAPE.linear, LINEAR))
    plain, fp8 = (cost_decoder.static_bytes(on_h100(Keep.ALL, s)) for s in (None, Stored(1, 4)))
    rows = SHAPE.layers * sum(SHAPE.linear(name)[0] for name in LINEAR)
    assert plain["weights"] - fp8["weights"] == linear - 4 * rows
    assert fp8["adapter"] == plain["adapter"]


def test_a_level_that_keeps_less_needs_less_memory_and_more_time():
    forward = Forward((4095,) * 4, (2048,) * 4, 8192)
    ledgers = [whole(on_h100(keep), forward) for keep in (Keep.ALL, Keep.GATE_UP, Keep.PRODUCTS, Keep.INPUT, Keep.HOST)]
    assert [x.peak for x in ledgers] == sorted((x.peak for x in ledgers), reverse=True)
    assert [x.flops for x in ledgers] == sorted(x.flops for x in ledgers)
    mixed = replace(on_h100(Keep.ALL), keep=(Keep.INPUT,) * 16 + (Keep.ALL,) * 16)
    assert ledgers[3].peak < whole(mixed, forward).peak < ledgers[0].peak


LENGTHS = st.lists(st.integers(1, 300), min_size=1, max_size=6)


@settings(max_examples=40)
@given(LENGTHS, st.integers(1, 60), st.sampled_from(list(Keep)))
def test_a_longer_row_with_as_many_labels_never_needs_less(lengths, more, keep):
    def peak(sizes):  # more labels can need less, where they are cut into one chunk of logits more
        forward = Forward(tuple(sizes), tuple(sizes), len(sizes))
        ledger = Ledger()
        cost_decoder.training(on_h100(keep), forward, ledger)
        assert ledger.total == 0
        return ledger.peak

    assert peak(lengths) <= peak([*lengths[:-1], lengths[-1] + more])


@given(st.lists(st.tuples(st.integers(1, 40), st.integers(0, 39)), min_size=1, max_size=4), st.integers(0, 12))
def test_pairs_of_query_and_key_are_those_that_a_mask_would_leave(rows, window):
    lengths = tuple(length for length, _ in rows)
    asking = tuple(length - skipped % length for length, skipped in rows)
    wanted = sum(
        min(query + 1, window or query + 1)
        for length, queries in zip(lengths, asking, strict=True)
        for query in range(length - queries, length)
    )
    assert attended_pairs(Forward(lengths, asking, 1), window, last=True, tile=1) == wanted
    assert attended_pairs(Forward(lengths, asking, 1), window, last=True, tile=16) >= wanted


@given(st.lists(st.booleans(), min_size=1, max_size=12))
def test_a_row_is_measured_from_its_first_label_to_its_last(labelled):
    example = Example(list(range(len(labelled))), [k if yes else IGNORE for k, yes in enumerate(labelled)], "row")
    targets = [k for k, yes in enumerate(labelled[1:]) if yes]
    wanted = Row(len(labelled), targets[0], targets[-1] + 1, len(targets)) if targets else Row(len(labelled), 0, 0, 0)
    assert row_of(example) == wanted


def examples(count, length):
    return [
        Example([5] * length, [IGNORE] * (length // 2) + [5] * (length - length // 2), f"r:{k}") for k in range(count)
    ]


class NoTokenizer:
    def save_pretrained(self, folder):
        return None


@pytest.fixture(scope="module")
def llama3(tmp_path_factory):
    folder = save_hollow(tmp_path_factory.mktemp("llama3"), LLAMA3_8B, NoTokenizer())
    return Resolved(folder, "org/llama3", "path", None)


@pytest.fixture(scope="module")
def four_layers(tmp_path_factory):
    config = LLAMA3_8B | {"num_hidden_layers": 4, "hidden_size": 1024, "intermediate_size": 4096}
    folder = save_hollow(tmp_path_factory.mktemp("four"), config, NoTokenizer())
    return Resolved(folder, "org/four", "path", None)


def planned(base, flags, gpu, rows, memory=None):
    config = load_config(
        flags=flags, model={"name_or_path": "llama3"}, data={"train": "none"}, train={"output_dir": "none"}
    )
    target = choose_target(config.model, gpu, memory)
    costs = costs_of(config, base, target)
    predicted = predict(config, "llama3", costs, target, rows, [])
    return predicted, advice(config, base, target, costs, predicted, rows, [])


def test_eight_billion_parameters_are_planned_without_a_weight_read(llama3):
    predicted, words = planned(llama3, [], "h100", examples(64, 64))
    assert (predicted.engine, predicted.fits, words) == ("decoder", True, [])
    assert predicted.base_parameters == 8030261248
    assert sum(predicted.by_target.values()) == 20971520
    assert 15 * GIB < predicted.memory.peak < 24 * GIB
    assert predicted.steps.count == 12 and predicted.steps.tokens_mean == 1024
    assert json.loads(json.dumps(predicted.to_dict()))["time"]["num_graphs"] == 1


def test_advice_names_a_forward_that_fits(four_layers):
    rows = examples(16, 2000)
    predicted, words = planned(four_layers, ["--model.engine", "generic"], None, rows, 12)
    assert predicted.fits is False
    limit = words[0].split()[1]
    assert words[0].startswith("train.max_tokens_per_forward: ")
    mended, _ = planned(
        four_layers, ["--model.engine", "generic", "--train.max_tokens_per_forward", limit], None, rows, 12
    )
    assert mended.fits is True and gib(mended.memory.needed) in words[0]


def test_advice_for_weights_that_are_too_large_says_so(llama3):
    _, words = planned(llama3, ["--model.engine", "decoder"], "rtx4090", examples(4, 100), memory=4)
    assert "one row of 100 tokens alone needs" in words[0]
    assert "the frozen weights alone take 5.6 GiB" in words[-1] and "nf4" in words[-2]  # with one dense matrix


@pytest.mark.parametrize(
    ("gpu", "memory", "kind"), [("rtx4090", 10, "fp8"), ("a100", 10, "nf4"), ("rtx4090", 8, "nf4")]
)
def test_advice_for_weights_that_are_too_large_offers_fewer_bits_that_the_gpu_can_compute_with(
    llama3, gpu, memory, kind
):
    rows = examples(4, 100)
    _, words = planned(llama3, [], gpu, rows, memory=memory)
    assert f"model.quantization: {kind} fits" in words[-1]
    assert gpu != "a100" or not any("fp8" in word for word in words)
    flags = ["--train.gradient_checkpointing", "true", "--model.quantization", kind]
    mended, _ = planned(llama3, flags, gpu, rows, memory=memory)
    assert mended.fits is True and gib(mended.memory.needed) in words[-1]


def test_advice_offers_to_keep_activations_where_they_fit(llama3):
    _, words = planned(llama3, ["--train.gradient_checkpointing", "true"], "h100", examples(16, 64))
    assert len(words) == 1 and words[0].startswith("train.gradient_checkpointing: false fits too")
    assert "a step instead of" in words[0]


def test_less_memory_makes_the_decoder_keep_less(llama3):
    rows = examples(8, 2000)
    large, _ = planned(llama3, [], "h100", rows)
    small, _ = planned(llama3, [], "h100", rows, memory=24)
    assert large.fits and small.fits
    assert sum(small.memory.by_layer) < sum(large.memory.by_layer)
    assert small.time.step > large.time.step


@pytest.mark.parametrize(
    ("name", "known"),
    [
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA A100-SXM4-40GB", "a100-40"),
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("A100-40", "a100-40"),
        ("NVIDIA GeForce RTX 4090", "rtx4090"),
        ("rtx3090", "rtx3090"),
        ("Tesla T4", None),
    ],
)
def test_a_gpu_is_known_as_its_driver_calls_it(name, known):
    assert known_gpu(name) is (GPUS[known] if known else None)


@pytest.mark.parametrize(("gpu", "memory"), [("voodoo2", None), (None, 0.0), (None, -3.0), (None, float("nan"))])
def test_a_machine_that_is_none_is_refused(gpu, memory):
    with pytest.raises(ConfigError, match=r"--gpu is 'voodoo2'|--memory-gib is"):
        choose_target(a_run().model, gpu, memory)


def test_figures_are_said_in_the_unit_that_fits():
    assert [gib(x) for x in (0.5 * 2**20, 300 * 2**20, 1.5 * GIB)] == ["0.5 MiB", "300 MiB", "1.5 GiB"]
    said = [seconds(x) for x in (0.0021, 0.082, 3.21, 99, 600, 8000)]
    assert said == ["2.1 ms", "82 ms", "3.2 s", "99 s", "10 min", "2.2 h"]


SMALL = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
SMALL |= {"num_attention_heads": 4, "num_key_value_heads": 2}


@pytest.mark.parametrize(
    "config",
    [MixtralConfig(**SMALL, num_local_experts=4, num_experts_per_tok=2), Gemma2Config(**SMALL, head_dim=8)],
    ids=["experts", "soft caps"],
)
def test_a_model_that_is_not_modelled_gets_its_weights_counted_and_no_prediction(tmp_path, config):
    config.save_pretrained(tmp_path)
    base = Resolved(tmp_path, "org/other", "path", None)
    run = a_run(engine="generic")
    target = choose_target(run.model, None, None, seconds=0.01)
    predicted = predict(run, "other", costs_of(run, base, target), target, examples(4, 12), [])
    assert predicted.memory is None and predicted.time is None and predicted.fits is None
    assert predicted.base_parameters > 0 and predicted.steps.count == 3
    assert "cannot be predicted" in predicted.notes[-1]
