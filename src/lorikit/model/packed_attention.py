"""Attention over packed sequences: for our own decoder, and for models of transformers through its AttentionInterface.

Each sequence attends causally to itself only: out[s:e] = softmax(q[s:e] k[s:e]^T * scale + causal) v[s:e] for each pair
(s, e) of cu_seqlens. On CUDA in half precision it is our own kernel for short sequences (kernels/attention.py), one call of
torch's varlen_attn (FlashAttention) or of FlashAttention-4 for long ones, elsewhere one scaled_dot_product_attention a
sequence; no (T, T) mask is ever built.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import scaled_dot_product_attention

from lorikit.model import flash_attention_4
from lorikit.model.kernels.attention import Spans, attention, attention_backward
from lorikit.model.kernels.launch import runs_kernel

NAME = "lorikit_packed"
SHORT = 1024  # tokens of the longest sequence up to which our own kernel takes them


@cache
def register() -> str:
    """Make the attention known to transformers, once; returns its name for `set_attn_implementation`."""
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, packed_attention)
    return NAME


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    cu_seq_lens_q: Tensor | None = None,
    max_length_q: int | None = None,
    **unsupported: Any,
) -> tuple[Tensor, None]:
    """query (1, H, T, D), key and value (1, Hkv, T, D) -> (1, T, H, D).

    Raises ValueError for what it does not compute (soft capping, attention sinks, dropout, a mask), so that the caller
    takes another way instead of a wrong result.
    """
    refused = [k for k in ("softcap", "s_aux", "position_bias") if unsupported.get(k) is not None]
    if refused or dropout or attention_mask is not None or cu_seq_lens_q is None or query.shape[0] != 1:
        raise ValueError(f"packed attention cannot compute {', '.join(refused) or 'dropout, masks or padded batches'}")
    assert max_length_q is not None
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))  # (T, heads, D)
    whole = Sequences(cu_seq_lens_q, cu_seq_lens_q, max_length_q, max_length_q)
    return attend(q, k, v, whole, scaling, sliding_window or 0)[None], None


@dataclass(frozen=True, slots=True)
class Keys:
    """Which of the T packed tokens the keys and values are of, where sequences share their first P tokens.

    index (U,); the T tokens among these U: own (T - P,) for those behind the shared ones, copies (M, P) for the shared, which
    stand first among the T; all int64. cu (N+1,) int32: where each sequence's own tokens begin and end among the T. `first`
    is 1 where the first sequence is the shared tokens themselves, else 0.
    """

    index: Tensor
    own: Tensor
    copies: Tensor
    cu: Tensor
    first: int


@dataclass(frozen=True, slots=True)
class Sequences:
    """Where the sequences of packed queries and of packed keys begin and end: (N+1,) int32 each, and the longest.

    The queries of a sequence are its last tokens; where `cu_q` is `cu_k` they are all of them. With `keys`, `cu_k` counts
    through `keys.index`.
    """

    cu_q: Tensor
    cu_k: Tensor
    longest_q: int
    longest_k: int
    keys: Keys | None = None

    def spans(self, window: int) -> Spans:
        """The same as our own kernel takes it."""
        if self.keys is None:
            return Spans(self.cu_q, self.cu_k, window=window)
        return Spans(self.cu_q, self.keys.cu, self.keys.copies.shape[1], self.keys.first, window)


def attend(q: Tensor, k: Tensor, v: Tensor, sequences: Sequences, scale: float | None, window: int) -> Tensor:
    """q (S, H, D), k and v (T, Hkv, D) -> (S, H, D), each sequence causal for itself; a window of 0 is none."""
    if is_varlen(q, q.shape[-1]) and sequences.longest_k <= SHORT and runs_kernel(q, k, v):
        out: Tensor = _Short.apply(  # type: ignore[no-untyped-call]
            q, k, v, sequences.spans(window), q.shape[-1] ** -0.5 if scale is None else scale
        )
        return out
    if sequences.keys is not None:
        k, v = (_Gather.apply(t, sequences.keys) for t in (k, v))  # type: ignore[no-untyped-call]
    if is_varlen(q, q.shape[-1]):
        return _varlen(q, k, v, sequences, scale, (window - 1 if window else -1, 0))
    return _by_sequence(q, k, v, sequences, scale, window)


class _Short(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, spans: Spans, scale: float) -> Tensor:
        """kernels/attention.py."""
        out, logs = attention(q, k, v, spans, scale)
        ctx.save_for_backward(q, k, v, out, logs)
        ctx.spans, ctx.scale = spans, scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Where there are as many queries as keys, the gradients are views of one buffer."""
        q, k, v, out, logs = ctx.saved_tensors
        return *attention_backward(grad, q, k, v, out, logs, ctx.spans, ctx.scale), None, None


def side_by_side(grads: Sequence[Tensor]) -> Tensor | None:
    """Tensors (T, heads, D) as one (T, all of them), if they already lie so in memory, as `attend`'s gradients may."""
    first, width = grads[0], sum(t[0].numel() for t in grads)
    at = first.storage_offset()
    for t in grads:
        same = t.untyped_storage().data_ptr() == first.untyped_storage().data_ptr() and len(t) == len(first)
        if not (same and t.storage_offset() == at and t.stride() == (width, t.shape[2], 1)):
            return None
        at += t[0].numel()
    return first.as_strided((len(first), width), (width, 1))


class _Gather(torch.autograd.Function):
    """t (T, heads, D) -> t[index] (U, heads, D); the gradients of copies are added in a fixed order, in float32."""

    @staticmethod
    def forward(ctx: Any, t: Tensor, keys: Keys) -> Tensor:
        """The rows of the index."""
        ctx.keys = keys
        return t.index_select(0, keys.index)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        """Own rows as they are, shared ones as the sum of their copies."""
        keys = ctx.keys
        copies = grad.index_select(0, keys.copies.flatten()).view(*keys.copies.shape, *grad.shape[1:])
        shared = copies.sum(0, dtype=torch.promote_types(grad.dtype, torch.float32)).to(grad.dtype)
        return torch.cat([shared, grad.index_select(0, keys.own)]), None


def is_varlen(tensor: Tensor, head_dim: int) -> bool:
    """Whether tensors of this device and type, with heads of this size, go to FlashAttention in one call."""
    return tensor.is_cuda and tensor.dtype in (torch.float16, torch.bfloat16) and head_dim % 8 == 0


def _varlen(
    q: Tensor, k: Tensor, v: Tensor, sequences: Sequences, scale: float | None, window: tuple[int, int]
) -> Tensor:
    if window[0] < 0 and flash_attention_4.takes(q, sequences.longest_k):
        at = sequences
        return flash_attention_4.causal(q, k, v, at.cu_q, at.cu_k, at.longest_q, at.longest_k, scale)
    from torch.nn.attention.varlen import varlen_attn

    grouped: dict[str, Any] = {"enable_gqa": True} if _takes_enable_gqa() and q.shape[1] != k.shape[1] else {}
    at = sequences
    longest = (at.longest_q, at.longest_k)
    out = varlen_attn(q, k, v, at.cu_q, at.cu_k, *longest, scale=scale, window_size=window, **grouped)
    assert isinstance(out, Tensor)
    return out


@cache
def _takes_enable_gqa() -> bool:
    from torch.nn.attention.varlen import varlen_attn

    return "enable_gqa" in inspect.signature(varlen_attn).parameters


def _by_sequence(q: Tensor, k: Tensor, v: Tensor, sequences: Sequences, scale: float | None, window: int) -> Tensor:
    out = []
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))  # (1, heads, tokens, D)
    for (start, end), (first, last) in zip(
        pairwise(sequences.cu_q.tolist()), pairwise(sequences.cu_k.tolist()), strict=True
    ):
        length, seen = end - start, last - first
        mask = None
        if length < seen or 0 < window < seen:  # torch's own causal mask is for as many queries as keys
            order = torch.arange(seen, device=q.device)
            back = order[-length:, None] - order[None, :]
            mask = (back >= 0) & (back < (window or seen))
        out.append(
            scaled_dot_product_attention(
                q[:, :, start:end],
                k[:, :, first:last],
                v[:, :, first:last],
                attn_mask=mask,
                is_causal=mask is None,
                scale=scale,
                enable_gqa=q.shape[1] != k.shape[1],
            )[0].transpose(0, 1)
        )
    return torch.cat(out)  # (S, heads, D), contiguous: the caller's flattening needs no copy
