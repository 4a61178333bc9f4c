"""Sums in float32 that many programs share: products whose result is float32, and partial sums added in a fixed order."""

from __future__ import annotations

import torch
from torch import Tensor

from lorikit.model.kernels.launch import Pointer, Value, constexpr, kernel, launch, tl


def float_mm(left: Tensor, right: Tensor) -> Tensor:
    """left @ right, summed and returned in float32."""
    if left.is_cuda and left.dtype != torch.float32:
        return torch.mm(left, right, out_dtype=torch.float32)
    return left.float() @ right.float()


def sum_shares(partial: Tensor, out: Tensor) -> Tensor:
    """out = the sum of partial (shares, ...) float32, share after share; on a device that runs kernels."""
    size, shares = out.numel(), partial.shape[0]
    launch(_sum_kernel, ((size + 255) // 256,), partial, out, size, shares, TOGETHER=8, BLOCK=256, num_warps=4)
    return out


@kernel("num_elements", "num_shares")
def _sum_kernel(
    partial_at: Pointer, out_at: Pointer, num_elements: Value, num_shares: Value, TOGETHER: constexpr, BLOCK: constexpr
) -> None:
    """out[i] = sum over the shares of partial[share, i]."""
    at = (tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK))[None, :]
    total = tl.zeros((BLOCK,), tl.float32)
    start = 0
    while start < num_shares:  # the interpreter takes no range of a number that is known at run time only
        share = (start + tl.arange(0, TOGETHER))[:, None]
        inside = (share < num_shares) & (at < num_elements)
        total += tl.sum(tl.load(partial_at + share.to(tl.int64) * num_elements + at, mask=inside, other=0.0), axis=0)
        start += TOGETHER
    tl.store(out_at + at, total[None, :].to(out_at.dtype.element_ty), mask=at < num_elements)
