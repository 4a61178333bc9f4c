"""The Triton kernels of kernels/lora.py, which has the formulas and the only callers."""

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


@kernel("num_elements", "num_shares")
def sum_kernel(
    partial_at: Pointer, out_at: Pointer, num_elements: Value, num_shares: Value, SHARES: constexpr, BLOCK: constexpr
) -> None:
    """out[i] = sum over the shares of partial[share, i]; SHARES is the power of two that holds them."""
    at = (tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK))[None, :]
    share = tl.arange(0, SHARES)[:, None]
    inside = (share < num_shares) & (at < num_elements)
    parts = tl.load(partial_at + share.to(tl.int64) * num_elements + at, mask=inside, other=0.0)
    total = tl.sum(parts, axis=0)[None, :]
    tl.store(out_at + at, total.to(out_at.dtype.element_ty), mask=at < num_elements)


@kernel("num_tokens")
def add_b_kernel(
    y_at: Pointer,
    u_at: Pointer,
    b_0: Pointer,
    b_1: Pointer,
    b_2: Pointer,
    start_0: Value,
    start_1: Value,
    start_2: Value,
    size_0: Value,
    size_1: Value,
    size_2: Value,
    num_tokens: Value,
    y_row: Value,
    scale: Value,
    MODULES: constexpr,
    RANK: constexpr,
    BLOCK_RANK: constexpr,
    TOKENS: constexpr,
    COLUMNS: constexpr,
) -> None:
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
