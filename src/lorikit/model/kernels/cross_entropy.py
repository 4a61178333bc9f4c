"""Cross entropy of rows of logits, and its gradient written over them.

    loss_i = log sum_j exp(s_ij) - s_i,target        grad_s = softmax(s) - onehot(target)

s (L, V) as the head's product gives it; a row whose target is IGNORE has loss and gradient zero. Sums are in float32 and the
gradient is rounded once. Three kernels: peaks and sums of blocks of a row, which many programs share; these joined row by
row; the gradient. So s is read once for the losses, and read and written once more for the gradient.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lorikit.data.values import IGNORE
from lorikit.model.kernels.launch import Pointer, Value, block, constexpr, kernel, launch, runs_kernel, tl

_BLOCK, _ROWS = 8192, 4  # columns of one program; rows that one program joins
_IGNORE = tl.constexpr(IGNORE) if tl else IGNORE


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """logits (L, V), targets (L,) int64 -> the loss of each row, (L,) float32. Raises ValueError when shapes do not fit."""
    _check(logits, targets)
    if not _takes(logits):
        return cross_entropy_reference(logits, targets)
    return _losses(logits, targets)[0]


def cross_entropy_gradient(logits: Tensor, targets: Tensor) -> Tensor:
    """The same, and `logits` become the gradient of the losses' sum, in their own dtype. Raises ValueError when shapes do
    not fit."""
    _check(logits, targets)
    if not _takes(logits):
        return cross_entropy_gradient_reference(logits, targets)
    losses, joined = _losses(logits, targets)
    rows, width, columns, parts = _layout(logits)
    launch(
        _gradient_kernel,
        (rows * parts,),
        logits,
        targets,
        joined,
        rows,
        logits.stride(0),
        WIDTH=width,
        PARTS=parts,
        BLOCK=columns,
        num_warps=8,
    )
    return losses


def cross_entropy_reference(logits: Tensor, targets: Tensor) -> Tensor:
    """What the kernels compute, in torch."""
    wide, at = logits.float(), targets.clamp_min(0)[:, None]
    return (wide.logsumexp(1) - wide.gather(1, at)[:, 0]).masked_fill_(targets == IGNORE, 0.0)


def cross_entropy_gradient_reference(logits: Tensor, targets: Tensor) -> Tensor:
    """What the kernels compute, in torch, with one float32 copy of logits that are not float32."""
    wide, ignored, at = logits.float(), (targets == IGNORE)[:, None], targets.clamp_min(0)[:, None]
    peak = wide.amax(1, keepdim=True)
    target = wide.gather(1, at)
    sums = wide.sub_(peak).exp_().sum(1, keepdim=True)  # the logits are spent from here on
    wide.div_(sums).scatter_add_(1, at, torch.full_like(target, -1.0)).masked_fill_(ignored, 0.0)
    if wide is not logits:
        logits.copy_(wide)
    return (sums.log() + (peak - target)).masked_fill_(ignored, 0.0)[:, 0]


def _check(logits: Tensor, targets: Tensor) -> None:
    if logits.dim() != 2 or targets.shape != logits.shape[:1] or targets.dtype != torch.int64:
        raise ValueError(
            f"logits {tuple(logits.shape)} must be (L, V) and targets {tuple(targets.shape)} {targets.dtype} (L,) int64"
        )


def _takes(logits: Tensor) -> bool:
    return runs_kernel(logits) and logits.stride(1) == 1


def _layout(logits: Tensor) -> tuple[int, int, int, int]:
    """(rows, width, columns of a block, blocks of a row)."""
    rows, width = logits.shape
    columns = min(_BLOCK, block(width))
    return rows, width, columns, -(-width // columns)


def _losses(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """(L,) losses, and (L, 2) the peak of each row with its sum of exp(s - peak)."""
    rows, width, columns, parts = _layout(logits)
    partial = torch.empty((rows, 2 * parts), dtype=torch.float32, device=logits.device)
    launch(
        _parts_kernel,
        (rows * parts,),
        logits,
        targets,
        partial,
        logits.stride(0),
        WIDTH=width,
        PARTS=parts,
        BLOCK=columns,
        num_warps=8,
    )
    losses, joined = (torch.empty((rows, *more), dtype=torch.float32, device=logits.device) for more in ((), (2,)))
    launch(
        _join_kernel,
        ((rows + _ROWS - 1) // _ROWS,),
        logits,
        targets,
        partial,
        joined,
        losses,
        rows,
        logits.stride(0),
        WIDTH=width,
        PARTS=parts,
        ROWS=_ROWS,
        BLOCK_PARTS=block(parts),
        num_warps=1,
    )
    return losses, joined


@kernel()
def _parts_kernel(
    logits_at: Pointer,
    targets_at: Pointer,
    partial_at: Pointer,
    logits_row: Value,
    WIDTH: constexpr,
    PARTS: constexpr,
    BLOCK: constexpr,
) -> None:
    """Each program reads one block of a row: its largest element and its sum; rows without a target are not read."""
    row, part = tl.program_id(0) // PARTS, tl.program_id(0) % PARTS
    if tl.load(targets_at + row) != _IGNORE:
        column = part * BLOCK + tl.arange(0, BLOCK)
        at = logits_at + row.to(tl.int64) * logits_row + column
        x = tl.load(at, mask=column < WIDTH, other=-float("inf")).to(tl.float32)
        peak = tl.max(x, axis=0)
        out = partial_at + row.to(tl.int64) * (2 * PARTS) + part
        tl.store(out, peak)
        tl.store(out + PARTS, tl.sum(tl.exp(x - peak), axis=0))


@kernel("num_rows")
def _join_kernel(
    logits_at: Pointer,
    targets_at: Pointer,
    partial_at: Pointer,
    joined_at: Pointer,
    losses_at: Pointer,
    num_rows: Value,
    logits_row: Value,
    WIDTH: constexpr,
    PARTS: constexpr,
    ROWS: constexpr,
    BLOCK_PARTS: constexpr,
) -> None:
    """A target outside the row, which no caller has, makes the loss NaN: that stops a run, and is no read elsewhere."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    target = tl.load(targets_at + row, mask=row < num_rows, other=_IGNORE)
    counted = target != _IGNORE
    part = tl.arange(0, BLOCK_PARTS)[None, :]
    inside = counted[:, None] & (part < PARTS)
    at = partial_at + row.to(tl.int64)[:, None] * (2 * PARTS) + part
    peaks = tl.load(at, mask=inside, other=-float("inf"))
    peak = tl.where(counted, tl.max(peaks, axis=1), 0.0)
    sums = tl.load(at + PARTS, mask=inside, other=0.0) * tl.exp(peaks - peak[:, None])
    total = tl.where(counted, tl.sum(sums, axis=1), 1.0)
    within = counted & (target >= 0) & (target < WIDTH)
    wanted = tl.load(logits_at + row.to(tl.int64) * logits_row + target, mask=within, other=float("nan"))
    loss = tl.log(total) + (peak - wanted.to(tl.float32))
    tl.store(losses_at + row, tl.where(counted, loss, 0.0), mask=row < num_rows)
    tl.store(joined_at + 2 * row, peak, mask=row < num_rows)
    tl.store(joined_at + 2 * row + 1, total, mask=row < num_rows)


@kernel("num_rows")
def _gradient_kernel(
    logits_at: Pointer,
    targets_at: Pointer,
    joined_at: Pointer,
    num_rows: Value,
    logits_row: Value,
    WIDTH: constexpr,
    PARTS: constexpr,
    BLOCK: constexpr,
) -> None:
    """One block of a row a program, from the last row to the first: those that were read last are still in the cache."""
    row, part = num_rows - 1 - tl.program_id(0) // PARTS, tl.program_id(0) % PARTS
    column = part * BLOCK + tl.arange(0, BLOCK)
    inside = column < WIDTH
    at = logits_at + row.to(tl.int64) * logits_row + column
    target = tl.load(targets_at + row)
    if target != _IGNORE:
        peak, total = tl.load(joined_at + 2 * row), tl.load(joined_at + 2 * row + 1)
        x = tl.load(at, mask=inside, other=-float("inf")).to(tl.float32)
        grad = tl.exp(x - peak) / total - tl.where(column == target, 1.0, 0.0)
        tl.store(at, grad.to(at.dtype.element_ty), mask=inside)
    else:
        tl.store(at, tl.zeros((BLOCK,), at.dtype.element_ty), mask=inside)
