"""Settings suggested from the data: possible ones, with a reason, for any set of rows."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lorikit.data.account import DataReport, Tokens, measure
from lorikit.data.suggest import suggest


def report(lengths, max_length=1024):
    empty = Tokens(0, 0, 0)
    return DataReport(
        files=[],
        num_rows=len(lengths),
        num_trained=len(lengths),
        held_out=[],
        dropped={},
        duplicates=[],
        truncated=[],
        leaks=[],
        control_text=[],
        lost_text=[],
        train_tokens=empty,
        held_out_tokens=empty,
        lengths=measure(lengths, max_length),
        max_length=max_length,
        on_long_row="drop",
        on_bad_row="error",
        notes=[],
        refusals=[],
        fingerprint="",
    )


def values(lengths):
    return {one.setting: one.value for one in suggest(report(lengths))}


@pytest.mark.parametrize(
    ("rows", "batch", "accumulation", "epochs"), [(10, 1, 1, 5), (250, 4, 3, 5), (3700, 4, 4, 1), (100_000, 4, 4, 1)]
)
def test_few_rows_take_small_steps_and_many_rows_few_epochs(rows, batch, accumulation, epochs):
    found = values([50] * rows)
    assert found["train.per_device_train_batch_size"] == batch
    assert found["train.gradient_accumulation_steps"] == accumulation
    assert found["train.num_train_epochs"] == epochs


def test_max_length_keeps_every_row_but_a_few_that_are_far_longer():
    assert values([40] * 99 + [70])["data.max_length"] == 96
    assert values([40] * 999 + [5000])["data.max_length"] == 64
    (first, *_) = suggest(report([40] * 999 + [5000]))
    assert "5,000" in first.reason


def test_nothing_is_suggested_without_rows():
    assert suggest(report([])) == []
    assert suggest(replace(report([5]), num_rows=0, num_trained=0)) == []


@settings(max_examples=50)
@given(st.lists(st.integers(1, 100_000), min_size=1, max_size=300))
def test_any_rows_get_values_that_training_takes(lengths):
    found = values(lengths)
    assert all(value >= 1 for value in found.values())
    kept = sum(length <= found["data.max_length"] for length in lengths)
    assert kept >= 0.99 * len(lengths) - 1
