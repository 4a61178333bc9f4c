"""The Triton kernels of attention.py, which says what they compute and names the sizes.

A program finds the sequence that its block belongs to among the ends of all sequences: the grid holds the most blocks that
there can be, and the host need not know the lengths.
"""

from __future__ import annotations

from typing import Any

from lorikit.model.kernels.launch import Pointer, Value, constexpr, dot, kernel, limit, tl


@kernel()
def _place(
    number: Value,
    cu_q_at: Pointer,
    cu_k_at: Pointer,
    n: Value,
    shared: Value,
    first: Value,
    KEYS: constexpr,
    SEQUENCES: constexpr,
    BLOCK: constexpr,
) -> Any:
    """The sequence, n for none, and the block of it that block `number` of all queries, or of all keys, is."""
    one = tl.arange(0, SEQUENCES)
    inside = one < n
    length = tl.load(cu_k_at + one + 1, mask=inside, other=0) - tl.load(cu_k_at + one, mask=inside, other=0)
    if KEYS:
        length += tl.where((length > 0) & (one >= first), shared, 0)
    else:
        length = tl.load(cu_q_at + one + 1, mask=inside, other=0) - tl.load(cu_q_at + one, mask=inside, other=0)
    blocks = (length + BLOCK - 1) // BLOCK
    ended = inside & (tl.cumsum(blocks, 0) <= number)
    return tl.sum(ended.to(tl.int32), 0), number - tl.sum(tl.where(ended, blocks, 0), 0)


@kernel()
def _span(sequence: Value, cu_q_at: Pointer, cu_k_at: Pointer, shared: Value, first: Value) -> Any:
    """A sequence's first query and how many, its first own key and how many, and how many shared keys it sees."""
    start_q, start_k = tl.load(cu_q_at + sequence), tl.load(cu_k_at + sequence)
    own = tl.load(cu_k_at + sequence + 1) - start_k
    seen = tl.where((sequence >= first) & (own > 0), shared, 0)
    return start_q, tl.load(cu_q_at + sequence + 1) - start_q, start_k, own, seen


@kernel()
def _query_rows(start: Value, start_q: Value, num_queries: Value, BLOCK: constexpr) -> Any:
    """A block of a sequence's queries: their numbers in it, their rows among all queries, and which are there."""
    query = start + tl.arange(0, BLOCK)
    return query, (start_q + query).to(tl.int64), query < num_queries


@kernel()
def _key_rows(start: Value, own_start: Value, seen: Value, BLOCK: constexpr) -> Any:
    """A block of a sequence's keys, from its key `start` on: their numbers in it, and their rows among all keys."""
    key = start + tl.arange(0, BLOCK)
    return key, tl.where(key < seen, key, own_start + key - seen).to(tl.int64)


@kernel()
def _load(at: Pointer, row: Value, stride: Value, inside: Value, WIDTH: constexpr, BLOCK_WIDTH: constexpr) -> Any:
    column = tl.arange(0, BLOCK_WIDTH)[None, :]
    return tl.load(at + row[:, None] * stride + column, mask=inside[:, None] & (column < WIDTH), other=0.0)


@kernel()
def _store(
    at: Pointer, row: Value, stride: Value, inside: Value, tile: Value, WIDTH: constexpr, BLOCK_WIDTH: constexpr
) -> None:
    column = tl.arange(0, BLOCK_WIDTH)[None, :]
    to = at + row[:, None] * stride + column
    tl.store(to, tile.to(at.dtype.element_ty), mask=inside[:, None] & (column < WIDTH))


@kernel()
def _sees(query: Value, key: Value, ahead: Value, num_queries: Value, num_keys: Value, window: Value) -> Any:
    """Whether a query, `ahead` keys before the first one, sees a key: both inside, not later, not before the window."""
    back = query + ahead - key
    return (back >= 0) & ((back < window) | (window == 0)) & (query < num_queries) & (key < num_keys)


@kernel("n", "shared", "first", "window")
def forward_kernel(
    q_at: Pointer,
    k_at: Pointer,
    v_at: Pointer,
    out_at: Pointer,
    logs_at: Pointer,
    cu_q_at: Pointer,
    cu_k_at: Pointer,
    n: Value,
    shared: Value,
    first: Value,
    window: Value,
    scale2: Value,
    q_row: Value,
    k_row: Value,
    v_row: Value,
    HEADS: constexpr,
    GROUP: constexpr,
    WIDTH: constexpr,
    SEQUENCES: constexpr,
    BLOCK: constexpr,
    BLOCK_WIDTH: constexpr,
) -> None:
    """One block of a sequence's queries, one head."""
    sequence, number = _place(tl.program_id(0), cu_q_at, cu_k_at, n, shared, first, False, SEQUENCES, BLOCK)
    if sequence >= n:
        return
    head = tl.program_id(1)
    start_q, num_queries, own_start, own, seen = _span(sequence, cu_q_at, cu_k_at, shared, first)
    num_keys = seen + own
    ahead = num_keys - num_queries
    query, row, inside = _query_rows(number * BLOCK, start_q, num_queries, BLOCK)
    q = _load(q_at + head * WIDTH, row, q_row, inside, WIDTH, BLOCK_WIDTH)
    most = tl.full((BLOCK,), -1.0e30, tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    out = tl.zeros((BLOCK, BLOCK_WIDTH), tl.float32)
    kv_head = head // GROUP * WIDTH
    begin = tl.where(window > 0, tl.maximum(0, number * BLOCK + ahead - window + 1), 0) // BLOCK * BLOCK
    end = tl.minimum(num_keys, ahead + (number + 1) * BLOCK)
    for start in range(limit(begin), limit(end), BLOCK):
        key, key_row = _key_rows(start, own_start, seen, BLOCK)
        k = _load(k_at + kv_head, key_row, k_row, key < num_keys, WIDTH, BLOCK_WIDTH)
        scores = dot(q, tl.trans(k), tl.zeros((BLOCK, BLOCK), tl.float32)) * scale2
        scores = tl.where(
            _sees(query[:, None], key[None, :], ahead, num_queries, num_keys, window), scores, -float("inf")
        )
        larger = tl.maximum(most, tl.max(scores, 1))
        p = tl.exp2(scores - larger[:, None])
        less = tl.exp2(most - larger)
        total = total * less + tl.sum(p, 1)
        v = _load(v_at + kv_head, key_row, v_row, key < num_keys, WIDTH, BLOCK_WIDTH)
        out = dot(p.to(v.dtype), v, out * less[:, None])
        most = larger
    total = tl.where(inside, total, 1.0)
    _store(out_at + head * WIDTH, row, HEADS * WIDTH, inside, out / total[:, None], WIDTH, BLOCK_WIDTH)
    tl.store(logs_at + row * HEADS + head, most + tl.log2(total), mask=inside)


@kernel()
def _keys(
    k_at: Pointer,
    v_at: Pointer,
    row: Value,
    inside: Value,
    k_row: Value,
    v_row: Value,
    WIDTH: constexpr,
    BLOCK_WIDTH: constexpr,
) -> Any:
    """A block of keys and of their values."""
    return _load(k_at, row, k_row, inside, WIDTH, BLOCK_WIDTH), _load(v_at, row, v_row, inside, WIDTH, BLOCK_WIDTH)


@kernel()
def _queries(
    q_at: Pointer,
    grad_at: Pointer,
    out_at: Pointer,
    row: Value,
    inside: Value,
    q_row: Value,
    grad_row: Value,
    out_row: Value,
    WIDTH: constexpr,
    BLOCK_WIDTH: constexpr,
) -> Any:
    """A block of queries, of the gradient of what they got, and its product with that."""
    q = _load(q_at, row, q_row, inside, WIDTH, BLOCK_WIDTH)
    grad = _load(grad_at, row, grad_row, inside, WIDTH, BLOCK_WIDTH)
    out = _load(out_at, row, out_row, inside, WIDTH, BLOCK_WIDTH)
    return q, grad, tl.sum(grad.to(tl.float32) * out.to(tl.float32), 1)


@kernel("n", "shared", "first", "window", "programs")
def backward_kernel(
    q_at: Pointer,
    k_at: Pointer,
    v_at: Pointer,
    out_at: Pointer,
    grad_at: Pointer,
    logs_at: Pointer,
    grad_q_at: Pointer,
    grad_k_at: Pointer,
    grad_v_at: Pointer,
    parts_at: Pointer,
    cu_q_at: Pointer,
    cu_k_at: Pointer,
    n: Value,
    shared: Value,
    first: Value,
    window: Value,
    scale2: Value,
    scale: Value,
    programs: Value,
    q_row: Value,
    k_row: Value,
    v_row: Value,
    out_row: Value,
    grad_row: Value,
    grad_q_row: Value,
    grad_k_row: Value,
    HEADS: constexpr,
    GROUP: constexpr,
    WIDTH: constexpr,
    SEQUENCES: constexpr,
    BLOCK: constexpr,
    BLOCK_WIDTH: constexpr,
) -> None:
    """The first `programs` are of keys and values, a block of a sequence and a key/value head each, the rest of queries."""
    program = tl.program_id(0)
    if program < programs:
        heads: constexpr = HEADS // GROUP
        sequence, number = _place(program // heads, cu_q_at, cu_k_at, n, shared, first, True, SEQUENCES, BLOCK)
        if sequence < n:
            head = program % heads
            _gradient_of_keys(
                q_at + head * GROUP * WIDTH, k_at + head * WIDTH, v_at + head * WIDTH,
                out_at + head * GROUP * WIDTH, grad_at + head * GROUP * WIDTH, logs_at + head * GROUP,
                grad_k_at + head * WIDTH, grad_v_at + head * WIDTH, parts_at + head * WIDTH, number, sequence,
                cu_q_at, cu_k_at, shared, first, window, scale2, scale, q_row, k_row, v_row, out_row, grad_row, grad_k_row,
                HEADS, GROUP, WIDTH, BLOCK, BLOCK_WIDTH,
            )  # fmt: skip
    else:
        other = program - programs
        sequence, number = _place(other // HEADS, cu_q_at, cu_k_at, n, shared, first, False, SEQUENCES, BLOCK)
        if sequence < n:
            head = other % HEADS
            _gradient_of_queries(
                q_at + head * WIDTH, k_at + head // GROUP * WIDTH, v_at + head // GROUP * WIDTH,
                out_at + head * WIDTH, grad_at + head * WIDTH, logs_at + head, grad_q_at + head * WIDTH, number, sequence,
                cu_q_at, cu_k_at, shared, first, window, scale2, scale, q_row, k_row, v_row, out_row, grad_row, grad_q_row,
                HEADS, WIDTH, BLOCK, BLOCK_WIDTH,
            )  # fmt: skip


@kernel()
def _weights(a: Value, b: Value, scale2: Value, logs: Value, visible: Value, BLOCK: constexpr) -> Any:
    """What a block of queries took of a block of keys; `a` and `b` are these two in either order."""
    scores = dot(a, tl.trans(b), tl.zeros((BLOCK, BLOCK), tl.float32)) * scale2
    return tl.where(visible, tl.exp2(scores - logs), 0.0)


@kernel()
def _gradient_of_queries(
    q_at: Pointer,
    k_at: Pointer,
    v_at: Pointer,
    out_at: Pointer,
    grad_at: Pointer,
    logs_at: Pointer,
    grad_q_at: Pointer,
    number: Value,
    sequence: Value,
    cu_q_at: Pointer,
    cu_k_at: Pointer,
    shared: Value,
    first: Value,
    window: Value,
    scale2: Value,
    scale: Value,
    q_row: Value,
    k_row: Value,
    v_row: Value,
    out_row: Value,
    grad_row: Value,
    grad_q_row: Value,
    HEADS: constexpr,
    WIDTH: constexpr,
    BLOCK: constexpr,
    BLOCK_WIDTH: constexpr,
) -> None:
    start_q, num_queries, own_start, own, seen = _span(sequence, cu_q_at, cu_k_at, shared, first)
    num_keys = seen + own
    ahead = num_keys - num_queries
    query, row, inside = _query_rows(number * BLOCK, start_q, num_queries, BLOCK)
    q, grad, delta = _queries(
        q_at, grad_at, out_at, row, inside, q_row, grad_row, out_row, WIDTH, BLOCK_WIDTH
    )  # fmt: skip
    logs = tl.load(logs_at + row * HEADS, mask=inside, other=0.0)
    grad_q = tl.zeros((BLOCK, BLOCK_WIDTH), tl.float32)
    begin = tl.where(window > 0, tl.maximum(0, number * BLOCK + ahead - window + 1), 0) // BLOCK * BLOCK
    end = tl.minimum(num_keys, ahead + (number + 1) * BLOCK)
    for start in range(limit(begin), limit(end), BLOCK):
        key, key_row = _key_rows(start, own_start, seen, BLOCK)
        k, v = _keys(k_at, v_at, key_row, key < num_keys, k_row, v_row, WIDTH, BLOCK_WIDTH)
        visible = _sees(query[:, None], key[None, :], ahead, num_queries, num_keys, window)
        p = _weights(q, k, scale2, logs[:, None], visible, BLOCK)
        of_p = dot(grad, tl.trans(v), tl.zeros((BLOCK, BLOCK), tl.float32))
        grad_q = dot((p * (of_p - delta[:, None])).to(k.dtype), k, grad_q)
    _store(grad_q_at, row, grad_q_row, inside, grad_q * scale, WIDTH, BLOCK_WIDTH)


@kernel()
def _gradient_of_keys(
    q_at: Pointer,
    k_at: Pointer,
    v_at: Pointer,
    out_at: Pointer,
    grad_at: Pointer,
    logs_at: Pointer,
    grad_k_at: Pointer,
    grad_v_at: Pointer,
    parts_at: Pointer,
    number: Value,
    sequence: Value,
    cu_q_at: Pointer,
    cu_k_at: Pointer,
    shared: Value,
    first: Value,
    window: Value,
    scale2: Value,
    scale: Value,
    q_row: Value,
    k_row: Value,
    v_row: Value,
    out_row: Value,
    grad_row: Value,
    grad_k_row: Value,
    HEADS: constexpr,
    GROUP: constexpr,
    WIDTH: constexpr,
    BLOCK: constexpr,
    BLOCK_WIDTH: constexpr,
) -> None:
    start_q, num_queries, own_start, own, seen = _span(sequence, cu_q_at, cu_k_at, shared, first)
    num_keys, ahead = seen + own, seen + own - num_queries
    key, key_row = _key_rows(number * BLOCK, own_start, seen, BLOCK)
    inside_k = key < num_keys
    k, v = _keys(k_at, v_at, key_row, inside_k, k_row, v_row, WIDTH, BLOCK_WIDTH)
    grad_k, grad_v = tl.zeros((BLOCK, BLOCK_WIDTH), tl.float32), tl.zeros((BLOCK, BLOCK_WIDTH), tl.float32)
    begin = tl.maximum(0, number * BLOCK - ahead) // BLOCK * BLOCK
    end = tl.minimum(num_queries, tl.where(window > 0, (number + 1) * BLOCK - ahead + window - 1, num_queries))
    for head in range(GROUP):
        for start in range(limit(begin), limit(end), BLOCK):
            query, row, inside = _query_rows(start, start_q, num_queries, BLOCK)
            q, grad, delta = _queries(
                q_at + head * WIDTH, grad_at + head * WIDTH, out_at + head * WIDTH, row, inside,
                q_row, grad_row, out_row, WIDTH, BLOCK_WIDTH,
            )  # fmt: skip
            logs = tl.load(logs_at + row * HEADS + head, mask=inside, other=0.0)
            visible = _sees(query[None, :], key[:, None], ahead, num_queries, num_keys, window)
            p = _weights(k, q, scale2, logs[None, :], visible, BLOCK)
            grad_v = dot(p.to(grad.dtype), grad, grad_v)
            of_p = dot(v, tl.trans(grad), tl.zeros((BLOCK, BLOCK), tl.float32))
            grad_k = dot((p * (of_p - delta[None, :])).to(q.dtype), q, grad_k)
    _store(grad_k_at, key_row, grad_k_row, inside_k & (key_row >= shared), grad_k * scale, WIDTH, BLOCK_WIDTH)
    _store(grad_v_at, key_row, grad_k_row, inside_k & (key_row >= shared), grad_v, WIDTH, BLOCK_WIDTH)
    part = (sequence * shared).to(tl.int64) + key_row
    _store(
        parts_at, part, 2 * HEADS // GROUP * WIDTH, inside_k & (key_row < shared), grad_k * scale, WIDTH, BLOCK_WIDTH
    )
    parts_at += HEADS // GROUP * WIDTH
    _store(parts_at, part, 2 * HEADS // GROUP * WIDTH, inside_k & (key_row < shared), grad_v, WIDTH, BLOCK_WIDTH)


@kernel("n", "shared", "first")
def shared_kernel(
    parts_at: Pointer,
    grad_k_at: Pointer,
    grad_v_at: Pointer,
    cu_q_at: Pointer,
    cu_k_at: Pointer,
    n: Value,
    shared: Value,
    first: Value,
    grad_row: Value,
    SIZE: constexpr,
    TOGETHER: constexpr,
    COLUMNS: constexpr,
) -> None:
    """Some columns of one shared key, or of its value: the sum of the sequences' parts; those without keys have none."""
    key, which = tl.program_id(0).to(tl.int64), tl.program_id(1)
    column = tl.program_id(2) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros((COLUMNS,), tl.float32)
    for start in range(0, limit(n), TOGETHER):
        one = start + tl.arange(0, TOGETHER)
        own = tl.load(cu_k_at + one + 1, mask=one < n, other=0) - tl.load(cu_k_at + one, mask=one < n, other=0)
        at = parts_at + ((one[:, None] * shared + key) * 2 + which) * SIZE + column[None, :]
        total += tl.sum(tl.load(at, mask=(own > 0)[:, None] & (column < SIZE)[None, :], other=0.0), 0)
    total = total.to(grad_k_at.dtype.element_ty)
    if which == 0:
        tl.store(grad_k_at + key * grad_row + column, total, mask=column < SIZE)
    else:
        tl.store(grad_v_at + key * grad_row + column, total, mask=column < SIZE)
