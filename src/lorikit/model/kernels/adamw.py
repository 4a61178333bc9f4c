"""Gradient clipping and AdamW for all parameters at once, which lie in one flat float32 buffer.

    norm = |g / count|,  g' = g / count min(1, max_norm / (norm + 1e-6))
    m += (1 - b1) (g' - m),  v = b2 v + (1 - b2) g'^2
    w = w (1 - lr weight_decay) - lr / (1 - b1^t) m / (sqrt(v) / sqrt(1 - b2^t) + eps)

As torch's clip_grad_norm_ and AdamW. Two kernels: the squares are summed per block of the buffer in a fixed order, then
every block of the update adds up those sums for itself. From the first norm that is not finite on nothing is changed, so
that the host may look at it a step later.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lorikit.model.kernels.launch import Pointer, Value, constexpr, kernel, launch, runs_kernel, tl

_PARTS = 1024  # sums of squares
_BLOCK = 1024  # elements of one program


def adamw_step(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    step: int,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    max_norm: float,
    count: int = 1,
    stopped: Tensor | None = None,
) -> Tensor:
    """Step number `step` (from 1), in place on param, exp_avg and exp_avg_sq; returns the norm () before clipping.

    All (n,) float32, contiguous, on one device; grad is a sum over `count` and is left as it is; max_norm 0 clips nothing.
    A gradient that is not finite changes nothing, its norm says so, and `stopped` (), int32, becomes 1; while that is 1
    nothing changes either. Raises ValueError when a shape or dtype does not fit.
    """
    flat = (param, grad, exp_avg, exp_avg_sq)
    if any(t.dim() != 1 or t.shape != param.shape or t.dtype != torch.float32 or not t.is_contiguous() for t in flat):
        raise ValueError("param, grad, exp_avg and exp_avg_sq must be flat, contiguous float32 of the same length")
    if stopped is None:
        stopped = torch.zeros((), dtype=torch.int32, device=param.device)
    if not runs_kernel(*flat):
        return adamw_reference(*flat, step, lr, betas, eps, weight_decay, max_norm, count, stopped)
    size = param.numel()
    parts = torch.empty(_PARTS, dtype=torch.float32, device=param.device)
    norm = torch.empty((), dtype=torch.float32, device=param.device)
    each = (size + _PARTS * _BLOCK - 1) // (_PARTS * _BLOCK)
    used = (size + each * _BLOCK - 1) // (each * _BLOCK)
    correction_1, correction_2 = _corrections(step, betas)
    launch(_squares_kernel, (used,), grad, parts, size, EACH=each, BLOCK=_BLOCK)
    launch(
        _update_kernel,
        ((size + _BLOCK - 1) // _BLOCK,),
        *flat,
        parts,
        norm,
        stopped,
        size,
        used,
        1 / count,
        1 - betas[0],
        1 - betas[1],
        betas[1],
        lr / correction_1,
        1 / math.sqrt(correction_2),
        eps,
        1 - lr * weight_decay,
        max_norm,
        PARTS=_PARTS,
        CLIP=max_norm > 0,
        BLOCK=_BLOCK,
    )
    return norm


def adamw_reference(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    step: int,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    max_norm: float,
    count: int,
    stopped: Tensor,
) -> Tensor:
    """What the kernels compute, in torch; it waits for the norm."""
    norm: Tensor = torch.linalg.vector_norm(grad) / count
    if not norm.isfinite():
        stopped.fill_(1)
    if stopped:
        return norm
    grad = grad * (min(max_norm / (float(norm) + 1e-6), 1.0) / count if max_norm > 0 else 1 / count)
    correction_1, correction_2 = _corrections(step, betas)
    exp_avg.lerp_(grad, 1 - betas[0])
    exp_avg_sq.mul_(betas[1]).addcmul_(grad, grad, value=1 - betas[1])
    denominator = exp_avg_sq.sqrt().mul_(1 / math.sqrt(correction_2)).add_(eps)
    param.mul_(1 - lr * weight_decay).addcdiv_(exp_avg, denominator, value=-lr / correction_1)
    return norm


def _corrections(step: int, betas: tuple[float, float]) -> tuple[float, float]:
    """1 - beta^step of both, to full precision also where the power is close to 1."""
    first, second = (-math.expm1(step * math.log(beta)) if beta else 1.0 for beta in betas)
    return first, second


@kernel("num_elements")
def _squares_kernel(
    grad_at: Pointer, parts_at: Pointer, num_elements: Value, EACH: constexpr, BLOCK: constexpr
) -> None:
    """parts[i] = the sum of squares of EACH blocks."""
    part = tl.program_id(0)
    total = tl.zeros((BLOCK,), tl.float32)
    for number in range(EACH):
        at = (part * EACH + number).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        grad = tl.load(grad_at + at, mask=at < num_elements, other=0.0)
        total += grad * grad
    tl.store(parts_at + part, tl.sum(total, axis=0))


@kernel("num_elements", "num_parts", "scale", "rest_1", "rest_2", "beta_2", "size", "root", "eps", "decay", "max_norm")
def _update_kernel(
    param_at: Pointer,
    grad_at: Pointer,
    exp_avg_at: Pointer,
    exp_avg_sq_at: Pointer,
    parts_at: Pointer,
    norm_at: Pointer,
    stopped_at: Pointer,
    num_elements: Value,
    num_parts: Value,
    scale: Value,
    rest_1: Value,  # 1 - beta_1, which float32 would round
    rest_2: Value,
    beta_2: Value,
    size: Value,  # lr / (1 - beta_1^t)
    root: Value,  # 1 / sqrt(1 - beta_2^t)
    eps: Value,
    decay: Value,
    max_norm: Value,
    PARTS: constexpr,
    CLIP: constexpr,
    BLOCK: constexpr,
) -> None:
    part = tl.arange(0, PARTS)
    norm = tl.sqrt(tl.sum(tl.load(parts_at + part, mask=part < num_parts, other=0.0), axis=0)) * scale
    stopped = tl.load(stopped_at)
    if tl.program_id(0) == 0:
        tl.store(norm_at, norm)
        tl.store(stopped_at, tl.where(norm < float("inf"), stopped, 1))
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < tl.where(norm < float("inf"), num_elements * (1 - stopped), 0)  # nothing for NaN too
    if CLIP:
        scale *= tl.minimum(max_norm / (norm + 1e-6), 1.0)
    grad = tl.load(grad_at + at, mask=inside, other=0.0) * scale
    exp_avg = tl.load(exp_avg_at + at, mask=inside, other=0.0)
    exp_avg += rest_1 * (grad - exp_avg)
    exp_avg_sq = tl.load(exp_avg_sq_at + at, mask=inside, other=0.0) * beta_2 + rest_2 * grad * grad
    param = tl.load(param_at + at, mask=inside, other=0.0) * decay
    param -= size * exp_avg / (tl.sqrt(exp_avg_sq) * root + eps)
    tl.store(exp_avg_at + at, exp_avg, mask=inside)
    tl.store(exp_avg_sq_at + at, exp_avg_sq, mask=inside)
    tl.store(param_at + at, param, mask=inside)
