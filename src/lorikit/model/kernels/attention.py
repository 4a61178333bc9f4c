"""Causal attention of packed sequences that are short: forward in one kernel, backward in one, sums in a fixed order.

    s_ij = c q_i . k_j (j seen by i)    p_ij = exp(s_ij - l_i), l_i = log sum_j exp(s_ij)    o_i = sum_j p_ij v_j
    dv_j = sum_i p_ij do_i    ds_ij = p_ij (do_i . v_j - do_i . o_i)    dq_i = c sum_j ds_ij k_j    dk_j = c sum_i ds_ij q_i

FlashAttention (arXiv 2307.08691) is made for long sequences: for rows of some dozen tokens its backward is four kernels, a
float32 gradient of q that is filled with zeros, and gradients of k and v for each query head, which are added up afterwards.
Here a program computes one block of a sequence, reads k and v where they are, also the shared ones, and adds up all query
heads of a key itself. Every gradient is summed by one program, but those of shared keys: one part a sequence, added by a
third kernel.

S queries, T keys, N sequences, H query heads, K key/value heads, E numbers a head, P shared keys.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from lorikit.model.kernels.attention_triton import backward_kernel, forward_kernel, shared_kernel
from lorikit.model.kernels.launch import block, launch, runs_kernel

_LOG2_E = 1.4426950408889634
_BLOCK = 64  # queries and keys of a program
_TOGETHER, _COLUMNS = 16, 128  # sequences and columns that a program adds up at a time
_WARPS = 4  # with one stage: the loops are short, and loading ahead takes registers


@dataclass(frozen=True, slots=True)
class Spans:
    """Where each of N sequences is: its queries among the S, cu_q (N+1,) int32, and its own keys among the T, cu_k (N+1,)
    int32; those from the `first`th on, if they have keys, also see the `shared` keys in front of all.

    The queries of a sequence are its last tokens, as many as it has, or fewer. `window`: keys that a query sees, 0 for all.
    """

    cu_q: Tensor
    cu_k: Tensor
    shared: int = 0
    first: int = 0
    window: int = 0

    def blocks(self, num_queries: int, num_keys: int) -> tuple[int, int]:
        """The most blocks of queries and of keys that sequences of these numbers in all can have."""
        n = len(self.cu_q) - 1
        return num_queries // _BLOCK + n, (num_keys + n * self.shared) // _BLOCK + n


def attention(q: Tensor, k: Tensor, v: Tensor, spans: Spans, scale: float) -> tuple[Tensor, Tensor]:
    """q (S, H, E), k and v (T, K, E) -> o (S, H, E), and l (S, H) float32, the base 2 logarithm of the sums for the backward.

    H is a multiple of K; q, k and v may be views of one product. Raises ValueError when shapes do not fit.
    """
    _check(q, k, v)
    if not runs_kernel(q, k, v):
        return attention_reference(q, k, v, spans, scale)
    q, k, v = (_by_head(t) for t in (q, k, v))
    (queries, heads, width), kv_heads = q.shape, k.shape[1]
    out = torch.empty((queries, heads, width), dtype=q.dtype, device=q.device)
    logs = torch.empty((queries, heads), dtype=torch.float32, device=q.device)
    n = len(spans.cu_q) - 1
    launch(
        forward_kernel,
        (spans.blocks(queries, len(k))[0], heads),
        q,
        k,
        v,
        out,
        logs,
        spans.cu_q,
        spans.cu_k,
        n,
        spans.shared,
        spans.first,
        spans.window,
        scale * _LOG2_E,
        q.stride(0),
        k.stride(0),
        v.stride(0),
        HEADS=heads,
        GROUP=heads // kv_heads,
        WIDTH=width,
        **_sizes(n, width),
        num_warps=_WARPS,
        num_stages=1,
    )
    return out, logs


def attention_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, logs: Tensor, spans: Spans, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """grad (S, H, E) of `out` -> the gradients of q, k and v; views of one (T, (H + 2 K) E) buffer where S is T.

    The rest is as given to `attention` and returned by it.
    """
    _check(q, k, v)
    grads = _room(q, k)
    if not runs_kernel(q, k, v, grad):
        found = attention_backward_reference(grad, q, k, v, out, logs, spans, scale)
        for into, values in zip(grads, found, strict=True):
            into.copy_(values)
        return grads
    q, k, v, grad, out = (_by_head(t) for t in (q, k, v, grad, out))
    (queries, heads, width), (keys, kv_heads, _) = q.shape, k.shape
    n, (query_blocks, key_blocks) = len(spans.cu_q) - 1, spans.blocks(queries, keys)
    parts = torch.empty((n, spans.shared, 2, kv_heads, width), dtype=torch.float32, device=q.device)
    where = (spans.cu_q, spans.cu_k, n, spans.shared, spans.first)
    launch(
        backward_kernel,
        (key_blocks * kv_heads + query_blocks * heads,),
        *(q, k, v, out, grad, logs, *grads, parts, *where),
        spans.window,
        scale * _LOG2_E,
        scale,
        key_blocks * kv_heads,
        *[t.stride(0) for t in (q, k, v, out, grad, grads[0], grads[1])],
        HEADS=heads,
        GROUP=heads // kv_heads,
        WIDTH=width,
        **_sizes(n, width),
        num_warps=_WARPS,
        num_stages=1,
    )
    if spans.shared:
        few = kv_heads * width
        launch(
            shared_kernel,
            (spans.shared, 2, (few + _COLUMNS - 1) // _COLUMNS),
            *(parts, *grads[1:], *where, grads[1].stride(0)),
            SIZE=few,
            TOGETHER=_TOGETHER,
            COLUMNS=_COLUMNS,
            num_warps=4,
        )
    return grads


def attention_reference(q: Tensor, k: Tensor, v: Tensor, spans: Spans, scale: float) -> tuple[Tensor, Tensor]:
    """What the forward computes, in torch, in float32 where the tensors are in less."""
    out, logs = torch.zeros_like(q), q.new_zeros(q.shape[:2], dtype=torch.float32)
    for rows, keys, seen in _sequences(spans):
        scores = _scores(q[rows], k[keys], seen, scale)
        total = scores.logsumexp(-1)  # (H, S)
        out[rows] = torch.einsum("hij,jhe->ihe", (scores - total[..., None]).exp(), _spread(v[keys], q)).to(q.dtype)
        logs[rows] = (total * _LOG2_E).t().float()
    return out, logs


def attention_backward_reference(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, logs: Tensor, spans: Spans, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """What the backward computes, in torch, in float32 where the tensors are in less."""
    wide = torch.promote_types(q.dtype, torch.float32)
    found = tuple(torch.zeros_like(t, dtype=wide) for t in (q, k, v))
    group = q.shape[1] // k.shape[1]
    for rows, keys, seen in _sequences(spans):
        p = (_scores(q[rows], k[keys], seen, scale) - logs[rows].t()[..., None] / _LOG2_E).exp()
        g = grad[rows].to(wide)
        delta = (g * out[rows]).sum(-1).t()[..., None]  # (H, S, 1)
        ds = p * (torch.einsum("ihe,jhe->hij", g, _spread(v[keys], q)) - delta) * scale
        found[0][rows] = torch.einsum("hij,jhe->ihe", ds, _spread(k[keys], q))
        dk, dv = torch.einsum("hij,ihe->jhe", ds, q[rows].to(wide)), torch.einsum("hij,ihe->jhe", p, g)
        found[1].index_add_(0, keys, _grouped(dk, group))
        found[2].index_add_(0, keys, _grouped(dv, group))
    return found[0].to(q.dtype), found[1].to(k.dtype), found[2].to(v.dtype)


def _sequences(spans: Spans) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Of each sequence with queries its rows (S',) among the queries, its keys (T',), and which of them a query sees."""
    found = []
    places = zip(pairwise(spans.cu_q.tolist()), pairwise(spans.cu_k.tolist()), strict=True)
    for number, ((begin, end), (start, stop)) in enumerate(places):
        if end == begin or stop == start:
            continue
        shared = spans.shared if number >= spans.first else 0
        keys = torch.cat([torch.arange(shared), torch.arange(start, stop)])
        back = torch.arange(len(keys) - (end - begin), len(keys))[:, None] - torch.arange(len(keys))
        seen = (back >= 0) & (back < (spans.window or len(keys)))
        device = spans.cu_q.device
        found.append((torch.arange(begin, end).to(device), keys.to(device), seen.to(device)))
    return found


def _scores(q: Tensor, k: Tensor, seen: Tensor, scale: float) -> Tensor:
    """(H, S, T), minus infinity where a query does not see a key."""
    wide = torch.promote_types(q.dtype, torch.float32)
    return (torch.einsum("ihe,jhe->hij", q.to(wide), _spread(k, q)) * scale).masked_fill(~seen, -torch.inf)


def _spread(t: Tensor, q: Tensor) -> Tensor:
    """(T, K, E) -> (T, H, E) in float32 at least."""
    return t.to(torch.promote_types(t.dtype, torch.float32)).repeat_interleave(q.shape[1] // t.shape[1], 1)


def _room(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """For the gradients of q, k and v: views of one buffer, where q has as many rows as k."""
    (queries, heads, width), (keys, kv_heads, _) = q.shape, k.shape
    in_one = (keys, heads + 2 * kv_heads, width) if queries == keys else (keys, 2 * kv_heads, width)
    rows = torch.empty(in_one, dtype=q.dtype, device=q.device)
    into_k, into_v = rows[:, -2 * kv_heads : -kv_heads], rows[:, -kv_heads:]
    into_q = rows[:, :heads] if queries == keys else torch.empty(q.shape, dtype=q.dtype, device=q.device)
    return into_q, into_k, into_v


def _grouped(t: Tensor, group: int) -> Tensor:
    """(T, H, E) -> (T, K, E): the sums over the query heads of a key/value head."""
    return t.view(len(t), -1, group, t.shape[2]).sum(2)


def _check(q: Tensor, k: Tensor, v: Tensor) -> None:
    if k.shape != v.shape or q.shape[2:] != k.shape[2:] or not k.shape[1] or q.shape[1] % k.shape[1]:
        raise ValueError(
            f"q {tuple(q.shape)} must be (S, H, E), k {tuple(k.shape)} and v {tuple(v.shape)} (T, K, E), H a multiple of K"
        )


def _by_head(t: Tensor) -> Tensor:
    """Heads side by side in each row, as the kernels take them."""
    return t if t.stride(2) == 1 and t.stride(1) == t.shape[2] else t.contiguous()


def _sizes(n: int, width: int) -> dict[str, Any]:
    return {"SEQUENCES": block(n, 64), "BLOCK": _BLOCK, "BLOCK_WIDTH": block(width)}
