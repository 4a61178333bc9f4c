"""Packing: nothing is lost, nothing is mixed, groups are few and fit."""

import math

import torch
from hypothesis import given
from hypothesis import strategies as st

from lorikit.data.pack import num_targets, pack, split_step, to_device
from lorikit.data.values import IGNORE, Example

row = st.lists(st.tuples(st.integers(0, 1000), st.booleans()), min_size=1, max_size=30)
row_lists = st.lists(row, min_size=1, max_size=20)


def examples(rows):
    return [
        Example([t for t, _ in row], [t if on else IGNORE for t, on in row], f"f:{k}") for k, row in enumerate(rows)
    ]


@given(row_lists)
def test_a_batch_holds_every_sequence_with_its_own_positions_and_shifted_targets(rows):
    made = examples(rows)
    batch = pack(made)
    cu = batch.cu_seqlens.tolist()
    assert batch.cu_seqlens.dtype == torch.int32
    assert batch.num_tokens == cu[-1] == sum(map(len, rows))
    assert batch.max_seqlen == max(map(len, rows))
    assert batch.num_targets == sum(map(num_targets, made)) == int((batch.targets != IGNORE).sum())
    for example, start, end in zip(made, cu, cu[1:], strict=False):
        assert batch.input_ids[start:end].tolist() == example.input_ids
        assert batch.targets[start:end].tolist() == [*example.labels[1:], IGNORE]
        assert batch.position_ids[start:end].tolist() == list(range(end - start))


@given(row_lists, st.integers(1, 80))
def test_a_step_is_cut_into_groups_that_fit_and_lose_no_row(rows, limit):
    made = examples(rows)
    groups = split_step(made, limit)
    assert sorted(e.source for group in groups for e in group) == sorted(e.source for e in made)
    for group in groups:
        assert len(group) == 1 or sum(len(e.input_ids) for e in group) <= limit
        assert [made.index(e) for e in group] == sorted(made.index(e) for e in group)
    assert groups == split_step(made, limit)


def test_rows_that_fit_into_one_forward_make_one_and_equal_rows_make_the_fewest():
    made = examples([[(1, True)] * 10] * 12)
    assert len(split_step(made, 120)) == 1
    for limit in (60, 40, 30, 10):
        assert len(split_step(made, limit)) == math.ceil(12 / (limit // 10))


def test_moving_a_batch_moves_its_tensors_and_keeps_its_counts():
    batch = pack(examples([[(1, True), (2, True)]]))
    moved = to_device(batch, torch.device("meta"))
    assert moved.input_ids.device.type == moved.cu_seqlens.device.type == "meta"
    assert (moved.max_seqlen, moved.num_targets) == (2, 1)
