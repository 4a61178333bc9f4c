"""What a step costs, in bytes and in seconds: the ledger that both engines' models write to, and the speeds of machines.

A model of an engine replays its steps in the order of the code, with sizes instead of tensors. The ledger adds up what is
held at each moment, and for each operation the longest of three times:

    seconds = max(FLOPs / rate of its kind, bytes moved / bandwidth, the shortest kernel)
    a step  = max(sum of these, operations x time to start one) + host work of the optimizer

In a CUDA graph the starts cost nothing. Memory does not depend on the machine's speed, and is exact where the code is.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import cycle

from lorikit.data.values import IGNORE, Example

GIB = 2**30
PARTS: dict[str, str] = {
    "weights": "frozen weights",
    "adapter": "adapter, its copy in the compute type, gradient, AdamW's two moments",
    "gradient": "gradients on their way to the adapter's",
    "activations": "kept for the backward pass",
    "working": "of the layer being computed",
    "logits": "logits of one chunk and their gradient",
    "attention": "workspace of attention",
    "libraries": "workspace of libraries, gaps of the heap",
}

# Achieved shares of the specification sheets' figures: what an H100 reached at these models' products (725 of 989 TFLOP/s
# at about 1,000 rows) and copies (2.62 of 3.35 TB/s), and FlashAttention-2 against those products.
_MATMUL, _BANDWIDTH, _FORWARD, _BACKWARD = 0.73, 0.78, 0.41, 0.30
_CPU_PRODUCTS = 0.8  # a model's products, of several sizes and next to other work, against one measured alone


class Uncounted(Exception):
    """The model does something that needs values, such as choosing experts, or attends in a way that is not modelled."""


@dataclass(frozen=True, slots=True)
class Rates:
    """How fast a machine is. FLOP/s, bytes/s and seconds; `memory` in bytes; `source` says what the figures are from."""

    name: str
    memory: int
    matmul: float
    float32: float
    bandwidth: float
    attention_forward: float
    attention_backward: float
    launch: float
    """Seconds that the host takes to start one operation of the decoder; 0 inside a CUDA graph."""
    module: float
    """The same for an operation in the forward of transformers' and peft's modules."""
    node: float
    """The same for one that autograd starts by itself."""
    least: float
    """Seconds of the shortest kernel."""
    source: str
    fp8: bool
    """Whether it multiplies 8-bit floats."""

    def product(self, element_size: int) -> float:
        """FLOP/s of products of matrices with elements of this size."""
        return self.float32 if element_size == 4 else self.matmul


def _gpu(
    name: str,
    gib: float,
    tflops: float,
    float32: float,
    tb_per_second: float,
    *,
    measured: bool = False,
    fp8: bool = True,
) -> Rates:
    return Rates(
        name=name,
        memory=int(gib * GIB),
        matmul=tflops * 1e12 * _MATMUL,
        float32=float32 * 1e12 * _MATMUL,
        bandwidth=tb_per_second * 1e12 * _BANDWIDTH,
        attention_forward=tflops * 1e12 * _MATMUL * _FORWARD,
        attention_backward=tflops * 1e12 * _MATMUL * _BACKWARD,
        launch=22e-6,  # an H100's host; so are the next two, from the generic engine's 285 and 591 ms a step there
        module=74e-6,
        node=10e-6,
        least=2.5e-6,
        source="measured" if measured else f"computed: {_MATMUL:.0%} and {_BANDWIDTH:.0%} of its data sheet",
        fp8=fp8,
    )


# Memory as torch reports it; dense bfloat16 and float32 TFLOP/s and TB/s of the vendor's data sheets.
GPUS: dict[str, Rates] = {
    "h100": _gpu("H100 80GB", 79.1, 989, 67, 3.35, measured=True),
    "h200": _gpu("H200", 139.7, 989, 67, 4.8),
    "a100": _gpu("A100 80GB", 79.1, 312, 19.5, 2.04, fp8=False),
    "a100-40": _gpu("A100 40GB", 39.4, 312, 19.5, 1.555, fp8=False),
    "l40s": _gpu("L40S", 44.4, 362, 91.6, 0.864),
    "rtx4090": _gpu("RTX 4090", 23.5, 165, 82.6, 1.008),
    "rtx3090": _gpu("RTX 3090", 23.6, 71, 35.6, 0.936, fp8=False),
}


def known_gpu(name: str) -> Rates | None:
    """The row of the table for a name as a person types it or as the driver reports it; None for other GPUs."""
    plain = "".join(c for c in name.casefold() if c.isalnum())
    if "a100" in plain and "40" in plain.replace("a100", ""):
        return GPUS["a100-40"]
    found = (rates for key, rates in GPUS.items() if key.replace("-", "") in plain)
    return next(found, None)


def measure_cpu(element_size: int, seconds: float = 0.5) -> Rates:
    """This machine's processor, from products with matrices that are not in its caches and sums into new tensors, which
    together take `seconds`."""
    import torch

    dtype = torch.float32 if element_size == 4 else torch.bfloat16
    x, big = torch.randn(256, 576).to(dtype), torch.zeros(1 << 20)
    weights = cycle(torch.randn(24, 1536, 576).to(dtype).unbind())

    def rate(work: Callable[[], object]) -> float:
        work()
        count, begun = 0, time.perf_counter()
        while time.perf_counter() - begun < seconds / 2:
            work()
            count += 1
        return count / (time.perf_counter() - begun)

    with torch.no_grad():
        products = rate(lambda: x @ next(weights).t()) * 2 * 256 * 576 * 1536
        moved = rate(lambda: big + 1.0) * 8 * big.numel()
    products *= _CPU_PRODUCTS
    return Rates(
        name="this CPU",
        memory=0,
        matmul=products,
        float32=products,
        bandwidth=moved,
        attention_forward=products / 2,
        attention_backward=products / 2,
        launch=0.0,
        module=0.0,
        node=0.0,
        least=8e-6,
        source="measured now on small products",
        fp8=False,
    )


@dataclass(frozen=True, slots=True)
class Stored:
    """How linear weights are stored: bytes a weight, bytes a row beside them, and bytes a weight of the copy in the
    compute type that one product makes (0: it reads the stored ones). NF4 is about Stored(0.52, 0, 2), float8 Stored(1, 4, 1).
    """

    per_weight: float
    per_row: float = 0.0
    copied: float = 0.0
    faster: float = 1.0
    """How many times the products' rate in the compute type."""
    kept: float = 0.0
    """Bytes a weight of a second copy that stays."""

    def size(self, rows: int, columns: int) -> int:
        """Bytes of a matrix, without the second copy."""
        return round(rows * columns * self.per_weight + rows * self.per_row)


@dataclass(frozen=True, slots=True)
class Forward:
    """Sizes of one forward: T tokens in sequences of `lengths`, of which the last `query_lengths` ask in the last layer
    (S of them), and L rows with a label. `bucket`: replayed as a CUDA graph of these sizes."""

    lengths: tuple[int, ...]
    query_lengths: tuple[int, ...]
    labels: int
    bucket: bool = False

    @property
    def tokens(self) -> int:
        """T."""
        return sum(self.lengths)

    @property
    def queries(self) -> int:
        """S."""
        return sum(self.query_lengths)


@dataclass(frozen=True, slots=True)
class Row:
    """Sizes of one Example: its tokens, where its first target stands and where its last one ends, how many there are."""

    tokens: int
    first: int
    end: int
    labels: int


def row_of(example: Example) -> Row:
    """The sizes of an example; `end` is 0 when nothing in it is labelled."""
    labels = example.labels[1:]
    count = len(labels) - labels.count(IGNORE)
    if not count:
        return Row(len(example.input_ids), 0, 0, 0)
    first = next(place for place, label in enumerate(labels) if label != IGNORE)
    last = next(place for place in range(len(labels) - 1, -1, -1) if labels[place] != IGNORE)
    return Row(len(example.input_ids), first, last + 1, count)


def forward_of(rows: Sequence[Row]) -> Forward:
    """These rows in one forward, whole."""
    lengths = tuple(row.tokens for row in rows)
    return Forward(lengths, lengths, sum(row.labels for row in rows))


def cut_forward_of(rows: Sequence[Row]) -> Forward:
    """The same without what no loss depends on, as decoder_batch.cut_to_labels cuts it."""
    used = [row for row in rows if row.labels]
    return Forward(
        tuple(row.end for row in used), tuple(row.end - row.first for row in used), sum(row.labels for row in used)
    )


def attended_pairs(forward: Forward, window: int, *, last: bool, tile: int) -> int:
    """Pairs of query and key that attention computes, in tiles of `tile` by `tile`; a window of 0 is none."""
    pairs = 0
    for length, asking in zip(forward.lengths, forward.query_lengths if last else forward.lengths, strict=True):
        if tile == 1 and not window:
            pairs += asking * (2 * length - asking + 1) // 2
            continue
        for end in range(length, length - asking, -tile):
            seen = min(end, window + tile - 1) if window else end
            pairs += min(tile, asking) * -(-seen // tile) * tile
    return pairs


@dataclass(slots=True)
class Ledger:
    """Bytes held now and at the worst moment, and the time of what was computed, if `rates` are given."""

    rates: Rates | None = None
    held: dict[str, int] = field(default_factory=dict)
    at_peak: dict[str, int] = field(default_factory=dict)
    total: int = 0
    peak: int = 0
    operations: int = 0
    host: float = 0.0
    """Seconds to start them all."""
    slow: bool | None = None
    """Who starts them: None the decoder, True modules of transformers, False autograd."""
    flops: float = 0.0
    seconds: float = 0.0

    def take(self, part: str, size: int) -> None:
        """Hold `size` bytes more."""
        self.held[part] = self.held.get(part, 0) + size
        self.total += size
        if self.total > self.peak:
            self.peak, self.at_peak = self.total, dict(self.held)

    def free(self, part: str, size: int) -> None:
        """Hold `size` bytes less."""
        self.held[part] -= size
        self.total -= size

    def spike(self, part: str, size: int) -> None:
        """Hold `size` bytes for a moment."""
        self.take(part, size)
        self.free(part, size)

    @contextmanager
    def local(self) -> Iterator[Callable[..., None]]:
        """new(size, part): held until the block ends, as a function's variables are."""
        taken: list[tuple[str, int]] = []

        def new(size: int, part: str = "working") -> None:
            self.take(part, size)
            taken.append((part, size))

        yield new
        for part, size in taken:
            self.free(part, size)

    def product(self, rows: int, inputs: int, outputs: int, element_size: int, stored: Stored | None = None) -> None:
        """A product of (rows, inputs) with a matrix (outputs, inputs), stored in the element type or as `stored` says."""
        stored = stored or Stored(element_size)
        rate = self.rates.product(element_size) * stored.faster if self.rates else 0.0
        moved = rows * (inputs + outputs) * element_size + stored.size(outputs, inputs)
        self.compute(2.0 * rows * inputs * outputs, moved, rate)

    def move(self, size: float, operations: int = 1) -> None:
        """An operation bound by the `size` bytes that it reads and writes."""
        self.compute(0.0, size, 1.0, operations)

    def compute(self, flops: float, moved: float, rate: float, operations: int = 1) -> None:
        """Operations of so many FLOPs at `rate`, reading and writing `moved` bytes."""
        self.operations += operations
        self.flops += flops
        if rates := self.rates:
            start = rates.launch if self.slow is None else rates.module if self.slow else rates.node
            self.host += operations * start
            self.seconds += max(flops / rate, moved / rates.bandwidth, operations * rates.least)


def step_seconds(ledger: Ledger, *, graph: bool) -> float:
    """How long the forward and backward in this ledger take; the starts of operations cost nothing in a graph."""
    assert ledger.rates is not None
    return max(ledger.seconds, 0.0 if graph else ledger.host)


def renamed(rates: Rates, name: str, memory: int) -> Rates:
    """The same speeds for the GPU that was found, with the memory that it reports."""
    return replace(rates, name=name, memory=memory)
