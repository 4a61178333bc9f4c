"""Attention of one new token of each of B sequences over what is cached of it; before that its key and value are cached.

    out_b = softmax(q_b k_s^T * scale) v_s   over the positions of slot s = slots[b] up to the newest, at most `window`

The cache is (S, K, P, E): positions of one head lie together. The H query heads of K key/value heads form groups of
H / K that read the same keys, so each key is read once. Where B K programs would leave multiprocessors idle, the positions
are split among several, each leaving sum, maximum and weighted values, which a second kernel joins (flash decoding, Dao et
al. 2023). Rows whose slot is S belong to nobody: nothing is read or kept.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from lorikit.model.kernels.launch import (
    _INTERPRETED,
    Pointer,
    Value,
    block,
    constexpr,
    dot,
    kernel,
    launch,
    runs_kernel,
    tl,
)
from lorikit.model.kernels.rope import rope_reference

_PROGRAMS = 528  # four for each multiprocessor of an H100
_MOST_SPLITS = 32
_TILE = 64  # positions at a time


def store_turned(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
    slots: Tensor,
    keys: Tensor,
    values: Tensor,
) -> None:
    """Turn q (B, H, E) in place by rope and put k, turned, and v (B, K, E) into keys and values (S, K, P, E), each at its
    slot and position (B,) int64."""
    if not (_strided(q, k, v, keys, values) and runs_kernel(cos, sin)):
        return store_turned_reference(q, k, v, cos, sin, positions, slots, keys, values)
    (rows, heads, width), kv_heads = q.shape, k.shape[1]
    launch(
        _store_kernel,
        (rows, heads + 2 * kv_heads),
        q,
        k,
        v,
        cos,
        sin,
        positions,
        slots,
        keys,
        values,
        *q.stride()[:2],
        *k.stride()[:2],
        *v.stride()[:2],
        *keys.stride()[:3],
        keys.shape[0],
        HEADS=heads,
        KV_HEADS=kv_heads,
        HALF=width // 2,
        BLOCK_HALF=block(width // 2, 1),
        num_warps=1,
    )
    return None


def decode_attention(
    q: Tensor, keys: Tensor, values: Tensor, slots: Tensor, positions: Tensor, scale: float, window: int = 0
) -> Tensor:
    """q (B, H, E), keys and values (S, K, P, E), slots and positions (B,) int64: where the newest key stands -> (B, H, E).

    A window of 0 is none.
    """
    if not _strided(q, keys, values) or keys.stride() != values.stride():
        return decode_attention_reference(q, keys, values, slots, positions, scale, window)
    (rows, heads, width), kv_heads = q.shape, keys.shape[1]
    splits = _splits(rows * kv_heads, window or keys.shape[2])
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    parts = torch.empty((rows, heads, splits, width) if splits > 1 else 1, dtype=torch.float32, device=q.device)
    sums = torch.empty((rows, heads, 2, splits), dtype=torch.float32, device=q.device)
    launch(
        _attend_kernel,
        (rows, kv_heads, splits),
        q,
        keys,
        values,
        slots,
        positions,
        out,
        parts,
        sums,
        *q.stride()[:2],
        *keys.stride()[:3],
        keys.shape[0],
        scale,
        window,
        GROUP=heads // kv_heads,
        BLOCK_GROUP=block(heads // kv_heads),
        WIDTH=width,
        BLOCK_WIDTH=block(width),
        TILE=_TILE,
        SPLITS=splits,
        num_warps=4,
    )
    if splits > 1:
        launch(
            _join_kernel, (rows * heads,), parts, sums, out, WIDTH=width, BLOCK_WIDTH=block(width), SPLITS=splits, num_warps=2
        )  # fmt: skip
    return out


def _splits(programs: int, positions: int) -> int:
    """A power of two: enough programs for the device, none with less than a tile of the longest."""
    most = min(_MOST_SPLITS, (positions + _TILE - 1) // _TILE, max(1, _PROGRAMS // programs))
    return 1 << (most.bit_length() - 1)


def _strided(*tensors: Tensor) -> bool:
    return runs_kernel(*tensors) and all(t.stride(-1) == 1 for t in tensors)


def store_turned_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
    slots: Tensor,
    keys: Tensor,
    values: Tensor,
) -> None:
    """What the kernel computes, in torch; all rows have a slot."""
    rope_reference(q, cos, sin, positions)
    rope_reference(k, cos, sin, positions)
    keys[slots, :, positions], values[slots, :, positions] = k, v


def decode_attention_reference(
    q: Tensor, keys: Tensor, values: Tensor, slots: Tensor, positions: Tensor, scale: float, window: int = 0
) -> Tensor:
    """What the kernel computes, in torch; all rows have a slot."""
    (_, heads, width), kv_heads = q.shape, keys.shape[1]
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    for row, (slot, newest) in enumerate(zip(slots.tolist(), positions.tolist(), strict=True)):
        first = max(0, newest + 1 - window) if window else 0
        # The query heads of a group take the place of a sequence's queries: all of them see all keys.
        grouped = q[row].view(1, kv_heads, heads // kv_heads, width)
        seen = keys[None, slot, :, first : newest + 1], values[None, slot, :, first : newest + 1]
        out[row] = scaled_dot_product_attention(grouped, *seen, scale=scale).view(heads, width)
    return out


@kernel("slots_count")
def _store_kernel(
    q_at: Pointer,
    k_at: Pointer,
    v_at: Pointer,
    cos_at: Pointer,
    sin_at: Pointer,
    position_at: Pointer,
    slot_at: Pointer,
    keys_at: Pointer,
    values_at: Pointer,
    q_row: Value,
    q_head: Value,
    k_row: Value,
    k_head: Value,
    v_row: Value,
    v_head: Value,
    cache_slot: Value,
    cache_head: Value,
    cache_position: Value,
    slots_count: Value,
    HEADS: constexpr,
    KV_HEADS: constexpr,
    HALF: constexpr,
    BLOCK_HALF: constexpr,
) -> None:
    """One head of one row: of its q first, then of k, then of v."""
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    slot, position = tl.load(slot_at + row).to(tl.int64), tl.load(position_at + row).to(tl.int64)
    column = tl.arange(0, BLOCK_HALF)
    inside = column < HALF
    kv = (head - HEADS) % KV_HEADS
    to = slot * cache_slot + kv.to(tl.int64) * cache_head + position * cache_position + column
    kept = inside & (slot < slots_count)
    if head >= HEADS + KV_HEADS:
        at = v_at + row * v_row + kv * v_head + column
        tl.store(values_at + to, tl.load(at, mask=inside, other=0.0), mask=kept)
        tl.store(values_at + to + HALF, tl.load(at + HALF, mask=inside, other=0.0), mask=kept)
    else:
        c = tl.load(cos_at + position * HALF + column, mask=inside, other=0.0).to(tl.float32)
        s = tl.load(sin_at + position * HALF + column, mask=inside, other=0.0).to(tl.float32)
        at = k_at + row * k_row + kv * k_head + column
        if head < HEADS:
            at = q_at + row * q_row + head * q_head + column
        first = tl.load(at, mask=inside, other=0.0).to(tl.float32)
        second = tl.load(at + HALF, mask=inside, other=0.0).to(tl.float32)
        turned = (first * c - second * s).to(q_at.dtype.element_ty)
        turned_second = (second * c + first * s).to(q_at.dtype.element_ty)
        if head < HEADS:
            tl.store(at, turned, mask=inside)
            tl.store(at + HALF, turned_second, mask=inside)
        else:
            tl.store(keys_at + to, turned, mask=kept)
            tl.store(keys_at + to + HALF, turned_second, mask=kept)


@kernel()
def _tile(
    q: Value,
    base: Value,
    at: Value,
    end: Value,
    cache_position: Value,
    scale: Value,
    sum_: Value,
    total: Value,
    most: Value,
    WIDTH: constexpr,
    TILE: constexpr,
) -> Any:
    """The running softmax with the positions from `at` on; base: keys and values of position 0, by column."""
    position = at + tl.arange(0, TILE)
    there = (position < end)[:, None] & (tl.arange(0, q.shape[1]) < WIDTH)[None, :]
    where = position[:, None].to(tl.int64) * cache_position
    k = tl.load(base[0] + where, mask=there, other=0.0)
    score = dot(q, tl.trans(k), tl.zeros((q.shape[0], TILE), tl.float32)) * scale
    score = tl.where((position < end)[None, :], score, -float("inf"))
    higher = tl.maximum(most, tl.max(score, 1))
    weight, old = tl.exp(score - higher[:, None]), tl.exp(most - higher)
    v = tl.load(base[1] + where, mask=there, other=0.0)
    sum_ = dot(weight.to(v.dtype), v, sum_ * old[:, None])
    return sum_, total * old + tl.sum(weight, 1), higher


@kernel("slots_count", "window")
def _attend_kernel(
    q_at: Pointer,
    keys_at: Pointer,
    values_at: Pointer,
    slot_at: Pointer,
    position_at: Pointer,
    out_at: Pointer,
    parts_at: Pointer,
    sums_at: Pointer,
    q_row: Value,
    q_head: Value,
    cache_slot: Value,
    cache_head: Value,
    cache_position: Value,
    slots_count: Value,
    scale: Value,
    window: Value,
    GROUP: constexpr,
    BLOCK_GROUP: constexpr,
    WIDTH: constexpr,
    BLOCK_WIDTH: constexpr,
    TILE: constexpr,
    SPLITS: constexpr,
) -> None:
    """One group of heads of one row over its share of the positions."""
    row, kv, split = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    slot = tl.load(slot_at + row).to(tl.int64)
    length = (tl.load(position_at + row) + 1).to(tl.int32)
    length = tl.where(slot < slots_count, length, 0)
    first = tl.where(window > 0, tl.maximum(length - window, 0), 0)
    share = (length - first + SPLITS - 1) // SPLITS
    share = (share + TILE - 1) // TILE * TILE
    start = first + split * share
    end = tl.minimum(start + share, length)
    member, column = tl.arange(0, BLOCK_GROUP), tl.arange(0, BLOCK_WIDTH)
    head = kv * GROUP + member
    inside = (member < GROUP)[:, None] & (column < WIDTH)[None, :]
    q = tl.load(q_at + row * q_row + head[:, None] * q_head + column[None, :], mask=inside, other=0.0)
    base = slot * cache_slot + kv.to(tl.int64) * cache_head + column[None, :]
    most = tl.full((BLOCK_GROUP,), -float("inf"), tl.float32)
    total = tl.zeros((BLOCK_GROUP,), tl.float32)
    sum_ = tl.zeros((BLOCK_GROUP, BLOCK_WIDTH), tl.float32)
    here = keys_at + base, values_at + base
    if _INTERPRETED:  # whose range takes no tensors
        at = start
        while at < end:
            sum_, total, most = _tile(q, here, at, end, cache_position, scale, sum_, total, most, WIDTH, TILE)
            at += TILE
    else:
        for at in range(start, end, TILE):
            sum_, total, most = _tile(q, here, at, end, cache_position, scale, sum_, total, most, WIDTH, TILE)
    if SPLITS == 1:
        result = sum_ / tl.where(total > 0, total, 1.0)[:, None]
        to = (row * tl.num_programs(1) * GROUP + head[:, None]) * WIDTH + column[None, :]
        tl.store(out_at + to, result.to(out_at.dtype.element_ty), mask=inside)
    else:
        at_head = row * tl.num_programs(1) * GROUP + head
        tl.store(parts_at + (at_head[:, None] * SPLITS + split) * WIDTH + column[None, :], sum_, mask=inside)
        tl.store(sums_at + at_head * 2 * SPLITS + split, most, mask=member < GROUP)
        tl.store(sums_at + (at_head * 2 + 1) * SPLITS + split, total, mask=member < GROUP)


@kernel()
def _join_kernel(
    parts_at: Pointer,
    sums_at: Pointer,
    out_at: Pointer,
    WIDTH: constexpr,
    BLOCK_WIDTH: constexpr,
    SPLITS: constexpr,
) -> None:
    """The shares of one head of one row."""
    head = tl.program_id(0).to(tl.int64)
    split, column = tl.arange(0, SPLITS), tl.arange(0, BLOCK_WIDTH)
    most = tl.load(sums_at + head * 2 * SPLITS + split)
    total = tl.load(sums_at + (head * 2 + 1) * SPLITS + split)
    highest = tl.max(most, 0)
    factor = tl.where(total > 0, tl.exp(most - highest), 0.0)
    at = parts_at + (head * SPLITS + split[:, None]) * WIDTH + column[None, :]
    parts = tl.load(at, mask=(column < WIDTH)[None, :], other=0.0)
    whole = tl.sum(total * factor, 0)
    result = tl.sum(parts * factor[:, None], 0) / tl.where(whole > 0, whole, 1.0)
    tl.store(out_at + head * WIDTH + column, result.to(out_at.dtype.element_ty), mask=column < WIDTH)
