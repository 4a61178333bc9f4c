"""Inputs of layers in pinned host memory between forward and backward: the copies run beside the computation."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(slots=True)
class _Copy:
    on_host: Tensor
    back: Tensor | None = None


class HostCopies:
    """The tensors of one forward in the order in which they were put; the backward takes them in the reverse order."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._copies: list[_Copy] = []
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def put(self, tensor: Tensor) -> int:
        """Start the copy to the host; the number to take it back with. The caller may let go of the tensor."""
        on_host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            on_host.copy_(tensor, non_blocking=True)
        tensor.record_stream(self._stream)
        self._copies.append(_Copy(on_host))
        return len(self._copies) - 1

    def take(self, number: int) -> Tensor:
        """The tensor on the device again; the one put before it starts to come back meanwhile."""
        self._start(number)
        tensor, self._copies[number].back = self._copies[number].back, None
        assert tensor is not None
        current = torch.cuda.current_stream(self._device)
        current.wait_stream(self._stream)
        tensor.record_stream(current)
        if number:
            self._start(number - 1)
        return tensor

    def _start(self, number: int) -> None:
        copy = self._copies[number]
        if copy.back is None:
            with torch.cuda.stream(self._stream):
                copy.back = copy.on_host.to(self._device, non_blocking=True)
