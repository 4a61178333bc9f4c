"""The decoding step of a GPU as CUDA graphs: one for each size of batch and way of choosing, started by one call.

A batch is filled up to the next power of two with rows that belong to no slot. The first step of a size runs as it is, which
compiles kernels and starts libraries; the second is captured. All that a graph reads stays at its address: the slots, the
stacks of adapters, and the list of rows, which is written anew when requests join or leave.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Modes = tuple[bool, bool, bool]
Compute = Callable[[Tensor, Modes, bool], tuple[Tensor, Tensor]]


@dataclass(slots=True)
class _Captured:
    graph: torch.cuda.CUDAGraph
    logits: Tensor
    chosen: Tensor


class DecodeGraphs:
    """Graphs of `compute(rows, modes, adapted)`, which gives logits (B, V) and chosen ids (B,); `nobody` is the row that
    batches are filled with."""

    def __init__(self, compute: Compute, nobody: int, device: torch.device) -> None:
        self._compute, self._nobody, self._device = compute, nobody, device
        self._captured: dict[tuple[int, Modes, bool], _Captured] = {}
        self._seen: set[tuple[int, Modes, bool]] = set()
        self._rows: dict[int, tuple[list[int], Tensor]] = {}
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def __len__(self) -> int:
        return len(self._captured)

    def run(self, slots: Sequence[int], modes: Modes, adapted: bool) -> tuple[Tensor, Tensor]:
        """One step of these slots; the results stand until the next step."""
        size = 1 << (len(slots) - 1).bit_length()
        rows, key = self._put(list(slots), size), (size, modes, adapted)
        if key not in self._captured:
            if key not in self._seen:
                self._seen.add(key)
                logits, chosen = self._compute(rows, modes, adapted)
                return logits[: len(slots)], chosen[: len(slots)]
            self._captured[key] = self._capture(rows, modes, adapted)
        found = self._captured[key]
        found.graph.replay()
        return found.logits[: len(slots)], found.chosen[: len(slots)]

    def forget(self) -> None:
        """Capture all graphs anew, at their next use: something that they read has another address."""
        self._captured.clear()

    def _put(self, slots: list[int], size: int) -> Tensor:
        """The rows of a batch of this size, at an address of their own."""
        wanted = slots + [self._nobody] * (size - len(slots))
        if size not in self._rows:
            self._rows[size] = wanted, torch.tensor(wanted).to(self._device)
        elif self._rows[size][0] != wanted:
            rows = self._rows[size][1]
            rows.copy_(torch.tensor(wanted))
            self._rows[size] = wanted, rows
        return self._rows[size][1]

    def _capture(self, rows: Tensor, modes: Modes, adapted: bool) -> _Captured:
        graph = torch.cuda.CUDAGraph()
        current = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(current)
        was_on = gc.isenabled()
        gc.disable()  # the end of another graph would make this capture invalid
        try:
            with torch.cuda.device(self._device), torch.cuda.stream(self._stream):
                graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
                try:
                    logits, chosen = self._compute(rows, modes, adapted)
                finally:
                    graph.capture_end()
        finally:
            if was_on:
                gc.enable()
        current.wait_stream(self._stream)
        return _Captured(graph, logits, chosen)
