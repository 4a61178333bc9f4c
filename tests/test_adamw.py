"""The optimizer: torch's AdamW and clipping, over parameters that lie apart and over one flat buffer."""

import pytest
import torch
from safetensors.torch import save_file

from lorikit.config import LoraSettings, TrainConfig
from lorikit.data.pack import pack
from lorikit.model.load import load_engine
from lorikit.model.lora import WEIGHTS, adapter_writer, save_adapter
from lorikit.train.adamw import FlatAdamW, TorchAdamW, make_optimizer
from lorikit.train.checkpoint import all_finite
from tiny_decoder import randomize_b, rows, save, settings
from tiny_engine import TinyEngine, tiny_rows

KINDS = pytest.mark.parametrize("kind", ["apart", "flat"])


def config(**changes):
    return TrainConfig(
        output_dir="run", adam_beta1=0.8, adam_beta2=0.95, adam_epsilon=1e-6, weight_decay=0.1, **changes
    )


def engine_and_rows(kind, tmp_path):
    if kind == "apart":
        return TinyEngine(dropout=0.0), tiny_rows(12)
    engine = load_engine(settings(), save(tmp_path / "model", "llama"), new_adapter=LoraSettings(r=4, lora_dropout=0.0))
    assert engine.name == "decoder"
    randomize_b(engine)
    return engine, rows(12)


def fill_gradient(engine, examples):
    engine.clear_gradient()
    engine.add_gradient(pack(examples))


def copied(engine):
    return {name: value.clone() for name, value in engine.adapter_state().items()}


@KINDS
@pytest.mark.parametrize("max_grad_norm", [0.0, 0.01, 1e6])
def test_steps_are_those_of_torch_on_the_mean_with_its_clipping(kind, max_grad_norm, tmp_path):
    engine, examples = engine_and_rows(kind, tmp_path)
    optimizer = make_optimizer(engine, config(max_grad_norm=max_grad_norm))
    assert isinstance(optimizer, FlatAdamW if kind == "flat" else TorchAdamW)
    copies = [p.detach().clone().requires_grad_() for p in engine.parameters()]
    plain = torch.optim.AdamW(copies, betas=(0.8, 0.95), eps=1e-6, weight_decay=0.1, foreach=False)
    for number in range(3):
        fill_gradient(engine, examples[4 * number : 4 * number + 4])
        for copy, parameter in zip(copies, engine.parameters(), strict=True):
            copy.grad = parameter.grad / 7
        want = torch.nn.utils.clip_grad_norm_(copies, max_grad_norm or float("inf"))
        rate = 1e-2 / (number + 1)
        for group in plain.param_groups:
            group["lr"] = rate
        plain.step()
        assert optimizer.step(rate, 7).item() == pytest.approx(want.item(), rel=1e-5)
        for parameter, copy in zip(engine.parameters(), copies, strict=True):
            torch.testing.assert_close(parameter, copy, rtol=1e-5, atol=1e-6)


@KINDS
def test_a_gradient_that_is_not_finite_changes_nothing(kind, tmp_path):
    engine, examples = engine_and_rows(kind, tmp_path)
    optimizer = make_optimizer(engine, config())
    fill_gradient(engine, examples[:4])
    optimizer.step(1e-2, 1)
    engine.parameters()[0].grad.view(-1)[0] = float("inf")
    before, state = [p.detach().clone() for p in engine.parameters()], optimizer.state()
    assert not optimizer.step(1e-2, 1).isfinite()
    assert all(torch.equal(p, old) for p, old in zip(engine.parameters(), before, strict=True))
    moments = [name for name in state if not name.startswith("step.")]
    assert all(torch.equal(optimizer.state()[name], state[name]) for name in moments)


@KINDS
def test_a_state_that_is_loaded_goes_on_to_the_same_bytes(kind, tmp_path):
    engine, examples = engine_and_rows(kind, tmp_path)
    optimizer = make_optimizer(engine, config())
    assert optimizer.state() == {}
    for part in (examples[:4], examples[4:8]):
        fill_gradient(engine, part)
        optimizer.step(1e-2, 5)
    state, adapter = optimizer.state(), copied(engine)
    assert {name.partition(".")[0] for name in state} == {"exp_avg", "exp_avg_sq", "step"}
    assert {name.partition(".")[2] for name in state} == set(engine.parameter_names())
    fill_gradient(engine, examples[8:])
    optimizer.step(1e-2, 5)
    want = copied(engine)
    engine.load_adapter_state(adapter)
    fresh = make_optimizer(engine, config())
    fresh.load_state(state)
    fill_gradient(engine, examples[8:])
    fresh.step(1e-2, 5)
    assert all(torch.equal(engine.adapter_state()[name], value) for name, value in want.items())


@KINDS
def test_what_was_copied_stays_as_it_was_and_is_saved_as_separate_tensors_are(kind, tmp_path):
    engine, examples = engine_and_rows(kind, tmp_path)
    optimizer = make_optimizer(engine, config())
    fill_gradient(engine, examples[:4])
    optimizer.step(1e-2, 5)
    state = optimizer.state() | engine.adapter_state()
    write = adapter_writer(engine, base_name="base", base_revision=None, card="card")
    save_file({name: value.clone() for name, value in state.items()}, tmp_path / "apart")
    save_adapter(tmp_path, engine, base_name="base", base_revision=None, card="card")
    adapter = (tmp_path / WEIGHTS).read_bytes()
    fill_gradient(engine, examples[4:])
    optimizer.step(1e-2, 5)
    save_file(state, tmp_path / "together")
    write(tmp_path)
    assert (tmp_path / "together").read_bytes() == (tmp_path / "apart").read_bytes()
    assert (tmp_path / WEIGHTS).read_bytes() == adapter
    save_adapter(tmp_path, engine, base_name="base", base_revision=None, card="card")
    assert (tmp_path / WEIGHTS).read_bytes() != adapter


@KINDS
def test_one_value_that_is_not_finite_anywhere_is_found(kind, tmp_path):
    engine, _ = engine_and_rows(kind, tmp_path)
    assert all_finite(engine)
    for parameter in (engine.parameters()[0], engine.parameters()[-1]):
        for value in ("nan", "inf", "-inf"):
            values = parameter.detach().view(-1)
            before = values[-1].item()
            values[-1] = float(value)
            assert not all_finite(engine)
            values[-1] = before
    assert all_finite(engine)


def test_the_state_of_one_kind_goes_on_in_the_other(tmp_path):
    engine, examples = engine_and_rows("flat", tmp_path)
    first = make_optimizer(engine, config())
    fill_gradient(engine, examples[:4])
    first.step(1e-2, 5)
    other = TorchAdamW(engine, config())
    other.load_state(first.state())
    start, results = copied(engine), []
    for optimizer in (first, other):
        engine.load_adapter_state(start)
        fill_gradient(engine, examples[4:8])
        optimizer.step(1e-2, 5)
        results.append(copied(engine))
    assert all(torch.allclose(results[0][name], results[1][name], rtol=1e-5, atol=1e-7) for name in start)
