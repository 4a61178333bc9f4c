"""Final norm, head and cross entropy of the labelled tokens, in chunks, with the gradient formed in the forward.

    h = norm(x)    s = h W^T    loss_i = log sum_j exp(s_ij) - s_i,target    grad_s = softmax(s) - onehot(target)

x (L, D) has only rows with a label; W (V, D) is frozen. One chunk's logits exist at a time, over which their gradient is
written (kernels/cross_entropy.py); what stays until the backward is the gradient of x, (L, D).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lorikit.model.kernels.cross_entropy import cross_entropy, cross_entropy_gradient
from lorikit.model.kernels.rmsnorm import rmsnorm, rmsnorm_backward

# Logits of one chunk, in elements: a chunk should fit the caches of a CPU, and keep a GPU busy.
_CHUNK_CPU, _CHUNK = 1 << 22, 1 << 27


def loss_sum(x: Tensor, norm: Tensor, eps: float, head: Tensor, targets: Tensor) -> Tensor:
    """() float32: cross entropy summed over the rows of x (L, D), with a graph to x. targets (L,) int64, IGNORE where a
    row only fills a bucket and counts for nothing."""
    out: Tensor = _LossSum.apply(x, norm, eps, head, targets)  # type: ignore[no-untyped-call]
    return out


@torch.no_grad()
def token_losses(x: Tensor, norm: Tensor, eps: float, head: Tensor, targets: Tensor) -> Tensor:
    """(L,) float32: the cross entropy of each row of x (L, D), without a graph."""
    h = rmsnorm(x, norm, eps)
    parts = [cross_entropy(rows @ head.T, wanted) for rows, wanted in _chunks(h, targets, head)]
    return torch.cat(parts) if parts else x.new_zeros(0, dtype=torch.float32)


def _chunks(h: Tensor, targets: Tensor, head: Tensor) -> list[tuple[Tensor, Tensor]]:
    most = _CHUNK if h.is_cuda else _CHUNK_CPU
    count = -(-h.shape[0] * head.shape[0] // most)  # equal chunks, so that none is a small rest
    return list(zip(h.chunk(count), targets.chunk(count), strict=True)) if count else []


class _LossSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, norm: Tensor, eps: float, head: Tensor, targets: Tensor) -> Tensor:
        """The loss of all chunks; keeps the gradient of x (L, D) and no logits."""
        h = rmsnorm(x, norm, eps)
        total = torch.zeros((), dtype=torch.float32, device=x.device)
        grads = []
        for rows, wanted in _chunks(h, targets, head):
            logits = rows @ head.T
            if ctx.needs_input_grad[0]:
                total += cross_entropy_gradient(logits, wanted).sum()
                grads.append(logits @ head)
            else:
                total += cross_entropy(logits, wanted).sum()
            del logits  # before those of the next chunk are made
        if grads:
            ctx.save_for_backward(rmsnorm_backward(torch.cat(grads), x, norm, eps))
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (grad_x,) = ctx.saved_tensors
        return (grad_x * grad).to(grad_x.dtype), None, None, None, None
