"""LoRA where each row has its own adapter, and the product of a single row with a frozen weight and its adapter.

    z_b = x_b A_n^T        y_b[columns of m] += scale_n z_b[m R : (m + 1) R] B_n[columns of m]^T        n = adapters[b]

N adapters are stacked, all with the largest rank (rows and columns of zeros fill the others): a (N, M R, I) of the M modules
that read one x, b (N, O, R) of the outputs of all of them side by side, module m from starts[m] on, scales (N,). Row 0 of the
stack is the base's and never read. One row (B = 1) is limited by how fast W is read: `one_row` streams it with every
multiprocessor and adds bias and adapter before its result is rounded.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lorikit.model.kernels.launch import Pointer, Value, block, constexpr, kernel, launch, runs_kernel, tl

MAX_MODULES = 3
_SHARE = 256  # inputs that one program of A multiplies
_TILE = 8192  # elements of a tile of A
# Of W in one tile of `one_row`: a warp for each row reads 0.9 of what the memory of an H100 gives, taller tiles 0.75.
_ROWS, _INPUTS, _WARPS = 1, 1024, 1


@dataclass(frozen=True, slots=True)
class Stack:
    """The adapters of one product, as above; `starts` (M,)."""

    a: Tensor
    b: Tensor
    scales: Tensor
    starts: tuple[int, ...]

    @property
    def rank(self) -> int:
        """R."""
        return self.b.shape[2]


def add_row_lora(y: Tensor, x: Tensor, stack: Stack, adapters: Tensor) -> Tensor:
    """y (B, O), x (B, I), adapters (B,) int64 -> y + the adapter of each row, in place."""
    if not _takes(y, x, stack.a, stack.b):
        return add_row_lora_reference(y, x, stack, adapters)
    (rows, outputs), rank = y.shape, stack.rank
    parts = _inner(x, stack, adapters)
    columns = max(32, 4096 // block(rank, 1))
    launch(
        _outer_kernel,
        (rows, (outputs + columns - 1) // columns),
        y,
        parts,
        stack.b,
        stack.scales,
        adapters,
        y.stride(0),
        outputs,
        *_edges(stack, outputs),
        **_sizes(stack, parts),
        COLUMNS=columns,
        num_warps=4,
    )
    return y


def one_row(x: Tensor, weight: Tensor, bias: Tensor | None, stack: Stack | None, adapters: Tensor) -> Tensor:
    """x (1, I), weight (O, I), bias (O,), adapters (1,) int64 -> (1, O) in x's dtype."""
    if not _takes(x, weight) or not weight.is_contiguous():
        y = torch.nn.functional.linear(x, weight, bias)
        return y if stack is None else add_row_lora(y, x, stack, adapters)
    outputs, inputs = weight.shape
    y = torch.empty((1, outputs), dtype=x.dtype, device=x.device)
    parts = y if stack is None else _inner(x, stack, adapters)
    launch(
        _one_row_kernel,
        ((outputs + _ROWS - 1) // _ROWS,),
        x,
        weight,
        y if bias is None else bias,
        y,
        parts,
        y if stack is None else stack.b,
        y if stack is None else stack.scales,
        adapters,
        outputs,
        *_edges(stack, outputs),
        **_sizes(stack, parts),
        BIAS=bias is not None,
        WIDTH=inputs,
        ROWS=_ROWS,
        INPUTS=min(_INPUTS, block(inputs)),
        num_warps=_WARPS,
    )
    return y


def add_row_lora_reference(y: Tensor, x: Tensor, stack: Stack, adapters: Tensor) -> Tensor:
    """What the kernels compute, in torch."""
    rank, dtype = stack.rank, torch.promote_types(x.dtype, torch.float32)
    for row, n in enumerate(adapters.tolist()):
        if n == 0:
            continue
        z = stack.a[n].to(dtype) @ x[row].to(dtype) * stack.scales[n]
        ends = [*stack.starts[1:], y.shape[1]]
        for m, (start, end) in enumerate(zip(stack.starts, ends, strict=True)):
            y[row, start:end] += (stack.b[n, start:end].to(dtype) @ z[m * rank : (m + 1) * rank]).to(y.dtype)
    return y


def _inner(x: Tensor, stack: Stack, adapters: Tensor) -> Tensor:
    """x A^T in shares of the inputs: (B, shares, M R) float32, undefined for rows of the base."""
    _, columns, inputs = stack.a.shape
    shares = (inputs + _SHARE - 1) // _SHARE
    parts = torch.empty((len(x), shares, columns), dtype=torch.float32, device=x.device)
    tall = block(columns)
    launch(
        _inner_kernel,
        (len(x), shares),
        x,
        stack.a,
        parts,
        adapters,
        x.stride(0),
        WIDTH=inputs,
        COLUMNS=columns,
        BLOCK_COLUMNS=tall,
        INPUTS=max(16, min(_SHARE, _TILE // tall)),
        SHARE=_SHARE,
        num_warps=4,
    )
    return parts


def _takes(*tensors: Tensor) -> bool:
    return runs_kernel(*tensors) and all(t.stride(-1) == 1 for t in tensors)


def _edges(stack: Stack | None, outputs: int) -> tuple[int, int]:
    """Where the second and the third module begin."""
    starts = () if stack is None else stack.starts
    second, third = (*starts[1:], *[outputs] * (MAX_MODULES - max(1, len(starts))))
    return second, third


def _sizes(stack: Stack | None, parts: Tensor) -> dict[str, int]:
    if stack is None:
        return {"MODULES": 0, "RANK": 1, "BLOCK_RANK": 1, "SHARES": 1, "BLOCK_SHARES": 1}
    rank, shares = stack.rank, parts.shape[1]
    return {
        "MODULES": len(stack.starts),
        "RANK": rank,
        "BLOCK_RANK": block(rank, 1),
        "SHARES": shares,
        "BLOCK_SHARES": block(shares, 1),
    }


@kernel()
def _inner_kernel(
    x_at: Pointer,
    a_at: Pointer,
    parts_at: Pointer,
    adapter_at: Pointer,
    x_row: Value,
    WIDTH: constexpr,
    COLUMNS: constexpr,
    BLOCK_COLUMNS: constexpr,
    INPUTS: constexpr,
    SHARE: constexpr,
) -> None:
    row, share = tl.program_id(0).to(tl.int64), tl.program_id(1)
    adapter = tl.load(adapter_at + row).to(tl.int64)
    if adapter > 0:
        column, step = tl.arange(0, BLOCK_COLUMNS), tl.arange(0, INPUTS)
        total = tl.zeros((BLOCK_COLUMNS,), tl.float32)
        for first in range(0, SHARE, INPUTS):
            at = share * SHARE + first + step
            x = tl.load(x_at + row * x_row + at, mask=at < WIDTH, other=0.0).to(tl.float32)
            inside = (column < COLUMNS)[:, None] & (at < WIDTH)[None, :]
            a = tl.load(a_at + (adapter * COLUMNS + column[:, None]) * WIDTH + at[None, :], mask=inside, other=0.0)
            total += tl.sum(a.to(tl.float32) * x[None, :], 1)
        to = (row * tl.num_programs(1) + share) * COLUMNS + column
        tl.store(parts_at + to, total, mask=column < COLUMNS)


@kernel()
def _module(
    parts_at: Value,
    m: constexpr,
    MODULES: constexpr,
    RANK: constexpr,
    BLOCK_RANK: constexpr,
    SHARES: constexpr,
    BLOCK_SHARES: constexpr,
) -> Any:
    """z of one module (BLOCK_RANK,), the shares added up."""
    share, r = tl.arange(0, BLOCK_SHARES)[:, None], tl.arange(0, BLOCK_RANK)[None, :]
    inside = (share < SHARES) & (r < RANK)
    return tl.sum(tl.load(parts_at + (share * MODULES + m) * RANK + r, mask=inside, other=0.0), 0)


@kernel()
def _outer(
    output: Value,
    parts_at: Value,
    b_at: Value,
    outputs: Value,
    second: Value,
    third: Value,
    MODULES: constexpr,
    RANK: constexpr,
    BLOCK_RANK: constexpr,
    SHARES: constexpr,
    BLOCK_SHARES: constexpr,
) -> Any:
    """The adapter's part of some outputs, before its scale."""
    r = tl.arange(0, BLOCK_RANK)
    inside = (output < outputs)[:, None] & (r < RANK)[None, :]
    b = tl.load(b_at + output[:, None].to(tl.int64) * RANK + r[None, :], mask=inside, other=0.0).to(tl.float32)
    z = _module(parts_at, 0, MODULES, RANK, BLOCK_RANK, SHARES, BLOCK_SHARES)[None, :]
    if MODULES > 1:
        other = _module(parts_at, 1, MODULES, RANK, BLOCK_RANK, SHARES, BLOCK_SHARES)[None, :]
        z = tl.where((output >= second)[:, None], other, z)
    if MODULES > 2:
        other = _module(parts_at, 2, MODULES, RANK, BLOCK_RANK, SHARES, BLOCK_SHARES)[None, :]
        z = tl.where((output >= third)[:, None], other, z)
    return tl.sum(b * z, 1)


@kernel("outputs")
def _outer_kernel(
    y_at: Pointer,
    parts_at: Pointer,
    b_at: Pointer,
    scale_at: Pointer,
    adapter_at: Pointer,
    y_row: Value,
    outputs: Value,
    second: Value,
    third: Value,
    MODULES: constexpr,
    RANK: constexpr,
    BLOCK_RANK: constexpr,
    SHARES: constexpr,
    BLOCK_SHARES: constexpr,
    COLUMNS: constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    adapter = tl.load(adapter_at + row).to(tl.int64)
    if adapter > 0:
        output = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
        parts = parts_at + row * SHARES * MODULES * RANK
        b = b_at + adapter * outputs * RANK
        more = _outer(output, parts, b, outputs, second, third, MODULES, RANK, BLOCK_RANK, SHARES, BLOCK_SHARES)
        at = y_at + row * y_row + output
        y = tl.load(at, mask=output < outputs, other=0.0).to(tl.float32) + tl.load(scale_at + adapter) * more
        tl.store(at, y.to(y_at.dtype.element_ty), mask=output < outputs)


@kernel("outputs")
def _one_row_kernel(
    x_at: Pointer,
    weight_at: Pointer,
    bias_at: Pointer,
    y_at: Pointer,
    parts_at: Pointer,
    b_at: Pointer,
    scale_at: Pointer,
    adapter_at: Pointer,
    outputs: Value,
    second: Value,
    third: Value,
    MODULES: constexpr,
    RANK: constexpr,
    BLOCK_RANK: constexpr,
    SHARES: constexpr,
    BLOCK_SHARES: constexpr,
    BIAS: constexpr,
    WIDTH: constexpr,
    ROWS: constexpr,
    INPUTS: constexpr,
) -> None:
    output = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    step = tl.arange(0, INPUTS)
    at_row = weight_at + output[:, None].to(tl.int64) * WIDTH
    products = tl.zeros((ROWS, INPUTS), tl.float32)
    for first in range(0, WIDTH, INPUTS):
        at = first + step
        x = tl.load(x_at + at, mask=at < WIDTH, other=0.0).to(tl.float32)
        inside = (output < outputs)[:, None] & (at < WIDTH)[None, :]
        products += tl.load(at_row + at[None, :], mask=inside, other=0.0).to(tl.float32) * x[None, :]
    y = tl.sum(products, 1)
    if BIAS:
        y += tl.load(bias_at + output, mask=output < outputs, other=0.0).to(tl.float32)
    if MODULES > 0:
        adapter = tl.load(adapter_at).to(tl.int64)
        if adapter > 0:
            b = b_at + adapter * outputs * RANK
            more = _outer(output, parts_at, b, outputs, second, third, MODULES, RANK, BLOCK_RANK, SHARES, BLOCK_SHARES)
            y += tl.load(scale_at + adapter) * more
    tl.store(y_at + output, y.to(y_at.dtype.element_ty), mask=output < outputs)
