"""The products with LoRA's B matrices of all modules that write one fused y, and their backward; A is in lora_a.py.

    y[:, columns of m] += scale u_m B_m^T
    grad_u_m = scale grad_y[:, columns of m] B_m            grad_B_m = scale grad_y[:, columns of m]^T u_m

T tokens, O_m outputs, R rank, M modules (q, k, v; or gate, up; or one). The backward reads grad_y once for both results: a
program takes a block of columns and a share of the tokens, adds up its part of grad_B and leaves its part of grad_u; the
parts are then added in a fixed order, so that a step gives the same bytes again.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from lorikit.model.kernels.launch import Pointer, Value, block, constexpr, dot, kernel, launch, runs_kernel, tl
from lorikit.model.kernels.sums import float_mm, sum_shares

MAX_MODULES, MAX_RANK = 3, 64
_TOKENS, _COLUMNS, _SHARE = 64, 128, 512  # of one tile; tokens of one program's backward


def add_lora_b(y: Tensor, u: Tensor, b: Sequence[Tensor], starts: Sequence[int], scale: float) -> None:
    """y[:, starts[m] : starts[m] + O_m] += scale u_m b[m]^T for every module m, in place.

    y (T, O): the fused product, in which modules without an adapter are left as they are; u (T, M R), b[m] (O_m, R).
    Raises ValueError when shapes do not fit.
    """
    rank = _check(y, u, b, starts)
    if not _takes(y, u, b, rank):
        return add_lora_b_reference(y, u, b, starts, scale)
    launch(
        _add_kernel,
        ((y.shape[0] + _TOKENS - 1) // _TOKENS, sum(_blocks(b))),
        y,
        u.contiguous(),
        *_modules(b, starts),
        y.shape[0],
        y.stride(0),
        scale,
        MODULES=len(b),
        RANK=rank,
        BLOCK_RANK=block(rank),
        TOKENS=_TOKENS,
        COLUMNS=_COLUMNS,
        num_warps=4,
    )
    return None


def lora_b_backward(
    grad_y: Tensor, u: Tensor, b: Sequence[Tensor], starts: Sequence[int], scale: float
) -> tuple[Tensor, list[Tensor]]:
    """grad_y (T, O) of `add_lora_b`'s y -> (grad_u (T, M R) in u's dtype, [grad_b (O_m, R) float32 of each module]).

    Raises ValueError when shapes do not fit.
    """
    rank = _check(grad_y, u, b, starts)
    if not _takes(grad_y, u, b, rank):
        return lora_b_backward_reference(grad_y, u, b, starts, scale)
    tokens, blocks, device = grad_y.shape[0], _blocks(b), grad_y.device
    sizes = [matrix.shape[0] * rank for matrix in b]
    shares = (tokens + _SHARE - 1) // _SHARE
    parts_u = torch.empty((sum(blocks), tokens, rank), dtype=torch.float32, device=device)
    parts_b = torch.empty((shares, sum(sizes)), dtype=torch.float32, device=device)
    launch(
        _backward_kernel,
        (sum(blocks), shares),
        grad_y,
        u.contiguous(),
        *_modules(b, starts),
        parts_u,
        parts_b,
        tokens,
        grad_y.stride(0),
        scale,
        MODULES=len(b),
        RANK=rank,
        BLOCK_RANK=block(rank),
        TOKENS=_TOKENS,
        COLUMNS=_COLUMNS,
        SHARE=_SHARE,
        num_warps=4,
    )
    grad_u = torch.empty((tokens, len(b) * rank), dtype=u.dtype, device=device)
    firsts = list(accumulate(blocks, initial=0))
    none = [0] * (MAX_MODULES - len(b))
    launch(
        _sum_u_kernel,
        ((tokens * rank + 63) // 64, len(b)),
        parts_u,
        grad_u,
        *firsts[: len(b)],
        *none,
        *blocks,
        *none,
        tokens * rank,
        max(blocks),
        MODULES=len(b),
        RANK=rank,
        BLOCK=64,
        num_warps=2,
    )
    flat = parts_b[0] if shares == 1 else sum_shares(parts_b, torch.empty_like(parts_b[0]))
    return grad_u, [part.view(-1, rank) for part in torch.split(flat, sizes)]


def add_lora_b_reference(y: Tensor, u: Tensor, b: Sequence[Tensor], starts: Sequence[int], scale: float) -> None:
    """What the kernel computes, in torch."""
    for part, matrix, start in zip(u.to(y.dtype).chunk(len(b), dim=1), b, starts, strict=True):
        y[:, start : start + matrix.shape[0]].addmm_(part, matrix.to(y.dtype).t(), alpha=scale)


def lora_b_backward_reference(
    grad_y: Tensor, u: Tensor, b: Sequence[Tensor], starts: Sequence[int], scale: float
) -> tuple[Tensor, list[Tensor]]:
    """What the kernels compute, in torch."""
    grads = [grad_y[:, start : start + matrix.shape[0]] for start, matrix in zip(starts, b, strict=True)]
    grad_u = torch.cat([g @ matrix.to(g.dtype) for g, matrix in zip(grads, b, strict=True)], dim=1)
    parts = u.to(grad_y.dtype).chunk(len(b), dim=1)
    return grad_u.to(u.dtype).mul_(scale), [
        float_mm(g.t(), part).mul_(scale) for g, part in zip(grads, parts, strict=True)
    ]


def _check(y: Tensor, u: Tensor, b: Sequence[Tensor], starts: Sequence[int]) -> int:
    """The rank."""
    shapes = [tuple(matrix.shape) for matrix in b]
    rank = u.shape[1] // max(len(b), 1)
    ends = [start + shape[0] for start, shape in zip(starts, shapes, strict=True)]
    if (
        not b
        or any(shape[1] != rank for shape in shapes)
        or u.shape != (y.shape[0], rank * len(b))
        or max(ends) > y.shape[1]
    ):
        raise ValueError(f"y {tuple(y.shape)}, u {tuple(u.shape)} and b {shapes} at columns {list(starts)} do not fit")
    return rank


def _takes(y: Tensor, u: Tensor, b: Sequence[Tensor], rank: int) -> bool:
    return len(b) <= MAX_MODULES and rank <= MAX_RANK and runs_kernel(y, u, *b) and y.stride(1) == 1


def _blocks(b: Sequence[Tensor]) -> list[int]:
    """Blocks of columns of each module."""
    return [(matrix.shape[0] + _COLUMNS - 1) // _COLUMNS for matrix in b]


def _modules(b: Sequence[Tensor], starts: Sequence[int]) -> tuple[Tensor | int, ...]:
    """MAX_MODULES matrices, starts and sizes, as the kernels take them."""
    matrices, none = [matrix.contiguous() for matrix in b], MAX_MODULES - len(b)
    sizes = [matrix.shape[0] for matrix in b]
    return *matrices, *matrices[:1] * none, *starts, *[0] * none, *sizes, *[0] * none


@kernel("num_tokens")
def _add_kernel(
    y_at: Pointer, u_at: Pointer, b_0: Pointer, b_1: Pointer, b_2: Pointer, start_0: Value, start_1: Value, start_2: Value,
    size_0: Value, size_1: Value, size_2: Value, num_tokens: Value, y_row: Value, scale: Value, MODULES: constexpr,
    RANK: constexpr, BLOCK_RANK: constexpr, TOKENS: constexpr, COLUMNS: constexpr,
) -> None:  # fmt: skip
    """Each program adds to one tile of y; the blocks of columns count through the modules one after the other."""
    token = (tl.program_id(0) * TOKENS + tl.arange(0, TOKENS))[:, None]
    number = tl.program_id(1)
    blocks_0, blocks_1 = tl.cdiv(size_0, COLUMNS), tl.cdiv(size_1, COLUMNS)
    y = y_at + token.to(tl.int64) * y_row
    u = u_at + token.to(tl.int64) * (MODULES * RANK)
    valid = token < num_tokens
    if number < blocks_0:
        _add_tile(y + start_0, u, b_0, number, size_0, valid, scale, RANK, BLOCK_RANK, COLUMNS)
    elif number < blocks_0 + blocks_1:
        _add_tile(y + start_1, u + RANK, b_1, number - blocks_0, size_1, valid, scale, RANK, BLOCK_RANK, COLUMNS)
    else:
        last = number - blocks_0 - blocks_1
        _add_tile(y + start_2, u + 2 * RANK, b_2, last, size_2, valid, scale, RANK, BLOCK_RANK, COLUMNS)


@kernel()
def _add_tile(
    y_at: Value,
    u_at: Value,
    b_at: Value,
    number: Value,
    size: Value,
    valid: Value,
    scale: Value,
    RANK: constexpr,
    BLOCK_RANK: constexpr,
    COLUMNS: constexpr,
) -> None:
    column = number * COLUMNS + tl.arange(0, COLUMNS)
    across, down = tl.arange(0, BLOCK_RANK)[None, :], tl.arange(0, BLOCK_RANK)[:, None]
    u = tl.load(u_at + across, mask=valid & (across < RANK), other=0.0)
    b = tl.load(b_at + column[None, :] * RANK + down, mask=(column[None, :] < size) & (down < RANK), other=0.0).to(
        u.dtype
    )
    at = y_at + column[None, :]
    inside = valid & (column[None, :] < size)
    y = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    sums = dot(u, b, tl.zeros(y.shape, tl.float32))
    tl.store(at, (y + scale * sums).to(at.dtype.element_ty), mask=inside)


@kernel("num_tokens")
def _backward_kernel(
    grad_at: Pointer, u_at: Pointer, b_0: Pointer, b_1: Pointer, b_2: Pointer, start_0: Value, start_1: Value,
    start_2: Value, size_0: Value, size_1: Value, size_2: Value, parts_u_at: Pointer, parts_b_at: Pointer,
    num_tokens: Value, grad_row: Value, scale: Value, MODULES: constexpr, RANK: constexpr, BLOCK_RANK: constexpr,
    TOKENS: constexpr, COLUMNS: constexpr, SHARE: constexpr,
) -> None:  # fmt: skip
    """parts_u[block] (T, R) for one block of columns, and its rows of parts_b[share] (sum of O_m, R)."""
    number = tl.program_id(0)
    blocks_0, blocks_1 = tl.cdiv(size_0, COLUMNS), tl.cdiv(size_1, COLUMNS)
    width = (size_0 + size_1 + size_2) * RANK
    parts_u = parts_u_at + number.to(tl.int64) * num_tokens * RANK
    parts_b = parts_b_at + tl.program_id(1).to(tl.int64) * width
    if number < blocks_0:
        _backward_tile(
            grad_at + start_0, u_at, b_0, number, size_0, parts_u, parts_b, num_tokens, grad_row, scale,
            MODULES, RANK, BLOCK_RANK, TOKENS, COLUMNS, SHARE,
        )  # fmt: skip
    elif number < blocks_0 + blocks_1:
        _backward_tile(
            grad_at + start_1, u_at + RANK, b_1, number - blocks_0, size_1, parts_u, parts_b + size_0 * RANK,
            num_tokens, grad_row, scale, MODULES, RANK, BLOCK_RANK, TOKENS, COLUMNS, SHARE,
        )  # fmt: skip
    else:
        _backward_tile(
            grad_at + start_2, u_at + 2 * RANK, b_2, number - blocks_0 - blocks_1, size_2, parts_u,
            parts_b + (size_0 + size_1) * RANK, num_tokens, grad_row, scale,
            MODULES, RANK, BLOCK_RANK, TOKENS, COLUMNS, SHARE,
        )  # fmt: skip


@kernel()
def _backward_tile(
    grad_at: Value, u_at: Value, b_at: Value, number: Value, size: Value, parts_u: Value, parts_b: Value,
    num_tokens: Value, grad_row: Value, scale: Value, MODULES: constexpr, RANK: constexpr, BLOCK_RANK: constexpr,
    TOKENS: constexpr, COLUMNS: constexpr, SHARE: constexpr,
) -> Any:  # fmt: skip
    column = number * COLUMNS + tl.arange(0, COLUMNS)
    rank = tl.arange(0, BLOCK_RANK)[None, :]
    of_b = (column[:, None] < size) & (rank < RANK)
    b = tl.load(b_at + column[:, None] * RANK + rank, mask=of_b, other=0.0).to(grad_at.dtype.element_ty)
    total = tl.zeros((COLUMNS, BLOCK_RANK), tl.float32)
    for start in range(0, SHARE, TOKENS):
        token = (tl.program_id(1) * SHARE + start + tl.arange(0, TOKENS))[:, None]
        valid = token < num_tokens
        long = token.to(tl.int64)
        inside = valid & (column[None, :] < size)
        grad = tl.load(grad_at + long * grad_row + column[None, :], mask=inside, other=0.0)
        of_u = valid & (rank < RANK)
        u = tl.load(u_at + long * (MODULES * RANK) + rank, mask=of_u, other=0.0).to(grad.dtype)
        part = dot(grad, b, tl.zeros((TOKENS, BLOCK_RANK), tl.float32))
        tl.store(parts_u + long * RANK + rank, part * scale, mask=of_u)
        total = dot(tl.trans(grad), u, total)
    tl.store(parts_b + column[:, None] * RANK + rank, total * scale, mask=of_b)


@kernel("num_elements", "first_0", "first_1", "first_2", "count_0", "count_1", "count_2", "most")
def _sum_u_kernel(
    parts_at: Pointer, out_at: Pointer, first_0: Value, first_1: Value, first_2: Value, count_0: Value, count_1: Value,
    count_2: Value, num_elements: Value, most: Value, MODULES: constexpr, RANK: constexpr, BLOCK: constexpr,
) -> None:  # fmt: skip
    """out (T, M R): for each module the sum of its blocks of parts (blocks, T, R), in their order."""
    module = tl.program_id(1)
    first = tl.where(module == 0, first_0, tl.where(module == 1, first_1, first_2))
    count = tl.where(module == 0, count_0, tl.where(module == 1, count_1, count_2))
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    start = 0
    while start < most:
        number = (start + tl.arange(0, 16))[:, None]
        inside = (number < count) & (at[None, :] < num_elements)
        parts = parts_at + (first + number).to(tl.int64) * num_elements + at[None, :]
        total += tl.sum(tl.load(parts, mask=inside, other=0.0), axis=0)
        start += 16
    out = out_at + (at // RANK).to(tl.int64) * (MODULES * RANK) + module * RANK + at % RANK
    tl.store(out, total.to(out_at.dtype.element_ty), mask=at < num_elements)
