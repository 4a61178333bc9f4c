"""The gated activation of the MLP and its backward, with the adapters of gate and up added on the way.

    g = g0 + scale z_gate B_gate^T     u = u0 + scale z_up B_up^T     h = silu(g) * u     and their gradients, as in swiglu.py

gate_up (T, 2F) holds the products with the frozen weights, g0 and u0, and is left as it is: forward and backward add the
adapters to what they read, so that no pass over gate_up does nothing else. g and u are rounded to gate_up's dtype before the
activation, which makes the results those of `add_lora_b` and `swiglu`. T tokens, R rank, M adapted modules of the two.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lorikit.model.kernels.launch import Pointer, Value, block, constexpr, dot, kernel, launch, runs_kernel, tl
from lorikit.model.kernels.lora_b import MAX_RANK, add_lora_b_reference
from lorikit.model.kernels.swiglu import swiglu_backward_reference, swiglu_reference

_TOKENS, _COLUMNS = 32, {2: 128, 4: 64}  # of one tile, by bytes of an element: it has to fit the registers


def runs_swiglu_lora(gate_up: Tensor, z: Tensor, b: Sequence[Tensor]) -> bool:
    """Whether a kernel takes these; the references make a second gate_up, so that adding the adapters first is better."""
    return z.shape[1] <= MAX_RANK * len(b) and runs_kernel(gate_up, z, *b) and gate_up.stride(1) == 1


def swiglu_lora(gate_up: Tensor, z: Tensor, b: Sequence[Tensor], starts: Sequence[int], scale: float) -> Tensor:
    """gate_up (T, 2F), z (T, M R), b[m] (F, R) -> (T, F), contiguous, in gate_up's dtype.

    `starts` as in `add_lora_b`: 0 for gate, F for up, in this order. Raises ValueError when shapes do not fit.
    """
    rank = _check(gate_up, z, b, starts)
    if not runs_swiglu_lora(gate_up, z, b):
        return swiglu_lora_reference(gate_up, z, b, starts, scale)
    out = torch.empty((gate_up.shape[0], gate_up.shape[1] // 2), dtype=gate_up.dtype, device=gate_up.device)
    _run(_forward_kernel, (gate_up, out), z, b, starts, scale, rank)
    return out


def swiglu_lora_backward(
    grad: Tensor, gate_up: Tensor, z: Tensor, b: Sequence[Tensor], starts: Sequence[int], scale: float
) -> Tensor:
    """grad (T, F) of `swiglu_lora`'s result -> the gradient of g and u side by side (T, 2F) in gate_up's dtype: that of
    gate_up, and what `lora_b_backward` wants for z and B. Raises ValueError when shapes do not fit."""
    rank = _check(gate_up, z, b, starts)
    if grad.shape != (gate_up.shape[0], gate_up.shape[1] // 2):
        raise ValueError(f"grad {tuple(grad.shape)} does not fit: it must be half of gate_up {tuple(gate_up.shape)}")
    if not runs_swiglu_lora(gate_up, z, b) or not runs_kernel(grad) or grad.stride(1) != 1:
        return swiglu_lora_backward_reference(grad, gate_up, z, b, starts, scale)
    out = torch.empty(gate_up.shape, dtype=gate_up.dtype, device=gate_up.device)
    _run(_backward_kernel, (gate_up, grad, out), z, b, starts, scale, rank)
    return out


def swiglu_lora_reference(
    gate_up: Tensor, z: Tensor, b: Sequence[Tensor], starts: Sequence[int], scale: float
) -> Tensor:
    """What the kernel computes, in torch."""
    whole = gate_up.clone()
    add_lora_b_reference(whole, z, b, starts, scale)
    return swiglu_reference(whole)


def swiglu_lora_backward_reference(
    grad: Tensor, gate_up: Tensor, z: Tensor, b: Sequence[Tensor], starts: Sequence[int], scale: float
) -> Tensor:
    """What the kernel computes, in torch."""
    whole = gate_up.clone()
    add_lora_b_reference(whole, z, b, starts, scale)
    return swiglu_backward_reference(grad, whole)


def _check(gate_up: Tensor, z: Tensor, b: Sequence[Tensor], starts: Sequence[int]) -> int:
    """The rank."""
    shapes, rank, width = [tuple(m.shape) for m in b], z.shape[1] // max(len(b), 1), gate_up.shape[-1] // 2
    if (
        gate_up.dim() != 2
        or gate_up.shape[1] != 2 * width
        or z.shape != (gate_up.shape[0], rank * len(b))
        or any(shape != (width, rank) for shape in shapes)
        or list(starts) not in ([0], [width], [0, width])
        or len(starts) != len(b)
    ):
        raise ValueError(
            f"gate_up {tuple(gate_up.shape)}, z {tuple(z.shape)} and b {shapes} at columns {list(starts)} do not fit"
        )
    return rank


def _run(
    function: Any,
    tensors: tuple[Tensor, ...],
    z: Tensor,
    b: Sequence[Tensor],
    starts: Sequence[int],
    scale: float,
    rank: int,
) -> None:
    tokens, width = tensors[0].shape[0], tensors[0].shape[1] // 2
    matrices, columns = [matrix.contiguous() for matrix in b], _COLUMNS[tensors[0].element_size()]
    launch(
        function,
        ((width + columns - 1) // columns, (tokens + _TOKENS - 1) // _TOKENS),
        *tensors,
        z.contiguous(),
        matrices[0],
        matrices[-1],
        tokens,
        *(t.stride(0) for t in tensors),
        scale,
        GATE=starts[0] == 0,
        UP=starts[-1] == width,
        WIDTH=width,
        MODULES=len(b),
        RANK=rank,
        BLOCK_RANK=block(rank),
        TOKENS=_TOKENS,
        COLUMNS=columns,
        num_warps=4,
    )


@kernel()
def _added(
    y: Value,
    z_at: Value,
    b_at: Value,
    column: Value,
    valid: Value,
    scale: Value,
    WIDTH: constexpr,
    RANK: constexpr,
    BLOCK_RANK: constexpr,
) -> Any:
    """A tile of y with one module's adapter, rounded to y's dtype, in float32."""
    across, down = tl.arange(0, BLOCK_RANK)[None, :], tl.arange(0, BLOCK_RANK)[:, None]
    z = tl.load(z_at + across, mask=valid & (across < RANK), other=0.0)
    b = tl.load(b_at + column * RANK + down, mask=(column < WIDTH) & (down < RANK), other=0.0).to(z.dtype)
    sums = dot(z, b, tl.zeros(y.shape, tl.float32))
    return (y.to(tl.float32) + scale * sums).to(y.dtype)


@kernel()
def _gate_and_up(
    gate_up_at: Value, z_at: Value, b_gate: Value, b_up: Value, token: Value, column: Value, inside: Value, valid: Value,
    gate_up_row: Value, scale: Value, GATE: constexpr, UP: constexpr, WIDTH: constexpr, MODULES: constexpr,
    RANK: constexpr, BLOCK_RANK: constexpr,
) -> Any:  # fmt: skip
    """A tile of g and of u, with their adapters, in float32."""
    at = gate_up_at + token * gate_up_row + column
    g = tl.load(at, mask=inside, other=0.0)
    u = tl.load(at + WIDTH, mask=inside, other=0.0)
    z = z_at + token * (MODULES * RANK)
    if GATE:
        g = _added(g, z, b_gate, column, valid, scale, WIDTH, RANK, BLOCK_RANK)
    if UP:
        u = _added(u, z + (MODULES - 1) * RANK, b_up, column, valid, scale, WIDTH, RANK, BLOCK_RANK)
    return g.to(tl.float32), u.to(tl.float32)


@kernel("num_tokens")
def _forward_kernel(
    gate_up_at: Pointer, out_at: Pointer, z_at: Pointer, b_gate: Pointer, b_up: Pointer, num_tokens: Value,
    gate_up_row: Value, out_row: Value, scale: Value, GATE: constexpr, UP: constexpr, WIDTH: constexpr,
    MODULES: constexpr, RANK: constexpr, BLOCK_RANK: constexpr, TOKENS: constexpr, COLUMNS: constexpr,
) -> None:  # fmt: skip
    column = (tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS))[None, :]
    token = (tl.program_id(1) * TOKENS + tl.arange(0, TOKENS))[:, None]
    valid, token = token < num_tokens, token.to(tl.int64)
    inside = valid & (column < WIDTH)
    g, u = _gate_and_up(
        gate_up_at, z_at, b_gate, b_up, token, column, inside, valid, gate_up_row, scale,
        GATE, UP, WIDTH, MODULES, RANK, BLOCK_RANK,
    )  # fmt: skip
    h = g * tl.sigmoid(g) * u
    tl.store(out_at + token * out_row + column, h.to(out_at.dtype.element_ty), mask=inside)


@kernel("num_tokens")
def _backward_kernel(
    gate_up_at: Pointer, grad_at: Pointer, out_at: Pointer, z_at: Pointer, b_gate: Pointer, b_up: Pointer,
    num_tokens: Value, gate_up_row: Value, grad_row: Value, out_row: Value, scale: Value, GATE: constexpr,
    UP: constexpr, WIDTH: constexpr, MODULES: constexpr, RANK: constexpr, BLOCK_RANK: constexpr, TOKENS: constexpr,
    COLUMNS: constexpr,
) -> None:  # fmt: skip
    column = (tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS))[None, :]
    token = (tl.program_id(1) * TOKENS + tl.arange(0, TOKENS))[:, None]
    valid, token = token < num_tokens, token.to(tl.int64)
    inside = valid & (column < WIDTH)
    grad = tl.load(grad_at + token * grad_row + column, mask=inside, other=0.0).to(tl.float32)
    g, u = _gate_and_up(
        gate_up_at, z_at, b_gate, b_up, token, column, inside, valid, gate_up_row, scale,
        GATE, UP, WIDTH, MODULES, RANK, BLOCK_RANK,
    )  # fmt: skip
    s = tl.sigmoid(g)
    out = out_at + token * out_row + column
    tl.store(out, (grad * u * s * (1 + g * (1 - s))).to(out_at.dtype.element_ty), mask=inside)
    tl.store(out + WIDTH, (grad * g * s).to(out_at.dtype.element_ty), mask=inside)
