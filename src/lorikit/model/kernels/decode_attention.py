"""Attention of one new token of each of B sequences over what is cached of it; before that its key and value are cached.

    out_b = softmax(q_b k_s^T * scale) v_s   over the positions of slot s = slots[b] up to the newest, at most `window`

The cache is (S, K, P, E): positions of one head lie together. The H query heads of K key/value heads form groups of
H / K that read the same keys, so each key is read once. Rows whose slot is S belong to nobody: nothing is read or kept.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from lorikit.model.kernels.rope import rope_reference


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
    store_turned_reference(q, k, v, cos, sin, positions, slots, keys, values)


def decode_attention(
    q: Tensor, keys: Tensor, values: Tensor, slots: Tensor, positions: Tensor, scale: float, window: int = 0
) -> Tensor:
    """q (B, H, E), keys and values (S, K, P, E), slots and positions (B,) int64: where the newest key stands -> (B, H, E).

    A window of 0 is none.
    """
    return decode_attention_reference(q, keys, values, slots, positions, scale, window)


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
