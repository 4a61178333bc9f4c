"""Rows in 8-bit floating point and the products with them, against the format written out and sums in float64.

As tests/test_kernels.py: torch references here, the Triton kernels in their interpreter in a second process, and the
tests on a GPU take their checks from here.
"""

from __future__ import annotations

import importlib.util
import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from interpreter import assert_passes_in_the_interpreter
from lorikit.model.kernels.fp8 import (
    FP8,
    fp8_input_gradient,
    fp8_product,
    quantize_rows,
    quantize_rows_reference,
    transpose,
)
from test_kernels import DTYPES, INTERPRETER, assert_close, fresh_numbers  # noqa: F401


def decoded(values):
    """e4m3 by its definition: sign, 4 bits of exponent with bias 7, 3 of mantissa; exponent 0 is subnormal -> float64."""
    bits = values.view(torch.uint8).to(torch.int64)
    exponent, mantissa = (bits >> 3) & 15, (bits & 7).double()
    size = torch.where(exponent > 0, (1 + mantissa / 8) * 2.0 ** (exponent - 7), mantissa / 8 * 2.0**-6)
    size = torch.where((bits & 127) == 127, torch.nan, size)
    return torch.where(bits > 127, -size, size)


def representable(device="cpu"):
    """All finite values, in their order."""
    every = decoded(torch.arange(256, dtype=torch.uint8, device=device).view(FP8))
    return every[every.isfinite()].unique()


def check_rows(tokens, width, dtype, device="cpu", *, columns=False):
    """Scales are the largest element's share of 448, and every element the representable number nearest to it."""
    x = torch.randn(tokens, width + 8, device=device)[:, :width] * 10 ** random.uniform(-4, 4)
    x = (x * 10 ** torch.empty(tokens, 1, device=device).uniform_(-4, 0)).to(dtype)
    factors = torch.rand(width, device=device) / 100 if columns else None
    values, scales = quantize_rows(x, factors)
    assert (values.dtype, values.shape, scales.dtype, scales.shape) == (FP8, x.shape, torch.float32, (tokens, 1))
    exact = x.double() * (1 if factors is None else factors.double())
    want = exact.abs().amax(1, keepdim=True) / 448
    assert ((scales.double() - want).abs() <= 1e-6 * want).all()
    grid, wanted = representable(device), exact / scales.double()
    above = torch.searchsorted(grid, wanted.contiguous()).clamp(1, len(grid) - 1)
    nearest = torch.minimum((wanted - grid[above - 1]).abs(), (wanted - grid[above]).abs())
    off = (decoded(values) - wanted).abs() - nearest
    if INTERPRETER:  # it forgets to carry into the exponent, which a GPU does not: numbers just below a power of two
        fraction = torch.frexp(wanted.abs())[0]
        off = torch.where((fraction > 15.4 / 16) | (wanted.abs() < 2.0**-5), 0, off)
    assert (off <= 1e-6 * wanted.abs() + 1e-9).all()


def check_products(tokens, outputs, inputs, dtype, device="cpu"):
    """The sums are those of the quantised operands. Each is off by up to 1/16, all together, by chance, by some 4 %."""
    weight = torch.randn(outputs, inputs, device=device) * torch.rand(outputs, 1, device=device)
    values, scales = quantize_rows(weight)
    dense = decoded(values) * scales.double()
    for product, operand, other in (
        (fp8_product, torch.randn(tokens, inputs, device=device).to(dtype), dense.t()),
        (fp8_input_gradient, torch.randn(tokens, outputs, device=device).to(dtype), dense),
    ):
        got = product(operand, values, scales)
        folded = scales[:, 0] if product is fp8_input_gradient else None
        rows, row_scales = quantize_rows_reference(operand, folded)
        unscaled = decoded(values) if folded is not None else other
        assert_close(got, decoded(rows) * row_scales.double() @ unscaled, dtype)
        full = weight.double().t() if folded is None else weight.double()
        error = (got.double() - operand.double() @ full).abs()
        assert (error <= 0.15 * (operand.double().abs() @ full.abs())).all()
        assert error.numel() < 1000 or error.norm() <= 0.05 * (operand.double() @ full).norm()


SIZES = [(1, 1), (3, 40), (5, 576), (2, 33000)]


@DTYPES
@pytest.mark.parametrize(("tokens", "width"), SIZES)
@pytest.mark.parametrize("columns", [False, True])
def test_every_element_becomes_the_nearest_number_at_its_rows_scale(tokens, width, columns, dtype):
    check_rows(tokens, width, dtype, columns=columns)


@pytest.mark.parametrize("tokens", [0, 1, 16, 17])
def test_rows_are_filled_up_with_zeros(tokens):
    values, scales = quantize_rows(torch.randn(tokens, 40), multiple=16)
    assert values.shape == (-(-tokens // 16) * 16, 40) and scales.shape == (len(values), 1)
    assert (decoded(values[tokens:]) == 0).all() and (scales > 0).all()


def check_extremes(device="cpu"):
    x = [[0.0, 0.0], [1e-44, 0.0], [1e-38, -1e-38], [3e38, 1.0], [1.0, float("nan")], [float("inf"), 1.0]]
    values, scales = quantize_rows(torch.tensor(x, device=device))
    back = decoded(values) * scales.double()
    assert (back[:3].abs() <= 1e-37).all()
    assert back[3, 0].item() == pytest.approx(3e38, rel=1e-6)
    assert INTERPRETER or back[4:].isnan().any(1).all(), "only the interpreter makes a number of NaN"


def test_rows_of_zeros_and_of_the_smallest_numbers_stay_finite_and_nan_and_infinity_stay_visible():
    check_extremes()


@pytest.mark.parametrize("shape", [(1, 1), (3, 40), (128, 128), (130, 257)])
def test_the_transposed_bytes_are_the_bytes(shape):
    values = torch.randint(0, 256, shape, dtype=torch.uint8).view(FP8)
    turned = transpose(values)
    assert turned.is_contiguous()
    assert torch.equal(turned.view(torch.uint8), values.view(torch.uint8).t())


@DTYPES
@pytest.mark.parametrize("sizes", [(1, 16, 16), (7, 96, 64), (33, 48, 160)])
@pytest.mark.skipif(INTERPRETER, reason="the products are a library's, on a GPU")
def test_products_are_those_of_the_quantised_operands(sizes, dtype):
    check_products(*sizes, dtype)


@pytest.mark.skipif(INTERPRETER, reason="thousands of rows")
@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=9))
def test_no_element_is_off_by_more_than_half_a_step(numbers):
    x = torch.tensor([numbers])
    values, scales = quantize_rows(x)
    error, scale = (decoded(values) * scales.double() - x.double()).abs(), scales.double()
    assert (error <= torch.maximum(x.double().abs() / 16, scale * 2.0**-10) * 1.00001 + 2.0**-100).all()


REFUSED = {
    "a vector": lambda: quantize_rows(torch.ones(3)),
    "columns too few": lambda: quantize_rows(torch.ones(2, 3), torch.ones(2)),
    "columns of another type": lambda: quantize_rows(torch.ones(2, 3), torch.ones(3).bfloat16()),
    "floats to transpose": lambda: transpose(torch.ones(2, 3)),
    "a view to transpose": lambda: transpose(torch.ones(2, 3).to(FP8).t()),
    "x of another width": lambda: fp8_product(torch.ones(2, 4), torch.ones(5, 3).to(FP8), torch.ones(5, 1)),
    "a gradient of another width": lambda: fp8_input_gradient(
        torch.ones(2, 3), torch.ones(5, 3).to(FP8), torch.ones(5, 1)
    ),
    "scales for another weight": lambda: fp8_product(torch.ones(2, 3), torch.ones(5, 3).to(FP8), torch.ones(1, 5)),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_does_not_fit_is_refused(what):
    with pytest.raises(ValueError, match="must"):
        REFUSED[what]()


@pytest.mark.skipif(INTERPRETER, reason="this is the inner process")
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton, which also interprets on a CPU")
def test_the_triton_kernels_pass_these_tests_in_the_interpreter():
    assert_passes_in_the_interpreter(__file__)
