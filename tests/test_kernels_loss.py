"""Cross entropy of logits and its gradient in their place, against the formula in float64.

As tests/test_kernels.py: torch references here, the Triton kernels in their interpreter in a second process, and the
tests on a GPU take their checks from here.
"""

from __future__ import annotations

import importlib.util

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from interpreter import assert_passes_in_the_interpreter
from lorikit.data.values import IGNORE
from lorikit.model.kernels import cross_entropy as module
from lorikit.model.kernels.cross_entropy import cross_entropy, cross_entropy_gradient
from test_kernels import DTYPES, INTERPRETER, assert_close, fresh_numbers  # noqa: F401

ALL_TYPES = [torch.float32, torch.bfloat16, torch.float16]


def check_cross_entropy(rows, width, dtype, device="cpu", *, scale=3.0, ignored=0.3, strided=False):
    """`scale` of the logits; `ignored` the share of rows without a target; `strided` rows are not end to end."""
    wide = (scale * torch.randn(rows, width + 16, device=device)).to(dtype)
    logits = wide[:, 8 : width + 8] if strided else wide[:, :width].contiguous()
    targets = torch.randint(0, width, (rows,), device=device)
    targets[torch.rand(rows, device=device) < ignored] = IGNORE
    before, around = logits.clone(), wide.clone()
    leaf = logits.detach().double().requires_grad_()
    want = torch.nn.functional.cross_entropy(leaf, targets, reduction="none", ignore_index=IGNORE)
    (want_grad,) = torch.autograd.grad(want.sum(), leaf)
    size = max(1.0, before.abs().max().item())  # a loss is the small rest of large logits
    losses = cross_entropy(logits, targets)
    assert_close(losses, want.detach(), torch.float32, typical=size)
    assert torch.equal(logits, before), "without a gradient the logits are left as they are"
    assert_close(cross_entropy_gradient(logits, targets), want.detach(), torch.float32, typical=size)
    assert_close(logits, want_grad, dtype, typical=1.0)
    assert (losses[targets == IGNORE] == 0).all() and (logits[targets == IGNORE] == 0).all()
    if strided:
        assert torch.equal(wide[:, :8], around[:, :8]) and torch.equal(wide[:, width + 8 :], around[:, width + 8 :])


SHAPES = [(1, 1), (1, 8193), (7, 37), (5, 20000), (9, 8192)]


@DTYPES
@pytest.mark.parametrize(("rows", "width"), SHAPES)
@pytest.mark.parametrize("strided", [False, True])
def test_cross_entropy_and_its_gradient_are_the_formulas(rows, width, dtype, strided):
    check_cross_entropy(rows, width, dtype, strided=strided)


@DTYPES
def test_rows_that_count_for_nothing_have_neither_loss_nor_gradient(dtype):
    check_cross_entropy(6, 300, dtype, ignored=1.0)
    logits, targets = torch.full((2, 9000), torch.nan).to(dtype), torch.tensor([IGNORE, IGNORE])
    assert torch.equal(cross_entropy(logits, targets), torch.zeros(2))
    assert torch.equal(cross_entropy_gradient(logits, targets), torch.zeros(2))
    assert torch.equal(logits, torch.zeros(2, 9000).to(dtype))


@settings(max_examples=40)
@given(
    st.integers(1, 9),
    st.integers(1, 700) | st.integers(8000, 17000),
    st.sampled_from(ALL_TYPES),
    st.sampled_from([0.01, 1.0, 30.0, 1e4]),
    st.sampled_from([0.0, 0.5, 1.0]),
    st.booleans(),
)
def test_any_number_of_rows_columns_and_any_size_of_logits_is_taken(rows, width, dtype, scale, ignored, strided):
    scale = min(scale, 1e3) if dtype == torch.float16 else scale
    check_cross_entropy(rows, width, dtype, scale=scale, ignored=ignored, strided=strided)


@DTYPES
def test_blocks_of_any_size_join_to_the_same_row(dtype, monkeypatch):
    monkeypatch.setattr(module, "_BLOCK", 16)
    check_cross_entropy(5, 16 * 23 + 3, dtype)


def test_rows_far_below_and_far_above_zero_keep_their_digits():
    logits, targets = (
        torch.randn(4, 9001) + torch.tensor([[-1e4], [0.0], [1e4], [-3e38]]),
        torch.tensor([0, 1, 9000, 3]),
    )
    want = torch.nn.functional.cross_entropy(logits.double(), targets, reduction="none")
    assert_close(cross_entropy(logits[:3], targets[:3]), want[:3], torch.float32, typical=1e4)
    assert cross_entropy_gradient(logits, targets).isfinite().all() and logits.isfinite().all()


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_logits_that_are_no_numbers_give_a_loss_that_is_none(value):
    logits, targets = torch.randn(3, 8200), torch.tensor([1, 2, 3])
    logits[1, 8195] = value
    losses = cross_entropy_gradient(logits, targets)
    assert losses.isfinite().tolist() == [True, False, True]


def test_the_same_logits_give_the_same_bytes_and_other_rows_change_nothing():
    logits, targets = torch.randn(6, 9000).bfloat16(), torch.randint(0, 9000, (6,))
    results = []
    for rows in (slice(0, 6), slice(0, 6), slice(2, 5)):
        grads = logits[rows].clone()
        results.append((cross_entropy_gradient(grads, targets[rows]), grads))
    assert all(torch.equal(a, b) for a, b in zip(results[0], results[1], strict=True))
    assert all(torch.equal(a[2:5], b) for a, b in zip(results[0], results[2], strict=True))


def test_no_rows_have_no_losses():
    for function in (cross_entropy, cross_entropy_gradient):
        assert function(torch.ones(0, 8), torch.zeros(0, dtype=torch.int64)).shape == (0,)


@pytest.mark.parametrize("function", [cross_entropy, cross_entropy_gradient])
def test_targets_that_do_not_fit_are_refused(function):
    for targets in (torch.zeros(3, dtype=torch.int64), torch.zeros(2, dtype=torch.int32)):
        with pytest.raises(ValueError, match="must be"):
            function(torch.ones(2, 8), targets)


@pytest.mark.skipif(not INTERPRETER, reason="torch refuses such an index by itself")
def test_a_target_outside_the_vocabulary_makes_the_loss_nan():
    losses = cross_entropy(torch.ones(4, 8), torch.tensor([7, 8, -1, 0]))
    assert losses.isnan().tolist() == [False, True, True, False]


@pytest.mark.skipif(INTERPRETER, reason="this is the inner process")
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton, which also interprets on a CPU")
def test_the_triton_kernels_pass_these_tests_in_the_interpreter():
    assert_passes_in_the_interpreter(__file__)
