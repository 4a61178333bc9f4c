"""Attention over packed sequences for models of transformers, through its public AttentionInterface.

Each sequence attends causally to itself only: out[s:e] = softmax(q[s:e] k[s:e]^T * scale + causal) v[s:e] for each pair
(s, e) of cu_seqlens. On CUDA in half precision it is one call of torch's varlen_attn (FlashAttention), elsewhere one
scaled_dot_product_attention a sequence; no (T, T) mask is ever built.
"""

from __future__ import annotations

import inspect
from functools import cache
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

NAME = "lorikit_packed"


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
    window = sliding_window or 0
    if query.is_cuda and query.dtype in (torch.float16, torch.bfloat16) and query.shape[-1] % 8 == 0:
        assert max_length_q is not None
        q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))  # (T, H, D)
        out = _varlen(q, k, v, cu_seq_lens_q, max_length_q, scaling, (window - 1 if window else -1, 0))
        return out[None], None
    return _by_sequence(query, key, value, cu_seq_lens_q.tolist(), scaling, window).transpose(1, 2), None


def _varlen(
    q: Tensor, k: Tensor, v: Tensor, cu: Tensor, longest: int, scale: float | None, window: tuple[int, int]
) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    grouped: dict[str, Any] = {"enable_gqa": True} if _takes_enable_gqa() and q.shape[1] != k.shape[1] else {}
    out = varlen_attn(q, k, v, cu, cu, longest, longest, scale=scale, window_size=window, **grouped)
    assert isinstance(out, Tensor)
    return out


@cache
def _takes_enable_gqa() -> bool:
    from torch.nn.attention.varlen import varlen_attn

    return "enable_gqa" in inspect.signature(varlen_attn).parameters


def _by_sequence(q: Tensor, k: Tensor, v: Tensor, cu: list[int], scale: float | None, window: int) -> Tensor:
    out = []
    for start, end in pairwise(cu):
        length = end - start
        mask = None
        if 0 < window < length:
            order = torch.arange(length, device=q.device)
            back = order[:, None] - order[None, :]
            mask = (back >= 0) & (back < window)
        out.append(
            scaled_dot_product_attention(
                q[:, :, start:end],
                k[:, :, start:end],
                v[:, :, start:end],
                attn_mask=mask,
                is_causal=mask is None,
                scale=scale,
                enable_gqa=q.shape[1] != k.shape[1],
            )
        )
    return torch.cat(out, dim=2)
