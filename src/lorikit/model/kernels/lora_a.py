"""The products with LoRA's A matrices of all modules that read one x, and their backward; B is in lora_b.py.

    u_m = scale_p (mask_m * x) A_m^T,  scale_p = 1 / (1 - p)
    grad_x = scale_p sum_m mask_m * (grad_u_m A_m)              grad_A_m = scale_p grad_u_m^T (mask_m * x)

T tokens, D inputs, R rank, M modules (q, k, v; or gate, up; or one). Every module drops other elements, with
the masks of kernels/dropout.py, made while x is read: x is read once for all modules, and nothing of a mask is stored.
Sums that many programs share are added in a fixed order, so that a step gives the same bytes again.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lorikit.model.kernels.dropout import dropout_mask, seed_tensor, signed_threshold
from lorikit.model.kernels.launch import block, launch, runs_kernel
from lorikit.model.kernels.lora_a_triton import MAX_MODULES, MAX_RANK, backward_kernel, forward_kernel
from lorikit.model.kernels.sums import float_mm, sum_shares

# Sizes of the tiles, and of the share of a long sum that one program adds: enough programs for 132 multiprocessors at 1,000
# tokens. The shares do not depend on the number of tokens, and neither do a token's results.
_TOKENS, _COLUMNS, _SHARE = 32, 128, 512  # forward: tokens, columns of D at a time, columns of D in all
_BACK_TOKENS, _BACK_COLUMNS, _BACK_SHARE = 32, 64, 256  # backward: tokens at a time, columns of D, tokens in all


def lora_a(x: Tensor, a: Tensor, p: float, seed: int | Tensor, streams: Sequence[int]) -> Tensor:
    """x (T, D), a (M, R, D) -> (T, M R) in x's dtype: module m in columns [m R, (m + 1) R).

    p: the share of x that each module drops, 0 for none; seed and streams[m] as for `dropout_mask`. Raises ValueError when
    shapes do not fit.
    """
    _check(x, a, p, streams)
    if not _takes(x, a):
        return lora_a_reference(x, a, p, seed, streams)
    modules, rank, width = _grouped(a, p)
    tokens, columns = x.shape[0], a.shape[0] * a.shape[1]
    shares = (width + _SHARE - 1) // _SHARE
    partial = torch.empty((shares, tokens, columns), dtype=torch.float32, device=x.device)
    out = torch.empty((tokens, columns), dtype=x.dtype, device=x.device)
    launch(
        forward_kernel,
        ((tokens + _TOKENS - 1) // _TOKENS, shares),
        x,
        a.contiguous(),
        partial,
        *_dropout(p, seed, streams, x),
        tokens,
        x.stride(0),
        1 / (1 - p),
        DROP=p > 0,
        MODULES=modules,
        RANK=rank,
        WIDTH=width,
        BLOCK_RANK=block(rank),
        TOKENS=_TOKENS,
        COLUMNS=_fitting(_COLUMNS, modules * block(rank) * x.element_size()),
        SHARE=_SHARE,
        num_warps=4,
    )
    return sum_shares(partial, out)


def lora_a_backward(
    grad: Tensor,
    x: Tensor,
    a: Tensor,
    p: float,
    seed: int | Tensor,
    streams: Sequence[int],
    grad_x: Tensor | None = None,
    *,
    needs_x: bool = True,
) -> tuple[Tensor | None, Tensor]:
    """grad (T, M R) of `lora_a`'s result -> (grad_x (T, D) in x's dtype, grad_a (M, R, D) float32).

    The gradient of x is added to `grad_x` (x's shape and dtype) in place when it is given, and left out (None) unless
    `needs_x`. Raises ValueError when shapes do not fit.
    """
    _check(x, a, p, streams)
    if grad.shape != (x.shape[0], a.shape[0] * a.shape[1]):
        raise ValueError(f"grad {tuple(grad.shape)} must be (T, M R) of x {tuple(x.shape)} and a {tuple(a.shape)}")
    if grad_x is not None and (grad_x.shape != x.shape or grad_x.dtype != x.dtype):
        raise ValueError(f"grad_x {tuple(grad_x.shape)} {grad_x.dtype} must be like x {tuple(x.shape)} {x.dtype}")
    if not (_takes(x, a) and runs_kernel(grad) and (grad_x is None or grad_x.stride(1) == 1)):
        return lora_a_backward_reference(grad, x, a, p, seed, streams, grad_x, needs_x=needs_x)
    modules, rank, width = _grouped(a, p)
    tokens, columns = x.shape[0], _fitting(_BACK_COLUMNS, modules * block(rank) * x.element_size())
    shares = (tokens + _BACK_SHARE - 1) // _BACK_SHARE
    partial = torch.empty((shares, *a.shape), dtype=torch.float32, device=x.device)
    out = grad_x
    if out is None:
        out = torch.empty((tokens, width), dtype=x.dtype, device=x.device) if needs_x else x  # x: never written
    launch(
        backward_kernel,
        ((width + columns - 1) // columns, shares),
        x,
        a.contiguous(),
        grad.contiguous(),
        out,
        partial,
        *_dropout(p, seed, streams, x),
        tokens,
        x.stride(0),
        out.stride(0),
        1 / (1 - p),
        DROP=p > 0,
        NEEDS_X=needs_x,
        ADD=grad_x is not None,
        MODULES=modules,
        RANK=rank,
        WIDTH=width,
        BLOCK_RANK=block(rank),
        TOKENS=_BACK_TOKENS,
        COLUMNS=columns,
        SHARE=_BACK_SHARE,
        num_warps=4,
    )
    return out if needs_x else None, sum_shares(partial, torch.empty(a.shape, dtype=torch.float32, device=x.device))


def lora_a_reference(x: Tensor, a: Tensor, p: float, seed: int | Tensor, streams: Sequence[int]) -> Tensor:
    """What the kernel computes, in torch."""
    a = a.to(x.dtype)
    if p == 0:
        return x @ a.flatten(0, 1).t()
    masks = (dropout_mask(seed, stream, x.shape, p, x.device) for stream in streams)
    return torch.cat([(x * mask) @ a_m.t() for mask, a_m in zip(masks, a, strict=True)], dim=1).mul_(1 / (1 - p))


def lora_a_backward_reference(
    grad: Tensor,
    x: Tensor,
    a: Tensor,
    p: float,
    seed: int | Tensor,
    streams: Sequence[int],
    grad_x: Tensor | None = None,
    *,
    needs_x: bool = True,
) -> tuple[Tensor | None, Tensor]:
    """What the kernel computes, in torch."""
    a, grad = a.to(x.dtype), grad.to(x.dtype)
    out = (torch.zeros_like(x) if grad_x is None else grad_x) if needs_x else None
    if p == 0:
        grad_a = float_mm(grad.t(), x).view(a.shape)
        return out if out is None else out.addmm_(grad, a.flatten(0, 1)), grad_a
    scaled, grads = grad * (1 / (1 - p)), []
    for a_m, grad_m, stream in zip(a, scaled.chunk(a.shape[0], dim=1), streams, strict=True):
        mask = dropout_mask(seed, stream, x.shape, p, x.device)
        if out is not None:
            out.add_((grad_m @ a_m).mul_(mask))
        grads.append(float_mm(grad_m.t(), x * mask))
    return out, torch.stack(grads)


def _check(x: Tensor, a: Tensor, p: float, streams: Sequence[int]) -> None:
    signed_threshold(p)
    if x.dim() != 2 or a.dim() != 3 or a.shape[2] != x.shape[1] or a.shape[0] != len(streams):
        raise ValueError(
            f"x {tuple(x.shape)} must be (T, D), a {tuple(a.shape)} (M, R, D) with M = {len(streams)} streams"
        )


def _takes(x: Tensor, a: Tensor) -> bool:
    return runs_kernel(x, a) and x.stride(1) == 1 and a.shape[0] <= MAX_MODULES and a.shape[1] <= MAX_RANK


def _grouped(a: Tensor, p: float) -> tuple[int, int, int]:
    """(M, R, D); without dropout the matrices of all modules are one, if small enough."""
    modules, rank, width = a.shape
    return (1, modules * rank, width) if p == 0 and modules * rank <= MAX_RANK else (modules, rank, width)


def _fitting(columns: int, bytes_each: int) -> int:
    """`columns`, or fewer, so that the tiles of A take 16 KiB: a GPU's shared memory holds a few of them in flight."""
    return max(16, min(columns, 1 << (16384 // bytes_each).bit_length() - 1))


def _dropout(p: float, seed: int | Tensor, streams: Sequence[int], x: Tensor) -> tuple[Tensor | int, ...]:
    """seed, threshold and MAX_MODULES streams, as the kernels take them."""
    return seed_tensor(seed, x.device), signed_threshold(p), *streams, *[0] * (MAX_MODULES - len(streams))
