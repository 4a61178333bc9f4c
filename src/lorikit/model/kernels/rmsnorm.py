"""RMS normalisation with a frozen weight, alone and fused with the residual sum before it.

    y = weight * cast(x * r),  r = 1 / sqrt(mean(x^2) + eps)
    grad_x = r * (g - n * mean(g * n)),  g = weight * grad_y,  n = x * r

x (..., D); statistics in float32, the normalised x is cast back before the weight, as transformers' LlamaRMSNorm does.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lorikit.model.kernels.launch import Pointer, Value, block, constexpr, kernel, launch, runs_kernel, tl

_WIDEST = 32768  # elements of a row that one program holds


def rmsnorm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x (T, D) or (T, H, D), any strides but for a contiguous last dimension; weight (D,) in x's dtype -> y, contiguous.

    Raises ValueError when the weight does not fit.
    """
    _check(x, weight)
    if not _takes(x, weight):
        return rmsnorm_reference(x, weight, eps)
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _run(_forward_kernel, (x, weight, y, y, y), _layout(x), eps, add=False)
    return y


def add_rmsnorm(x: Tensor, delta: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x and delta (T, D), weight (D,) -> (x + delta, rmsnorm(x + delta)), both contiguous.

    Raises ValueError when shapes or dtypes do not fit.
    """
    _check(x, weight)
    if x.shape != delta.shape or x.dtype != delta.dtype or x.dim() != 2:
        raise ValueError(
            f"x {tuple(x.shape)} {x.dtype} and delta {tuple(delta.shape)} {delta.dtype} must be alike, (T, D)"
        )
    if not _takes(x, delta, weight):
        total = x + delta
        return total, rmsnorm_reference(total, weight, eps)
    total, y = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for _ in range(2))
    _run(_forward_kernel, (x, weight, delta.contiguous(), total, y), _layout(x), eps, add=True)
    return total, y


def rmsnorm_backward(grad_y: Tensor, x: Tensor, weight: Tensor, eps: float, plus: Tensor | None = None) -> Tensor:
    """grad_y and x (T, D) or (T, H, D) -> grad_x in x's dtype, contiguous; the statistics are computed again.

    `plus` (x's shape and dtype, contiguous last dimension) is added to it: the gradient that passes by the norm. Raises
    ValueError when shapes do not fit.
    """
    _check(x, weight)
    if grad_y.shape != x.shape or (plus is not None and (plus.shape != x.shape or plus.dtype != x.dtype)):
        raise ValueError(
            f"grad_y {tuple(grad_y.shape)} and plus must have x's shape {tuple(x.shape)}, plus its dtype too"
        )
    if not _takes(grad_y, x, weight) or (plus is not None and not _takes(plus)):
        grad_x = rmsnorm_backward_reference(grad_y, x, weight, eps)
        return grad_x if plus is None else grad_x.add_(plus)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    other = out if plus is None else plus
    strides = (*_layout(x), *_layout(grad_y)[1:], *_layout(other)[1:])
    _run(_backward_kernel, (x, weight, grad_y, other, out), strides, eps, add=plus is not None)
    return out


def rmsnorm_reference(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """What the kernel computes, in torch."""
    wide = x.float()
    return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)


def rmsnorm_backward_reference(grad_y: Tensor, x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """What the kernel computes, in torch."""
    wide, g = x.float(), grad_y.float() * weight.float()
    r = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    n = wide * r
    return (r * (g - n * (g * n).mean(-1, keepdim=True))).to(x.dtype)


def _check(x: Tensor, weight: Tensor) -> None:
    if x.dim() not in (2, 3) or weight.shape != x.shape[-1:] or weight.dtype != x.dtype:
        raise ValueError(
            f"x {tuple(x.shape)} {x.dtype} must be (T, D) or (T, H, D) and the weight {tuple(weight.shape)} "
            f"{weight.dtype} (D,) in the same dtype"
        )


def _takes(*tensors: Tensor) -> bool:
    return runs_kernel(*tensors) and all(t.stride(-1) == 1 and t.shape[-1] <= _WIDEST for t in tensors)


def _layout(x: Tensor) -> tuple[int, int, int]:
    """(rows in the middle dimension, stride of the first, stride of the middle)."""
    return (x.shape[1], x.stride(0), x.stride(1)) if x.dim() == 3 else (1, x.stride(0), 0)


def _run(function: Any, tensors: tuple[Tensor, ...], strides: tuple[int, ...], eps: float, *, add: bool) -> None:
    width = tensors[0].shape[-1]
    rows, columns = tensors[0].numel() // width, block(width)
    together = max(1, 4096 // columns)  # rows of one program: enough elements to keep its threads busy
    launch(
        function,
        ((rows + together - 1) // together,),
        *tensors,
        rows,
        eps,
        *strides,
        WIDTH=width,
        ROWS=together,
        COLUMNS=columns,
        ADD=add,
        num_warps=8 if columns <= 8192 else 16,
    )


@kernel()
def _offsets(row: Value, column: Value, heads: Value, outer: Value, inner: Value) -> Any:
    return (row // heads).to(tl.int64) * outer + (row % heads) * inner + column


@kernel("num_rows")
def _forward_kernel(
    x_at: Pointer,
    weight_at: Pointer,
    delta_at: Pointer,
    total_at: Pointer,
    y_at: Pointer,
    num_rows: Value,
    eps: Value,
    heads: Value,
    outer: Value,
    inner: Value,
    WIDTH: constexpr,
    ROWS: constexpr,
    COLUMNS: constexpr,
    ADD: constexpr,
) -> None:
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS))[:, None]
    column = tl.arange(0, COLUMNS)[None, :]
    inside = (row < num_rows) & (column < WIDTH)
    packed = row.to(tl.int64) * WIDTH + column
    x = tl.load(x_at + _offsets(row, column, heads, outer, inner), mask=inside, other=0.0)
    if ADD:
        x = (x.to(tl.float32) + tl.load(delta_at + packed, mask=inside, other=0.0).to(tl.float32)).to(x.dtype)
        tl.store(total_at + packed, x, mask=inside)
    wide = x.to(tl.float32)
    r = 1.0 / tl.sqrt(tl.sum(wide * wide, axis=1)[:, None] / WIDTH + eps)
    weight = tl.load(weight_at + column, mask=column < WIDTH, other=0.0).to(tl.float32)
    y = (wide * r).to(x.dtype).to(tl.float32) * weight
    tl.store(y_at + packed, y.to(x.dtype), mask=inside)


@kernel("num_rows")
def _backward_kernel(
    x_at: Pointer,
    weight_at: Pointer,
    grad_at: Pointer,
    plus_at: Pointer,
    out_at: Pointer,
    num_rows: Value,
    eps: Value,
    heads: Value,
    x_outer: Value,
    x_inner: Value,
    grad_outer: Value,
    grad_inner: Value,
    plus_outer: Value,
    plus_inner: Value,
    WIDTH: constexpr,
    ROWS: constexpr,
    COLUMNS: constexpr,
    ADD: constexpr,
) -> None:
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS))[:, None]
    column = tl.arange(0, COLUMNS)[None, :]
    inside = (row < num_rows) & (column < WIDTH)
    x = tl.load(x_at + _offsets(row, column, heads, x_outer, x_inner), mask=inside, other=0.0).to(tl.float32)
    g = tl.load(grad_at + _offsets(row, column, heads, grad_outer, grad_inner), mask=inside, other=0.0).to(tl.float32)
    g *= tl.load(weight_at + column, mask=column < WIDTH, other=0.0).to(tl.float32)
    r = 1.0 / tl.sqrt(tl.sum(x * x, axis=1)[:, None] / WIDTH + eps)
    n = x * r
    grad_x = r * (g - n * (tl.sum(g * n, axis=1)[:, None] / WIDTH))
    if ADD:
        plus = plus_at + _offsets(row, column, heads, plus_outer, plus_inner)
        grad_x += tl.load(plus, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_at + row.to(tl.int64) * WIDTH + column, grad_x.to(out_at.dtype.element_ty), mask=inside)
