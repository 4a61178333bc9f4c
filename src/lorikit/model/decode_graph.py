"""The decoding step of a GPU as CUDA graphs: one for each size of batch and way of choosing, started by one call.

A batch is filled up to the next power of two with rows that belong to no slot. The first step of a size runs as it is, on the
stream of captures, which compiles kernels and starts libraries there; the second is captured. All that a graph reads stays at
its address: the slots, the stacks of adapters, and the list of rows, which is written anew when requests join or leave. A step
that cannot be captured runs as it is from then on, with one warning.
"""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass

import torch
from torch import Tensor

from lorikit.model.kernels.launch import CAPTURING

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
        self._broken = False
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def __len__(self) -> int:
        return len(self._captured)

    def run(self, slots: Sequence[int], modes: Modes, adapted: bool) -> tuple[Tensor, Tensor]:
        """One step of these slots; the results stand until the next step."""
        size = 1 << (len(slots) - 1).bit_length()
        rows, key = self._put(list(slots), size), (size, modes, adapted)
        if key not in self._captured and key in self._seen and not self._broken:
            try:
                self._captured[key] = self._capture(rows, modes, adapted)
            except RuntimeError as error:  # of every kind: out of memory too
                self._broken = True
                self.forget()
                reason = str(error).splitlines()[0]
                warnings.warn(f"decoding goes on without CUDA graphs, slower: {reason}", RuntimeWarning, stacklevel=2)
        found = self._captured.get(key)
        if found is None:
            self._seen.add(key)
            logits, chosen = self._eager(rows, modes, adapted)
        else:
            found.graph.replay()
            logits, chosen = found.logits, found.chosen
        return logits[: len(slots)], chosen[: len(slots)]

    def forget(self) -> None:
        """Capture all graphs anew, at their next use: something that they read has another address."""
        self._captured.clear()
        self._pool = torch.cuda.graph_pool_handle()  # one whose last graph has gone takes no other

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

    def _eager(self, rows: Tensor, modes: Modes, adapted: bool) -> tuple[Tensor, Tensor]:
        """A step without a graph, on the stream of captures: cuBLAS has a handle and a workspace for each stream, which must
        be there before anything is captured on it."""
        current = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(current)
        with torch.cuda.device(self._device), torch.cuda.stream(self._stream):
            logits, chosen = self._compute(rows, modes, adapted)
        current.wait_stream(self._stream)
        for result in (logits, chosen):
            result.record_stream(current)
        return logits, chosen

    def _capture(self, rows: Tensor, modes: Modes, adapted: bool) -> _Captured:
        """One capture at a time in the whole process: training captures its steps in a thread."""
        graph = torch.cuda.CUDAGraph()
        current = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(current)
        with CAPTURING:
            was_on = gc.isenabled()
            gc.disable()  # the end of another graph would make this capture invalid
            try:
                with torch.cuda.device(self._device), torch.cuda.stream(self._stream):
                    graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
                    try:
                        logits, chosen = self._compute(rows, modes, adapted)
                    except BaseException:
                        with suppress(RuntimeError):  # the capture may be broken, the reason is what counts
                            graph.capture_end()
                        raise
                    graph.capture_end()
            finally:
                if was_on:
                    gc.enable()
        current.wait_stream(self._stream)
        return _Captured(graph, logits, chosen)
