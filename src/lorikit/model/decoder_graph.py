"""Training steps of the decoder as CUDA graphs: thousands of kernels started by one call.

A graph has fixed shapes, so a batch is put into the next larger bucket: its tokens are followed by a dummy sequence
without labels, to which no gradient flows, its labels by rows that the loss leaves out, its sequences by empty ones.
Sequences do not see each other and a dropout mask depends on a token's place in the batch alone, so a step's result does not
depend on its bucket. Graphs share one memory pool: they run one after the other, and nothing but the loss and the gradients
outlives a replay.
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
from lorikit.model.decoder_batch import Layout, Packed, key_index, keys_of_tokens
from lorikit.model.decoder_layer import Rows
from lorikit.model.kernels.launch import CAPTURING
from lorikit.model.packed_attention import Keys, Sequences

# Tokens are rounded up to the first below the second, to the third from there on: what that adds to a few hundred steps costs
# less than the graphs that finer buckets would need.
_FINE, _MANY, _COARSE = 64, 512, 128
_SHARES = 4  # labels are rounded up to a quarter of the tokens; finer steps mean more graphs to capture
_SEQUENCES = 16
_LONGEST = 512  # the least that attention is started for: blocks beyond a sequence's end stop at once

Compute = Callable[[Packed, Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class Bucket:
    """The sizes of a graph: tokens, labelled rows, sequences, the longest sequence, and the shared tokens, which stand in
    front as a sequence of their own."""

    tokens: int
    labels: int
    sequences: int
    longest: int
    prefix: int


def bucket_of(at: Layout) -> Bucket:
    """The smallest bucket that holds the batch and a dummy token at the end."""
    return bucket_for(len(at.tokens), len(at.labelled), len(at.starts), int(at.lengths.max()), at.prefix)


def bucket_for(num_tokens: int, num_labels: int, num_sequences: int, longest: int, prefix: int = 0) -> Bucket:
    """The smallest bucket for tokens, labels and sequences of these numbers."""
    tokens = _round_up(num_tokens + 1, _FINE if num_tokens < _MANY else _COARSE)
    sequences = _round_up(num_sequences + 2, _SEQUENCES)  # with the shared one and the dummy
    dummy = tokens - num_tokens + (sequences - num_sequences) * prefix
    return Bucket(
        tokens=tokens,
        labels=_round_up(num_labels, tokens // _SHARES),
        sequences=sequences,
        longest=1 << (max(_LONGEST, longest, dummy) - 1).bit_length(),
        prefix=prefix,
    )


@dataclass(frozen=True, slots=True)
class Inputs:
    """What a graph reads: input_ids and position_ids (T,), cu_q and cu_k (N+1,) int32, outputs and targets (L,), seed ();
    and with P shared tokens the U = T + N P keys: index (U,), own (T - P,), copies (N, P), else empty."""

    input_ids: Tensor
    position_ids: Tensor
    cu_q: Tensor
    cu_k: Tensor
    outputs: Tensor
    targets: Tensor
    index: Tensor
    own: Tensor
    copies: Tensor
    seed: Tensor

    def on(self, device: torch.device) -> Inputs:
        """A copy there."""
        return Inputs(**{field.name: getattr(self, field.name).to(device) for field in fields(Inputs)})

    def packed(self, longest: int) -> Packed:
        """The same as the layers take it: every token asks a query in the last layer too."""
        keys = Keys(self.index, self.own, self.copies, self.cu_q, 1) if len(self.index) else None
        sequences = Sequences(self.cu_q, self.cu_k, longest, longest, keys)
        last = Rows(None, self.outputs, self.outputs)
        return Packed(self.input_ids, self.position_ids, sequences, sequences, last, self.targets)


def fill_bucket(batch: Batch, at: Layout, bucket: Bucket) -> Inputs:
    """The batch in its bucket, on the CPU, where there is a GPU in pinned memory."""
    num_tokens, missing = len(at.tokens), bucket.labels - len(at.labelled)
    extra = bucket.tokens - num_tokens
    front = at.starts.new_full((2,) if at.prefix else (1,), at.prefix)
    front[0] = 0
    cu_q = torch.cat([front, at.ends])
    index, own, copies = _keys(at, bucket) if at.prefix else [torch.zeros(0, dtype=torch.int64)] * 3
    cu_k = torch.cat([front, at.prefix + at.lengths.cumsum(0)])
    ends = bucket.sequences + 1 - len(cu_q)
    filled = Inputs(
        input_ids=pad(batch.input_ids[at.tokens], (0, extra)),
        position_ids=torch.cat([batch.position_ids[at.tokens], torch.arange(extra)]),
        cu_q=pad(cu_q, (0, ends), value=bucket.tokens).to(torch.int32),
        cu_k=pad(cu_k, (0, ends), value=len(index) or bucket.tokens).to(torch.int32),
        outputs=pad(at.labelled, (0, missing), value=bucket.tokens - 1),
        targets=pad(at.targets, (0, missing), value=IGNORE),
        index=index,
        own=own,
        copies=copies,
        seed=torch.zeros((), dtype=torch.int64),
    )
    if not torch.cuda.is_available():
        return filled
    return Inputs(**{field.name: getattr(filled, field.name).pin_memory() for field in fields(Inputs)})


def _keys(at: Layout, bucket: Bucket) -> tuple[Tensor, Tensor, Tensor]:
    """index, own and copies. What fills the bucket are keys of the dummy sequence: no gradient ever flows to them."""
    size = bucket.tokens + bucket.sequences * at.prefix
    index = torch.cat([torch.arange(at.prefix), key_index(at)])
    own, copies = (t + at.prefix for t in keys_of_tokens(at))
    copies = torch.cat([torch.arange(at.prefix)[None], copies])
    extra = torch.arange(len(at.tokens), bucket.tokens)
    index = torch.cat([pad(index, (0, size - len(index) - len(extra)), value=bucket.tokens - 1), extra])
    own = torch.cat([own, torch.arange(size - len(extra), size)])
    return index, own, pad(copies, (0, 0, 0, bucket.sequences - len(copies)), value=size - 1)


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
        inputs = filled.on(self._device)
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            if not self._warm:  # libraries are started outside of any graph
                torch.autograd.grad(compute(inputs.packed(bucket.longest), inputs.seed), self._parameters)
                self._warm = True
                torch.cuda.synchronize(self._device)
                torch.cuda.empty_cache()  # the graphs have a pool of their own: without this the memory is taken twice
            graph = torch.cuda.CUDAGraph()
            # Not torch.cuda.graph: it empties torch's cache for each graph, which is slow.
            with CAPTURING, _no_collection():
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
