import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.optim.lr_scheduler import LambdaLR

from lorikit.config import TrainConfig
from lorikit.data.values import IGNORE
from lorikit.errors import OutOfMemoryError
from lorikit.train.adamw import make_optimizer
from lorikit.train.optim import (
    Budget,
    compute_gradient,
    derived_seed,
    epoch_order,
    is_out_of_memory,
    plan_steps,
    prepare_step,
    take_step,
)
from tiny_engine import TinyEngine, tiny_rows


def config(**settings):
    return TrainConfig(output_dir="run", **settings)


def gradient_of(engine, rows, max_tokens=10_000, seed=7):
    """The result and the gradient of the mean."""
    budget = Budget(max_tokens, print)
    result = compute_gradient(engine, prepare_step(engine, rows, budget), budget, dropout_seed=seed)
    return result, [parameter.grad / result.num_targets for parameter in engine.parameters()]


def trained_a_little(engine):
    with torch.no_grad():
        engine.lora_b.copy_(torch.randn(engine.lora_b.shape, generator=torch.Generator().manual_seed(3)))
    return engine


@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant"])
@pytest.mark.parametrize(("num_steps", "warmup"), [(1, 0), (7, 0), (20, 5), (10, 10), (4, 9), (3, 1)])
def test_learning_rates_are_those_of_transformers_get_scheduler(schedule, num_steps, warmup):
    from transformers import get_scheduler

    plan = plan_steps(
        config(max_steps=num_steps, warmup_steps=warmup, lr_scheduler_type=schedule, learning_rate=3e-4), 50
    )
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=3e-4)
    name = "constant_with_warmup" if schedule == "constant" else schedule
    scheduler = get_scheduler(name, optimizer, num_warmup_steps=warmup, num_training_steps=num_steps)
    assert isinstance(scheduler, LambdaLR)
    for step in range(num_steps):
        assert plan.learning_rate(step) == pytest.approx(scheduler.get_last_lr()[0], rel=1e-12, abs=0)
        optimizer.step()
        scheduler.step()


@given(
    num_rows=st.integers(1, 200),
    batch=st.integers(1, 9),
    accumulation=st.integers(1, 9),
    epochs=st.one_of(st.integers(1, 4), st.floats(0.05, 4)),
)
@settings(max_examples=60, deadline=None)
def test_steps_are_counted_as_the_trainer_of_transformers_counts_them(num_rows, batch, accumulation, epochs):
    plan = plan_steps(
        config(per_device_train_batch_size=batch, gradient_accumulation_steps=accumulation, num_train_epochs=epochs),
        num_rows,
    )
    batches = math.ceil(num_rows / batch)
    per_epoch = max(batches // accumulation + int(batches % accumulation > 0), 1)
    assert (plan.steps_per_epoch, plan.num_steps) == (per_epoch, math.ceil(epochs * per_epoch))


@given(num_rows=st.integers(1, 60), batch=st.integers(1, 7), seed=st.integers(0, 2**63))
@settings(max_examples=40, deadline=None)
def test_every_epoch_takes_each_row_once_in_an_order_of_its_own(num_rows, batch, seed):
    plan = plan_steps(config(per_device_train_batch_size=batch, gradient_accumulation_steps=1, seed=seed), num_rows)
    epochs = [
        [row for step in range(plan.steps_per_epoch) for row in plan.rows(epoch * plan.steps_per_epoch + step)]
        for epoch in range(2)
    ]
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(num_rows))
    assert num_rows < 20 or epochs[0] != epochs[1]
    assert all(0 < len(plan.rows(step)) <= batch for step in range(plan.num_steps))


def test_max_steps_goes_before_epochs_and_a_warmup_ratio_is_rounded_up():
    plan = plan_steps(config(max_steps=101, num_train_epochs=1, warmup_ratio=0.03), 10)
    assert (plan.num_steps, plan.warmup_steps) == (101, 4)


def test_the_order_of_rows_does_not_depend_on_the_random_state():
    torch.manual_seed(1)
    first = epoch_order(30, 42, 1)
    torch.manual_seed(2)
    epoch_order.cache_clear()
    assert epoch_order(30, 42, 1) == first != epoch_order(30, 43, 1)


def test_seeds_of_steps_purposes_and_runs_differ():
    seeds = {derived_seed(s, purpose, n) for s in range(4) for purpose in ("order", "dropout") for n in range(50)}
    assert len(seeds) == 400 and all(0 <= seed < 2**63 for seed in seeds)


def test_the_gradient_is_that_of_the_mean_loss_over_all_labelled_tokens():
    engine, rows = trained_a_little(TinyEngine(dropout=0.0)), tiny_rows(9)
    result, grads = gradient_of(engine, rows)
    ids = torch.tensor([i for row in rows for i in row.input_ids[:-1]])
    targets = torch.tensor([label for row in rows for label in row.labels[1:]])
    loss = torch.nn.functional.cross_entropy(engine._logits(ids), targets, ignore_index=IGNORE)
    wanted = torch.autograd.grad(loss, engine.parameters())
    assert result.loss_sum.item() / result.num_targets == pytest.approx(loss.item(), rel=1e-6)
    for grad, want in zip(grads, wanted, strict=True):
        torch.testing.assert_close(grad, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("max_tokens", [1, 13, 40])
def test_the_gradient_does_not_depend_on_how_a_step_is_split_into_forwards(max_tokens):
    engine, rows = trained_a_little(TinyEngine(dropout=0.0)), tiny_rows(12)
    whole, wanted = gradient_of(engine, rows)
    split, grads = gradient_of(engine, rows, max_tokens=max_tokens)
    assert split.loss_sum.item() == pytest.approx(whole.loss_sum.item(), rel=1e-6)
    assert (split.num_targets, split.num_tokens) == (whole.num_targets, whole.num_tokens)
    for grad, want in zip(grads, wanted, strict=True):
        torch.testing.assert_close(grad, want, rtol=1e-5, atol=1e-6)


def test_dropout_of_a_step_depends_on_its_seed_and_on_nothing_before_it():
    engine, rows = trained_a_little(TinyEngine(dropout=0.5)), tiny_rows(6)
    engine.train()
    first, grads = gradient_of(engine, rows, seed=1)
    torch.rand(1000)
    again, same = gradient_of(engine, rows, seed=1)
    other, _ = gradient_of(engine, rows, seed=2)
    assert torch.equal(first.loss_sum, again.loss_sum) and other.loss_sum != first.loss_sum
    assert all(torch.equal(a, b) for a, b in zip(grads, same, strict=True))


def test_a_step_whose_loss_is_not_finite_says_so_and_changes_nothing():
    engine = trained_a_little(TinyEngine())
    with torch.no_grad():
        engine.lora_b[0, 0] = float("nan")
    before = [parameter.detach().clone() for parameter in engine.parameters()]
    result = take_step(
        engine,
        make_optimizer(engine, config()),
        tiny_rows(3),
        Budget(256, print),
        dropout_seed=1,
        learning_rate=1.0,
    )
    assert math.isnan(result.loss_sum) and math.isnan(result.norm)
    for parameter, old in zip(engine.parameters(), before, strict=True):
        torch.testing.assert_close(parameter, old, rtol=0, atol=0, equal_nan=True)


def test_rows_without_labels_are_a_bug_of_ours_not_a_step():
    rows = [type(row)(row.input_ids, [IGNORE] * len(row.input_ids), row.source) for row in tiny_rows(2)]
    with pytest.raises(AssertionError):
        gradient_of(TinyEngine(), rows)


class SmallMemory(TinyEngine):
    """Refuses a forward of more than `limit` tokens, as a full GPU does."""

    def __init__(self, limit, **kwargs):
        super().__init__(**kwargs)
        self.limit = limit

    def loss_sum(self, batch):
        if batch.num_tokens > self.limit:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return super().loss_sum(batch)


def test_a_step_that_runs_out_of_memory_is_done_again_in_halves_with_the_same_gradient():
    said = []
    rows = tiny_rows(12, longest=10)
    budget = Budget(256, said.append)
    engine = trained_a_little(SmallMemory(30, dropout=0.0))
    result = compute_gradient(engine, prepare_step(engine, rows, budget), budget, dropout_seed=1)
    _, wanted = gradient_of(trained_a_little(TinyEngine(dropout=0.0)), rows)
    assert budget.max_tokens < result.num_tokens
    assert said and all("out of memory" in line and str(budget.max_tokens) in said[-1] for line in said)
    for parameter, want in zip(engine.parameters(), wanted, strict=True):
        torch.testing.assert_close(parameter.grad / result.num_targets, want, rtol=1e-5, atol=1e-6)


def test_a_row_that_does_not_fit_alone_is_named():
    rows = tiny_rows(6)
    longest = max(rows, key=lambda row: len(row.input_ids))
    engine = SmallMemory(len(longest.input_ids) - 1)
    with pytest.raises(
        OutOfMemoryError, match=rf"tiny.json:\d+: one row of {len(longest.input_ids)} tokens.*max_length"
    ):
        take_step(engine, make_optimizer(engine, config()), rows, Budget(256, print), dropout_seed=1, learning_rate=0.1)


def test_other_runtime_errors_are_not_taken_for_a_lack_of_memory():
    class Broken(TinyEngine):
        def loss_sum(self, batch):
            raise RuntimeError("shapes do not match")

    with pytest.raises(RuntimeError, match="shapes"):
        gradient_of(Broken(), tiny_rows(2))
    assert is_out_of_memory(RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"))
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**58)
    assert is_out_of_memory(caught.value)
