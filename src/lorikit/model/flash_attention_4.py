"""FlashAttention-4 (package flash-attn-4, extra `fa4`), for long sequences on a Hopper or newer GPU.

It computes what torch's own FlashAttention-2 computes (see packed_attention.py), about twice as fast. Its kernels are compiled
at their first call, which takes longer than short rows would ever save.
"""

from __future__ import annotations

import importlib
import importlib.util
import warnings
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

LEAST = 1024  # tokens of the longest sequence
_HEAD_DIMS = (64, 96, 128)


def takes(q: Tensor, longest: int) -> bool:
    """Whether queries (S, H, D) that see sequences of at most `longest` tokens are for it: installed, able, worth it."""
    return longest >= LEAST and q.shape[-1] in _HEAD_DIMS and _function(q.device) is not None


def causal(
    q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, longest_q: int, longest_k: int, scale: float | None
) -> Tensor:
    """q (S, H, D), k and v (U, Hkv, D) in half precision, cu_q and cu_k (N+1,) int32 -> (S, H, D); each sequence's queries
    are its last tokens. Where `takes` says so."""
    function = _function(q.device)
    assert function is not None
    out = function(
        q, k, v, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k, max_seqlen_q=longest_q, max_seqlen_k=longest_k,
        softmax_scale=scale, causal=True, deterministic=not __import__("os").environ.get("ANY_ORDER"),
    )  # fmt: skip
    result: Tensor = out[0] if isinstance(out, tuple) else out
    return result


@cache
def _function(device: torch.device) -> Callable[..., Any] | None:
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < (9, 0):
        return None
    if importlib.util.find_spec("flash_attn") is None or importlib.util.find_spec("flash_attn.cute") is None:
        return None
    try:
        function: Callable[..., Any] = importlib.import_module("flash_attn.cute.interface").flash_attn_varlen_func
    except (ImportError, AttributeError) as error:
        warnings.warn(f"flash-attn-4 is installed but cannot be used ({error}); torch's attention is", stacklevel=2)
        return None
    return function
