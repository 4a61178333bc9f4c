"""The gated activation of the MLP and its backward, from the fused product of gate and up.

    h = silu(g) * u;  grad_u = grad * silu(g);  grad_g = grad * u * s (1 + g (1 - s)),  s = sigmoid(g)

gate_up (T, 2F) holds g in the first F columns and u in the others; computed in float32 and rounded once.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import silu

from lorikit.model.kernels.launch import Pointer, Value, constexpr, kernel, launch, runs_kernel, tl

_BLOCK = 1024  # columns of one program


def swiglu(gate_up: Tensor) -> Tensor:
    """gate_up (T, 2F) -> (T, F), contiguous, in its dtype. Raises ValueError when it has another shape."""
    _check(gate_up)
    if not _takes(gate_up):
        return swiglu_reference(gate_up)
    (tokens, both), width = gate_up.shape, gate_up.shape[1] // 2
    out = torch.empty((tokens, both // 2), dtype=gate_up.dtype, device=gate_up.device)
    grid = (tokens, (width + _BLOCK - 1) // _BLOCK)
    launch(
        _forward_kernel, grid, gate_up, out, gate_up.stride(0), out.stride(0), WIDTH=width, BLOCK=_BLOCK, num_warps=4
    )
    return out


def swiglu_backward(grad: Tensor, gate_up: Tensor, out: Tensor | None = None) -> Tensor:
    """grad (T, F), gate_up (T, 2F) -> the gradient of gate_up (T, 2F), written to `out` if given, which may be gate_up.

    Raises ValueError when shapes do not fit.
    """
    _check(gate_up)
    (tokens, both), width = gate_up.shape, gate_up.shape[1] // 2
    if grad.shape != (tokens, width) or (
        out is not None and (out.shape != gate_up.shape or out.dtype != gate_up.dtype)
    ):
        raise ValueError(f"grad {tuple(grad.shape)} and out do not fit gate_up {tuple(gate_up.shape)} {gate_up.dtype}")
    if not _takes(grad, gate_up) or (out is not None and not _takes(out)):
        result = swiglu_backward_reference(grad, gate_up)
        return result if out is None else out.copy_(result)
    out = torch.empty((tokens, both), dtype=gate_up.dtype, device=gate_up.device) if out is None else out
    grid = (tokens, (width + _BLOCK - 1) // _BLOCK)
    strides = gate_up.stride(0), grad.stride(0), out.stride(0)
    launch(_backward_kernel, grid, gate_up, grad, out, *strides, WIDTH=width, BLOCK=_BLOCK, num_warps=4)
    return out


def swiglu_reference(gate_up: Tensor) -> Tensor:
    """What the kernel computes, in torch."""
    g, u = gate_up.chunk(2, dim=1)
    return (silu(g.float()) * u).to(gate_up.dtype)


def swiglu_backward_reference(grad: Tensor, gate_up: Tensor) -> Tensor:
    """What the kernel computes, in torch."""
    g, u = gate_up.float().chunk(2, dim=1)
    s, wide = torch.sigmoid(g), grad.float()
    return torch.cat([wide * u * s * (1 + g * (1 - s)), wide * g * s], dim=1).to(gate_up.dtype)


def _check(gate_up: Tensor) -> None:
    if gate_up.dim() != 2 or gate_up.shape[1] % 2:
        raise ValueError(f"gate_up {tuple(gate_up.shape)} must be (T, 2F)")


def _takes(*tensors: Tensor) -> bool:
    return runs_kernel(*tensors) and all(t.stride(1) == 1 for t in tensors)


@kernel()
def _forward_kernel(
    gate_up_at: Pointer, out_at: Pointer, gate_up_row: Value, out_row: Value, WIDTH: constexpr, BLOCK: constexpr
) -> None:
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < WIDTH
    at = gate_up_at + token * gate_up_row + column
    g = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(at + WIDTH, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_at + token * out_row + column, (g * tl.sigmoid(g) * u).to(out_at.dtype.element_ty), mask=inside)


@kernel()
def _backward_kernel(
    gate_up_at: Pointer,
    grad_at: Pointer,
    out_at: Pointer,
    gate_up_row: Value,
    grad_row: Value,
    out_row: Value,
    WIDTH: constexpr,
    BLOCK: constexpr,
) -> None:
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < WIDTH
    at = gate_up_at + token * gate_up_row + column
    g = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(at + WIDTH, mask=inside, other=0.0).to(tl.float32)
    grad = tl.load(grad_at + token * grad_row + column, mask=inside, other=0.0).to(tl.float32)
    s = tl.sigmoid(g)
    target = out_at + token * out_row + column
    tl.store(target, (grad * u * s * (1 + g * (1 - s))).to(out_at.dtype.element_ty), mask=inside)
    tl.store(target + WIDTH, (grad * g * s).to(out_at.dtype.element_ty), mask=inside)
