"""Dropout masks that are computed, not stored: a 32-bit mix of (seed, stream, row, column), the same on every device.

    kept(t, d) = mix(r(t) + c(d)) >= p 2^32,   r(t) = hash(t + k1),   c(d) = hash(d + k2)
    mix(v): v ^= v >> 16;  v *= C1;  v ^= v >> 15;  v *= C2                (modulo 2^32, unsigned)

k1 and k2 are hashes of seed and stream. A stream is one use of dropout (a module of a layer), so that forward and
backward get equal masks from equal numbers. Constants and shifts are lowbias32's (Chris Wellons, hash-prospector, public
domain); `hash` is all of it, `mix` lacks its last shift, which changes only low bits where a comparison reads the high
ones. Rows and columns are hashed first because the mix alone correlates elements at some fixed distances: counted through
one after the other, those 12,288 apart were correlated by 0.002.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lorikit.model.kernels.launch import INTERPRETED, Pointer, Value, constexpr, kernel, launch, tl

_C1, _C2, _STEP = 0x7FEB352D, 0x846CA68B, 0x9E3779B9
_WORD = 2**32 - 1


def dropout(x: Tensor, p: float, seed: int | Tensor, stream: int) -> Tensor:
    """x of any shape -> x / (1 - p) where `dropout_mask` keeps it, else 0; contiguous, in x's dtype."""
    return torch.where(dropout_mask(seed, stream, x.shape, p, x.device), x * (1 / (1 - p)), 0)


def dropout_mask(
    seed: int | Tensor, stream: int, shape: Sequence[int], p: float, device: torch.device | str = "cpu"
) -> Tensor:
    """Booleans of `shape` (its last dimension the columns, all others the rows): which elements are kept.

    Equal arguments give equal masks, on the CPU and on a GPU. seed: 64 bits, an int or an int64 tensor () on `device`,
    which a replayed CUDA graph reads anew; stream: an int of 32 bits. Raises ValueError when p is outside [0, 1).
    """
    device = torch.device(device)
    mask = torch.empty(tuple(shape), dtype=torch.bool, device=device)
    if tl is None or mask.numel() == 0 or not (mask.is_cuda or INTERPRETED):
        return dropout_mask_reference(seed, stream, shape, p, device)
    width = mask.shape[-1] if mask.dim() else 1
    rows = mask.numel() // width
    grid = ((rows + 15) // 16, (width + 127) // 128)
    numbers = stream, signed_threshold(p), rows, width
    launch(_mask_kernel, grid, seed_tensor(seed, device), mask.view(torch.int8), *numbers, ROWS=16, COLUMNS=128)
    return mask


def seed_tensor(seed: int | Tensor, device: torch.device) -> Tensor:
    """The seed as the kernels read it: int64 () on the device. An int is written there without a synchronisation."""
    return seed if isinstance(seed, Tensor) else torch.full((), _signed(seed, 64), dtype=torch.int64, device=device)


def signed_threshold(p: float) -> int:
    """p 2^32 less 2^31, for the comparison as signed numbers. ValueError when p is outside [0, 1)."""
    if not 0 <= p < 1:
        raise ValueError(f"dropout p is {p}; it must be at least 0 and below 1")
    return min(round(p * 2**32), _WORD) - 2**31


def dropout_mask_reference(
    seed: int | Tensor, stream: int, shape: Sequence[int], p: float, device: torch.device | str
) -> Tensor:
    """What the kernel computes, in torch: in int32, whose sums and products wrap as those of unsigned numbers do.

    On a CPU that takes 1.2 ns an element, a sixth of what masked int64 takes and a quarter of torch's own dropout.
    """
    threshold, size, width = signed_threshold(p), torch.Size(shape), shape[-1] if len(shape) else 1
    rows = size.numel() // max(width, 1)
    key_1, key_2 = (_signed(key, 32) for key in _keys(int(seed) & (2**64 - 1), stream & _WORD))
    numbers = torch.cat(
        [torch.arange(n, dtype=torch.int32, device=device) + key for n, key in ((rows, key_1), (width, key_2))]
    )
    row, column = torch.split(_hash_all(numbers), [rows, width])  # in one go: on a CPU the starts of operations count
    return (_mix_all(row[:, None] + column) >= threshold).view(size)


def _mix_all(value: Tensor) -> Tensor:
    """`mix` of every element, in place. The shift of a signed number copies its sign, which the mask takes away."""
    shifted = torch.bitwise_right_shift(value, 16)
    value.bitwise_xor_(shifted.bitwise_and_(0xFFFF)).mul_(_C1)
    torch.bitwise_right_shift(value, 15, out=shifted)
    return value.bitwise_xor_(shifted.bitwise_and_(0x1FFFF)).mul_(_signed(_C2, 32))


def _hash_all(value: Tensor) -> Tensor:
    value = _mix_all(value)
    return value.bitwise_xor_((value >> 16).bitwise_and_(0xFFFF))


def _keys(seed: int, stream: int) -> tuple[int, int]:
    state = _hash(_hash(seed & _WORD) + (seed >> 32) + _STEP)
    key = _hash(state + stream)
    return key, _hash((key ^ state) + _STEP)


def _hash(value: int) -> int:
    value &= _WORD
    value = (value ^ value >> 16) * _C1 & _WORD
    value = (value ^ value >> 15) * _C2 & _WORD
    return value ^ value >> 16


def _signed(value: int, bits: int) -> int:
    value &= 2**bits - 1
    return value - 2**bits if value >> (bits - 1) else value


@kernel()
def mix_each(value: Value) -> Any:
    """`mix` of uint32 numbers."""
    value = (value ^ (value >> 16)) * 0x7FEB352D
    return (value ^ (value >> 15)) * 0x846CA68B


@kernel()
def hash_each(value: Value) -> Any:
    """`hash` of uint32 numbers."""
    value = mix_each(value)
    return value ^ (value >> 16)


@kernel()
def keys_of(seed: Value, stream: Value) -> Any:
    """(k1, k2) of a seed (int64) and a stream."""
    low, high = seed.to(tl.uint32), (seed >> 32).to(tl.uint32)
    state = hash_each(hash_each(low) + high + 0x9E3779B9)
    key = hash_each(state + stream.to(tl.uint32))
    return key, hash_each((key ^ state) + 0x9E3779B9)


@kernel()
def kept(row_hash: Value, column_hash: Value, threshold: Value) -> Any:
    """Which elements of the tile (rows, columns) are kept, from the hashes r and c."""
    return mix_each(row_hash + column_hash).to(tl.int32, bitcast=True) >= threshold


@kernel("stream", "threshold", "num_rows", "width")
def _mask_kernel(
    seed_at: Pointer,
    mask_at: Pointer,
    stream: Value,
    threshold: Value,
    num_rows: Value,
    width: Value,
    ROWS: constexpr,
    COLUMNS: constexpr,
) -> None:
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS))[:, None]
    column = (tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS))[None, :]
    key_1, key_2 = keys_of(tl.load(seed_at), stream)
    keep = kept(hash_each(row.to(tl.uint32) + key_1), hash_each(column.to(tl.uint32) + key_2), threshold)
    tl.store(mask_at + row.to(tl.int64) * width + column, keep.to(tl.int8), mask=(row < num_rows) & (column < width))
