"""Gradient clipping and AdamW for all parameters at once, which lie in one flat float32 buffer.

    norm = |g|,  g' = g min(1, max_norm / (norm + 1e-6))
    m += (1 - b1) (g' - m),  v = b2 v + (1 - b2) g'^2
    w = w (1 - lr weight_decay) - lr / (1 - b1^t) m / (sqrt(v) / sqrt(1 - b2^t) + eps)

As torch's clip_grad_norm_ and AdamW. Two kernels: the squares are summed per block of the buffer in a fixed order, then
every block of the update adds up those sums for itself. t and lr are tensors, so that a CUDA graph of it can be replayed.
"""

from __future__ import annotations

import math
from typing import Any

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
    step: Tensor,
    lr: Tensor,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    max_norm: float,
    compute_copy: Tensor | None = None,
) -> Tensor:
    """One step, in place on param, exp_avg, exp_avg_sq (n,) and step (); returns the norm () of grad before clipping.

    All float32, contiguous, on one device; step: the number of steps done so far, lr: () of this step; max_norm 0 clips
    nothing; grad is left unclipped. `compute_copy` (n,), if given, receives the new parameters in its own dtype. As with
    torch, a gradient that is not finite spoils the parameters: the caller looks at the norm. Raises ValueError when a
    shape or dtype does not fit.
    """
    flat = (param, grad, exp_avg, exp_avg_sq)
    if any(t.dim() != 1 or t.shape != param.shape or t.dtype != torch.float32 or not t.is_contiguous() for t in flat):
        raise ValueError("param, grad, exp_avg and exp_avg_sq must be flat, contiguous float32 of the same length")
    if step.shape != () or lr.shape != () or step.dtype != torch.float32 or lr.dtype != torch.float32:
        raise ValueError("step and lr must be float32 tensors without dimensions")
    if compute_copy is not None and (compute_copy.shape != param.shape or not compute_copy.is_contiguous()):
        raise ValueError("compute_copy must be flat, contiguous and as long as param")
    if not runs_kernel(*flat, step, lr):
        return adamw_reference(*flat, step, lr, betas, eps, weight_decay, max_norm, compute_copy)
    size = param.numel()
    parts = torch.empty(_PARTS, dtype=torch.float32, device=param.device)
    norm = torch.empty((), dtype=torch.float32, device=param.device)
    each = (size + _PARTS * _BLOCK - 1) // (_PARTS * _BLOCK)
    used = (size + each * _BLOCK - 1) // (each * _BLOCK)
    launch(_squares_kernel, (used,), grad, parts, step, size, EACH=each, BLOCK=_BLOCK)
    launch(
        _update_kernel,
        ((size + _BLOCK - 1) // _BLOCK,),
        *flat,
        param if compute_copy is None else compute_copy,
        parts,
        norm,
        step,
        lr,
        size,
        used,
        1 - betas[0],
        1 - betas[1],
        betas[1],
        *(math.log(beta) if beta else -math.inf for beta in betas),
        eps,
        weight_decay,
        max_norm,
        PARTS=_PARTS,
        CLIP=max_norm > 0,
        COPY=compute_copy is not None,
        BLOCK=_BLOCK,
    )
    return norm


def adamw_reference(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    step: Tensor,
    lr: Tensor,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    max_norm: float,
    compute_copy: Tensor | None = None,
) -> Tensor:
    """What the kernels compute, in torch."""
    step.add_(1)
    norm: Tensor = torch.linalg.vector_norm(grad)
    if max_norm > 0:
        grad = grad * (max_norm / (norm + 1e-6)).clamp(max=1.0)
    exp_avg.lerp_(grad, 1 - betas[0])
    exp_avg_sq.mul_(betas[1]).addcmul_(grad, grad, value=1 - betas[1])
    correction_1, correction_2 = (1 - torch.pow(beta, step.double()) for beta in betas)
    param.mul_(1 - lr * weight_decay)
    denominator = exp_avg_sq.sqrt().div_(correction_2.sqrt().float()).add_(eps)
    param.sub_(exp_avg / denominator * (lr / correction_1).float())
    if compute_copy is not None:
        compute_copy.copy_(param)
    return norm


@kernel("num_elements")
def _squares_kernel(
    grad_at: Pointer, parts_at: Pointer, step_at: Pointer, num_elements: Value, EACH: constexpr, BLOCK: constexpr
) -> None:
    """parts[i] = the sum of squares of EACH blocks; the first program also counts the step."""
    part = tl.program_id(0)
    total = tl.zeros((BLOCK,), tl.float32)
    for number in range(EACH):
        at = (part * EACH + number).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        grad = tl.load(grad_at + at, mask=at < num_elements, other=0.0)
        total += grad * grad
    tl.store(parts_at + part, tl.sum(total, axis=0))
    if part == 0:
        tl.store(step_at, tl.load(step_at) + 1)


@kernel()
def _one_less_power(log_beta: Value, step: Value) -> Any:
    """1 - beta^step to full precision also where the power is close to 1: by its series, else directly."""
    x = log_beta * step
    near = tl.maximum(x, -0.5)
    series = 1 + near / 2 * (1 + near / 3 * (1 + near / 4 * (1 + near / 5 * (1 + near / 6 * (1 + near / 7)))))
    return tl.where(x > -0.5, -near * series, 1 - tl.exp(x))


@kernel("num_elements", "num_parts")
def _update_kernel(
    param_at: Pointer,
    grad_at: Pointer,
    exp_avg_at: Pointer,
    exp_avg_sq_at: Pointer,
    copy_at: Pointer,
    parts_at: Pointer,
    norm_at: Pointer,
    step_at: Pointer,
    lr_at: Pointer,
    num_elements: Value,
    num_parts: Value,
    rest_1: Value,  # 1 - beta_1, which float32 would round
    rest_2: Value,
    beta_2: Value,
    log_beta_1: Value,
    log_beta_2: Value,
    eps: Value,
    weight_decay: Value,
    max_norm: Value,
    PARTS: constexpr,
    CLIP: constexpr,
    COPY: constexpr,
    BLOCK: constexpr,
) -> None:
    part = tl.arange(0, PARTS)
    norm = tl.sqrt(tl.sum(tl.load(parts_at + part, mask=part < num_parts, other=0.0), axis=0))
    if tl.program_id(0) == 0:
        tl.store(norm_at, norm)
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < num_elements
    step, lr = tl.load(step_at), tl.load(lr_at)
    grad = tl.load(grad_at + at, mask=inside, other=0.0)
    if CLIP:
        grad *= tl.minimum(max_norm / (norm + 1e-6), 1.0)
    exp_avg = tl.load(exp_avg_at + at, mask=inside, other=0.0)
    exp_avg += rest_1 * (grad - exp_avg)
    exp_avg_sq = tl.load(exp_avg_sq_at + at, mask=inside, other=0.0) * beta_2 + rest_2 * grad * grad
    size = lr / _one_less_power(log_beta_1, step)
    denominator = tl.sqrt(exp_avg_sq) / tl.sqrt(_one_less_power(log_beta_2, step)) + eps
    param = tl.load(param_at + at, mask=inside, other=0.0) * (1 - lr * weight_decay) - size * exp_avg / denominator
    tl.store(exp_avg_at + at, exp_avg, mask=inside)
    tl.store(exp_avg_sq_at + at, exp_avg_sq, mask=inside)
    tl.store(param_at + at, param, mask=inside)
    if COPY:
        tl.store(copy_at + at, param.to(copy_at.dtype.element_ty), mask=inside)
