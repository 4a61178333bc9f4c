"""Copies on the host of what lies in one flat buffer: one transfer, and views of it."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, cuda


def host_copies(flat: Tensor, parameters: Sequence[Tensor]) -> list[Tensor]:
    """What of `flat` (n,) belongs to each parameter of a buffer that is laid out in the same way, copied to the CPU.

    The results are views of one copy, made through pinned memory where the buffer is on a GPU, and complete on return.
    """
    copy = flat.detach().to("cpu", copy=True, non_blocking=True)
    if flat.is_cuda:
        cuda.current_stream(flat.device).synchronize()
    return [copy[p.storage_offset() :][: p.numel()].view(p.shape) for p in parameters]
