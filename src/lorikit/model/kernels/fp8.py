"""Products with a frozen weight in 8-bit floating point: rows quantised on the way in, eight-bit tensor cores, no dense copy.

    s_t = max_i |x_ti| / 448,  q_ti = e4m3(x_ti / s_t)                    one scale a row of x, of W and of the gradient
    y_to = s_t s_o sum_i q_ti w_oi                                        W_oi = s_o w_oi, w in e4m3, s_o float32
    grad_x_ti = s_t' sum_o q'_to w_oi,  q', s' of the rows of g_to s_o    s_o stands inside the sum: it goes into g first

T tokens, O outputs, I inputs. Hopper multiplies eight-bit operands only with both laid out along the reduced dimension, so
w (O, I) serves y as it is and grad_x transposed. A second copy takes the memory that eight bits save: where that is short
(decoder_memory.py), w is transposed into a buffer that lives for one product. e4m3: 4 bits of exponent, 3 of mantissa, 448
the largest, no infinity.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lorikit.model.kernels.launch import Pointer, Value, block, constexpr, kernel, launch, runs_kernel, tl

FP8 = torch.float8_e4m3fn
LARGEST = 448.0
MULTIPLE = 16  # of outputs and inputs: what the eight-bit products of a GPU ask for
_LEAST = 2.0**-100  # rows below it become zeros: its scale and the inverse of that are normal float32 numbers
_HELD = 32768  # elements of a row that one program holds in registers; longer rows are read twice
_PART = 8192  # elements of such a row at a time
_TILE = 128  # rows and columns that one program transposes


def quantize_rows(x: Tensor, columns: Tensor | None = None, multiple: int = 1) -> tuple[Tensor, Tensor]:
    """x (T, I) -> e4m3 (T', I) and its scales (T', 1) float32; T' is T rounded up to `multiple`, with rows of zeros.

    Each row is first multiplied by `columns` (I,) float32 when given. NaN and infinity stay visible: as NaN in the row.
    Raises ValueError when shapes do not fit.
    """
    if x.dim() != 2 or (columns is not None and (columns.shape != x.shape[1:] or columns.dtype != torch.float32)):
        what = None if columns is None else (tuple(columns.shape), columns.dtype)
        raise ValueError(f"x {tuple(x.shape)} must be (T, I), and columns {what} (I,) float32")
    if not (runs_kernel(x, *([] if columns is None else [columns])) and x.stride(1) == 1):
        return quantize_rows_reference(x, columns, multiple)
    (tokens, width), rows = x.shape, -(-x.shape[0] // multiple) * multiple
    values = torch.empty((rows, width), dtype=FP8, device=x.device)
    scales = torch.empty((rows, 1), dtype=torch.float32, device=x.device)
    part = block(width) if width <= _HELD else _PART
    launch(
        _quantize_kernel,
        (rows,),
        x,
        x if columns is None else columns.contiguous(),
        values,
        scales,
        tokens,
        x.stride(0),
        WIDTH=width,
        PART=part,
        SCALED=columns is not None,
        num_warps=min(16, max(1, part // 512)),
    )
    return values, scales


def transpose(values: Tensor) -> Tensor:
    """(O, I) e4m3, contiguous -> (I, O), contiguous. Raises ValueError when it is something else."""
    if values.dim() != 2 or values.dtype != FP8 or not values.is_contiguous():
        raise ValueError(f"{tuple(values.shape)} {values.dtype} must be (O, I), {FP8} and contiguous")
    bits = values.view(torch.uint8)
    if not runs_kernel(bits, dtypes=(torch.uint8,)):
        return transpose_reference(values)
    rows, columns = bits.shape
    out = torch.empty((columns, rows), dtype=torch.uint8, device=bits.device)
    grid = ((columns + _TILE - 1) // _TILE, (rows + _TILE - 1) // _TILE)
    launch(_transpose_kernel, grid, bits, out, rows, columns, TILE=_TILE, num_warps=4)
    return out.view(FP8)


def fp8_product(x: Tensor, values: Tensor, scales: Tensor) -> Tensor:
    """x (T, I), values (O, I) e4m3, scales (O, 1) float32 -> x W^T (T, O) in x's dtype, W = scales values.

    On a GPU x is bfloat16 and O, I are multiples of 16. Raises ValueError when shapes do not fit.
    """
    _check(x, values, scales, width=values.shape[1])
    if not x.is_cuda:
        return fp8_product_reference(x, values, scales)
    rows, row_scales = quantize_rows(x, multiple=MULTIPLE)
    return _multiply(rows, row_scales, values, scales.t())[: x.shape[0]]


def fp8_input_gradient(grad: Tensor, values: Tensor, scales: Tensor, turned: Tensor | None = None) -> Tensor:
    """grad (T, O), values (O, I) e4m3, scales (O, 1) float32 -> grad W (T, I) in grad's dtype; else as `fp8_product`.

    `turned` (I, O): the values transposed, where they are kept so.
    """
    _check(grad, values, scales, width=values.shape[0])
    if not grad.is_cuda:
        return fp8_input_gradient_reference(grad, values, scales)
    rows, row_scales = quantize_rows(grad, scales[:, 0], multiple=MULTIPLE)
    ones = torch.ones((1, values.shape[1]), dtype=torch.float32, device=grad.device)
    return _multiply(rows, row_scales, transpose(values) if turned is None else turned, ones)[: grad.shape[0]]


def quantize_rows_reference(x: Tensor, columns: Tensor | None = None, multiple: int = 1) -> tuple[Tensor, Tensor]:
    """What the kernel computes, in torch."""
    wide = x.float() if columns is None else x.float() * columns
    wide = torch.nn.functional.pad(wide, (0, 0, 0, -len(x) % multiple))
    if not wide.numel():
        return wide.to(FP8), wide.new_ones(len(wide), 1)
    largest = wide.abs().amax(1, keepdim=True).clamp(min=_LEAST)
    most = largest.new_tensor(LARGEST)  # by a plain number a GPU multiplies with its rounded inverse
    return (wide * (most / largest)).to(FP8), largest / most


def transpose_reference(values: Tensor) -> Tensor:
    """What the kernel computes, in torch."""
    return values.view(torch.uint8).t().contiguous().view(FP8)


def fp8_product_reference(x: Tensor, values: Tensor, scales: Tensor) -> Tensor:
    """The same sum over the same quantised operands, in float32."""
    rows, row_scales = quantize_rows_reference(x)
    return (rows.float() @ values.float().t() * row_scales * scales.t()).to(x.dtype)


def fp8_input_gradient_reference(grad: Tensor, values: Tensor, scales: Tensor) -> Tensor:
    """The same sum over the same quantised operands, in float32."""
    rows, row_scales = quantize_rows_reference(grad, scales[:, 0])
    return (rows.float() @ values.float() * row_scales).to(grad.dtype)


def _check(x: Tensor, values: Tensor, scales: Tensor, width: int) -> None:
    if x.dim() != 2 or x.shape[1] != width or scales.shape != (values.shape[0], 1):
        raise ValueError(
            f"{tuple(x.shape)} must have {width} columns for values {tuple(values.shape)}, "
            f"and scales {tuple(scales.shape)} one row for each of theirs"
        )


def _multiply(rows: Tensor, row_scales: Tensor, weight: Tensor, column_scales: Tensor) -> Tensor:
    """rows (T, K) e4m3 times weight (N, K) e4m3, both along K -> (T, N) bfloat16; scales (T, 1) and (1, N)."""
    # use_fast_accum: sums stay in the registers of the tensor core, which keep fewer bits of them than float32 has.
    out: Tensor = torch._scaled_mm(
        rows, weight.t(), scale_a=row_scales, scale_b=column_scales, out_dtype=torch.bfloat16, use_fast_accum=True
    )
    return out


@kernel()
def _read_part(
    x_at: Pointer,
    columns_at: Pointer,
    start: Value,
    inside: Value,
    WIDTH: constexpr,
    PART: constexpr,
    SCALED: constexpr,
) -> Any:
    column = start + tl.arange(0, PART)
    inside &= column < WIDTH
    part = tl.load(x_at + column, mask=inside, other=0.0).to(tl.float32)
    if SCALED:
        part *= tl.load(columns_at + column, mask=inside, other=0.0)
    return part


@kernel("num_tokens")
def _quantize_kernel(
    x_at: Pointer,
    columns_at: Pointer,
    values_at: Pointer,
    scales_at: Pointer,
    num_tokens: Value,
    x_row: Value,
    WIDTH: constexpr,
    PART: constexpr,
    SCALED: constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    inside = row < num_tokens  # the rows that fill up are zeros
    x_at += row * x_row
    values_at += row * WIDTH
    part = _read_part(x_at, columns_at, 0, inside, WIDTH, PART, SCALED)
    largest = tl.max(tl.abs(part), axis=0)
    for start in range(PART, WIDTH, PART):
        more = _read_part(x_at, columns_at, start, inside, WIDTH, PART, SCALED)
        largest = tl.maximum(largest, tl.max(tl.abs(more), axis=0))
    largest = tl.maximum(largest, 7.888609052210118e-31)  # 2^-100
    tl.store(scales_at + row, tl.div_rn(largest, 448.0))
    factor = tl.div_rn(448.0, largest)
    column = tl.arange(0, PART)
    tl.store(values_at + column, (part * factor).to(values_at.dtype.element_ty), mask=column < WIDTH)
    for start in range(PART, WIDTH, PART):
        more = _read_part(x_at, columns_at, start, inside, WIDTH, PART, SCALED)
        column = start + tl.arange(0, PART)
        tl.store(values_at + column, (more * factor).to(values_at.dtype.element_ty), mask=column < WIDTH)


@kernel()
def _transpose_kernel(
    values_at: Pointer, out_at: Pointer, num_rows: Value, num_columns: Value, TILE: constexpr
) -> None:
    row = tl.program_id(1) * TILE + tl.arange(0, TILE)
    column = tl.program_id(0) * TILE + tl.arange(0, TILE)
    read = row[:, None].to(tl.int64) * num_columns + column[None, :]
    tile = tl.load(values_at + read, mask=(row[:, None] < num_rows) & (column[None, :] < num_columns), other=0)
    write = column[:, None].to(tl.int64) * num_rows + row[None, :]
    tl.store(out_at + write, tl.trans(tile), mask=(column[:, None] < num_columns) & (row[None, :] < num_rows))
