"""The Triton kernels of kernels/lora_a.py, which has the formulas and the only callers."""

from __future__ import annotations

from typing import Any

from lorikit.model.kernels.dropout import hash_each, kept, keys_of
from lorikit.model.kernels.launch import Pointer, Value, constexpr, dot, kernel, tl

MAX_MODULES, MAX_RANK = 3, 64  # what registers hold the sums of


@kernel("threshold", "stream_0", "stream_1", "stream_2", "num_tokens")
def forward_kernel(
    x_at: Pointer, a_at: Pointer, partial_at: Pointer, seed_at: Pointer, threshold: Value, stream_0: Value,
    stream_1: Value, stream_2: Value, num_tokens: Value, x_row: Value, scale: Value, DROP: constexpr, MODULES: constexpr,
    RANK: constexpr, WIDTH: constexpr, BLOCK_RANK: constexpr, TOKENS: constexpr, COLUMNS: constexpr, SHARE: constexpr,
) -> None:  # fmt: skip
    """partial[share] (T, M R): the sums over the share's columns of D."""
    token = (tl.program_id(0) * TOKENS + tl.arange(0, TOKENS))[:, None]
    share = tl.program_id(1)
    seed = tl.load(seed_at)
    total_0 = tl.zeros((TOKENS, BLOCK_RANK), tl.float32)
    total_1 = tl.zeros((TOKENS, BLOCK_RANK), tl.float32)
    total_2 = tl.zeros((TOKENS, BLOCK_RANK), tl.float32)
    for start in range(0, SHARE, COLUMNS):
        column = (share * SHARE + start + tl.arange(0, COLUMNS))[None, :]
        inside = (token < num_tokens) & (column < WIDTH)
        x = tl.load(x_at + token.to(tl.int64) * x_row + column, mask=inside, other=0.0)
        a = a_at + column
        total_0 = _times_a(total_0, x, a, seed, stream_0, threshold, token, column, DROP, RANK, WIDTH, BLOCK_RANK)
        if MODULES > 1:
            a += RANK * WIDTH
            total_1 = _times_a(total_1, x, a, seed, stream_1, threshold, token, column, DROP, RANK, WIDTH, BLOCK_RANK)
        if MODULES > 2:
            a += RANK * WIDTH
            total_2 = _times_a(total_2, x, a, seed, stream_2, threshold, token, column, DROP, RANK, WIDTH, BLOCK_RANK)
    rank = tl.arange(0, BLOCK_RANK)[None, :]
    inside = (token < num_tokens) & (rank < RANK)
    out = partial_at + (share.to(tl.int64) * num_tokens + token) * (MODULES * RANK) + rank
    _store(out, total_0 * scale, total_1 * scale, total_2 * scale, inside, MODULES, RANK)


@kernel()
def _times_a(
    total: Value,
    x: Value,
    a_at: Value,
    seed: Value,
    stream: Value,
    threshold: Value,
    token: Value,
    column: Value,
    DROP: constexpr,
    RANK: constexpr,
    WIDTH: constexpr,
    BLOCK_RANK: constexpr,
) -> Any:
    """total + (mask * x) A^T of one module, for one tile of x."""
    rank = tl.arange(0, BLOCK_RANK)[:, None]
    a = tl.load(a_at + rank * WIDTH, mask=(rank < RANK) & (column < WIDTH), other=0.0).to(x.dtype)
    if DROP:
        x = tl.where(_kept(seed, stream, threshold, token, column), x, 0.0)
    return dot(x, tl.trans(a), total)


@kernel()
def _store(
    at: Value, sum_0: Value, sum_1: Value, sum_2: Value, inside: Value, MODULES: constexpr, DISTANCE: constexpr
) -> None:
    """The sums of the modules, DISTANCE apart."""
    tl.store(at, sum_0, mask=inside)
    if MODULES > 1:
        tl.store(at + DISTANCE, sum_1, mask=inside)
    if MODULES > 2:
        tl.store(at + 2 * DISTANCE, sum_2, mask=inside)


@kernel()
def _kept(seed: Value, stream: Value, threshold: Value, token: Value, column: Value) -> Any:
    key_1, key_2 = keys_of(seed, stream)
    return kept(hash_each(token.to(tl.uint32) + key_1), hash_each(column.to(tl.uint32) + key_2), threshold)


@kernel("threshold", "stream_0", "stream_1", "stream_2", "num_tokens")
def backward_kernel(
    x_at: Pointer, a_at: Pointer, grad_at: Pointer, out_at: Pointer, partial_at: Pointer, seed_at: Pointer,
    threshold: Value, stream_0: Value, stream_1: Value, stream_2: Value, num_tokens: Value, x_row: Value, out_row: Value,
    scale: Value, DROP: constexpr, NEEDS_X: constexpr, ADD: constexpr, MODULES: constexpr, RANK: constexpr,
    WIDTH: constexpr, BLOCK_RANK: constexpr, TOKENS: constexpr, COLUMNS: constexpr, SHARE: constexpr,
) -> None:  # fmt: skip
    """grad_x, and partial[share] (M, R, D): the sums over the share's tokens."""
    column = (tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS))[None, :]
    share = tl.program_id(1)
    seed = tl.load(seed_at)
    total_0 = tl.zeros((BLOCK_RANK, COLUMNS), tl.float32)
    total_1 = tl.zeros((BLOCK_RANK, COLUMNS), tl.float32)
    total_2 = tl.zeros((BLOCK_RANK, COLUMNS), tl.float32)
    for start in range(0, SHARE, TOKENS):
        token = (share * SHARE + start + tl.arange(0, TOKENS))[:, None]
        inside = (token < num_tokens) & (column < WIDTH)
        long = token.to(tl.int64)
        x = tl.load(x_at + long * x_row + column, mask=inside, other=0.0)
        grad_x = tl.zeros((TOKENS, COLUMNS), tl.float32)
        grad, a = grad_at + long * (MODULES * RANK), a_at + column
        grad_x, total_0 = _module_backward(
            grad_x,
            total_0,
            x,
            a,
            grad,
            seed,
            stream_0,
            threshold,
            token,
            column,
            num_tokens,
            DROP,
            RANK,
            WIDTH,
            BLOCK_RANK,
        )
        if MODULES > 1:
            grad_x, total_1 = _module_backward(
                grad_x, total_1, x, a + RANK * WIDTH, grad + RANK, seed, stream_1, threshold, token, column, num_tokens,
                DROP, RANK, WIDTH, BLOCK_RANK,
            )  # fmt: skip
        if MODULES > 2:
            grad_x, total_2 = _module_backward(
                grad_x, total_2, x, a + 2 * RANK * WIDTH, grad + 2 * RANK, seed, stream_2, threshold, token, column,
                num_tokens, DROP, RANK, WIDTH, BLOCK_RANK,
            )  # fmt: skip
        if NEEDS_X:
            grad_x *= scale
            target = out_at + long * out_row + column
            if ADD:
                grad_x += tl.load(target, mask=inside, other=0.0).to(tl.float32)
            tl.store(target, grad_x.to(out_at.dtype.element_ty), mask=inside)
    rank = tl.arange(0, BLOCK_RANK)[:, None]
    inside = (rank < RANK) & (column < WIDTH)
    out = partial_at + share.to(tl.int64) * (MODULES * RANK * WIDTH) + rank * WIDTH + column
    _store(out, total_0 * scale, total_1 * scale, total_2 * scale, inside, MODULES, RANK * WIDTH)


@kernel()
def _module_backward(
    grad_x: Value,
    total: Value,
    x: Value,
    a_at: Value,
    grad_at: Value,
    seed: Value,
    stream: Value,
    threshold: Value,
    token: Value,
    column: Value,
    num_tokens: Value,
    DROP: constexpr,
    RANK: constexpr,
    WIDTH: constexpr,
    BLOCK_RANK: constexpr,
) -> Any:
    """(grad_x + mask * (grad A), total + grad^T (mask * x)) of one module, for one tile of x."""
    across, down = tl.arange(0, BLOCK_RANK)[None, :], tl.arange(0, BLOCK_RANK)[:, None]
    grad = tl.load(grad_at + across, mask=(token < num_tokens) & (across < RANK), other=0.0).to(x.dtype)
    a = tl.load(a_at + down * WIDTH, mask=(down < RANK) & (column < WIDTH), other=0.0).to(x.dtype)
    product = dot(grad, a, tl.zeros(grad_x.shape, tl.float32))
    if DROP:
        keep = _kept(seed, stream, threshold, token, column)
        product = tl.where(keep, product, 0.0)
        x = tl.where(keep, x, 0.0)
    return grad_x + product, dot(tl.trans(grad), x, total)
