"""Training steps of the decoder as CUDA graphs: thousands of kernels started by one call.

A graph has fixed shapes, so a batch is put into the next larger bucket: its tokens are followed by a dummy sequence
without labels, its labels by rows that the loss leaves out, its sequences by empty ones. Sequences do not see each other
and a dropout mask depends on a token's place in the batch alone, so a step's result does not depend on its bucket. Graphs
share one memory pool: they run one after the other, and nothing but the loss and the gradients outlives a replay.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, fields

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from lorikit.data.values import IGNORE, Batch
from lorikit.model.decoder_batch import Packed
from lorikit.model.decoder_layer import Rows
from lorikit.model.kernels.launch import compiling_ahead
from lorikit.model.packed_attention import Sequences

_TOKENS = 128  # tokens are rounded up to this; products of such sizes are the fast ones on tensor cores
_SHARES = 4  # labels are rounded up to a quarter of the tokens; finer steps mean more graphs to capture
_SEQUENCES = 16
_LONGEST = 512  # the least that attention is started for: blocks beyond a sequence's end stop at once

Compute = Callable[[Packed, Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class Bucket:
    """The sizes of a graph: tokens, labelled rows, sequences (the dummy among them), the longest sequence."""

    tokens: int
    labels: int
    sequences: int
    longest: int


def bucket_of(batch: Batch) -> Bucket:
    """The smallest bucket that holds the batch."""
    longest = max(_LONGEST, 1 << (batch.max_seqlen - 1).bit_length())
    tokens = _round_up(batch.num_tokens, _TOKENS)
    return Bucket(
        tokens=tokens,
        labels=_round_up(batch.num_targets, tokens // _SHARES),
        sequences=_round_up(len(batch.cu_seqlens), _SEQUENCES),  # one more than the batch's own: the dummy
        longest=min(longest, max(tokens, _LONGEST)),
    )


@dataclass(frozen=True, slots=True)
class Inputs:
    """What a graph reads: input_ids and position_ids (T,), cu_seqlens (N+1,) int32, outputs and targets (L,), seed ()."""

    input_ids: Tensor
    position_ids: Tensor
    cu_seqlens: Tensor
    outputs: Tensor
    targets: Tensor
    seed: Tensor

    def packed(self, longest: int) -> Packed:
        """The same as the layers take it: every token asks a query in the last layer too."""
        sequences = Sequences(self.cu_seqlens, self.cu_seqlens, longest, longest)
        last = Rows(None, self.outputs, self.outputs)
        return Packed(self.input_ids, self.position_ids, sequences, sequences, last, self.targets)


def fill_bucket(batch: Batch, bucket: Bucket) -> Inputs:
    """The batch in its bucket, on the CPU, where there is a GPU in pinned memory."""
    extra = bucket.tokens - batch.num_tokens
    labelled = (batch.targets != IGNORE).nonzero()[:, 0]
    missing = bucket.labels - len(labelled)
    ends = bucket.sequences + 1 - len(batch.cu_seqlens)
    filled = Inputs(
        input_ids=pad(batch.input_ids, (0, extra)),
        position_ids=torch.cat([batch.position_ids, torch.arange(extra)]),
        cu_seqlens=pad(batch.cu_seqlens, (0, ends), value=bucket.tokens),
        outputs=pad(labelled, (0, missing), value=bucket.tokens - 1),
        targets=pad(batch.targets[labelled], (0, missing), value=IGNORE),
        seed=torch.zeros((), dtype=torch.int64),
    )
    if not torch.cuda.is_available():
        return filled
    return Inputs(**{field.name: getattr(filled, field.name).pin_memory() for field in fields(Inputs)})


class StepGraphs:
    """Graphs of one computation (loss_sum of a Packed under a seed) and its gradient, one for each bucket that comes up.

    `parameters` get their `.grad` added to, which must exist and stay where it is.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], device: torch.device) -> None:
        self.capture_seconds = 0.0
        self._parameters, self._device = list(parameters), device
        self._graphs: dict[Bucket, tuple[torch.cuda.CUDAGraph, Inputs]] = {}
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._loss = torch.zeros((), device=device)
        self._warm = False

    def __len__(self) -> int:
        return len(self._graphs)

    def add_gradient(self, compute: Compute, bucket: Bucket, filled: Inputs, seed: int) -> Tensor:
        """() float32: the loss sum of a batch in its bucket, its gradient added to the parameters' `.grad`.

        After torch.OutOfMemoryError in a capture all graphs are gone: what the caller does next needs their room.
        """
        if bucket not in self._graphs:
            begun = time.perf_counter()
            try:
                self._graphs[bucket] = self._capture(compute, bucket, filled)
            except (RuntimeError, MemoryError):
                self._graphs.clear()
                self._pool = torch.cuda.graph_pool_handle()
                raise
            self.capture_seconds += time.perf_counter() - begun
        graph, inputs = self._graphs[bucket]
        for field in fields(Inputs):
            getattr(inputs, field.name).copy_(getattr(filled, field.name), non_blocking=True)
        inputs.seed.fill_(seed)
        graph.replay()
        return self._loss.clone()

    def _capture(self, compute: Compute, bucket: Bucket, filled: Inputs) -> tuple[torch.cuda.CUDAGraph, Inputs]:
        inputs = Inputs(**{f.name: getattr(filled, f.name).to(self._device) for f in fields(Inputs)})
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            if not self._warm:  # kernels are compiled and libraries started outside of any graph
                with compiling_ahead():
                    torch.autograd.grad(compute(inputs.packed(bucket.longest), inputs.seed), self._parameters)
                torch.autograd.grad(compute(inputs.packed(bucket.longest), inputs.seed), self._parameters)
                self._warm = True
                torch.cuda.synchronize(self._device)
                torch.cuda.empty_cache()  # the graphs have a pool of their own: without this the memory is taken twice
            torch.cuda.synchronize(self._device)
            graph = torch.cuda.CUDAGraph()
            # Not torch.cuda.graph: it empties torch's cache for each graph, which is slow.
            with _no_collection():
                graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
                try:
                    self._once(compute, inputs, bucket)
                except BaseException:
                    with suppress(RuntimeError):  # the capture may be broken, the reason is what counts
                        graph.capture_end()
                    raise
                graph.capture_end()
        torch.cuda.current_stream(self._device).wait_stream(self._stream)
        return graph, inputs

    def _once(self, compute: Compute, inputs: Inputs, bucket: Bucket) -> None:
        loss = compute(inputs.packed(bucket.longest), inputs.seed)
        grads: list[Tensor] = list(torch.autograd.grad(loss, self._parameters))
        torch._foreach_add_(self._grads(), grads)
        self._loss.copy_(loss.detach())

    def _grads(self) -> list[Tensor]:
        return [p.grad for p in self._parameters if p.grad is not None]


@contextmanager
def _no_collection() -> Iterator[None]:
    """No garbage collection inside: the end of another engine's graph would make a capture in progress invalid."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def _round_up(number: int, step: int) -> int:
    return -(-number // step) * step
