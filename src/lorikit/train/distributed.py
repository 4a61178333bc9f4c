"""The processes of one run: which is which, what they add up and what they agree on. torch.distributed does the work.

torchrun (or `lorikit train --gpus N`) starts N processes, ranks 0 to N - 1, each with the whole settings and all rows:

    rows of a step -> dealt out by tokens -> each rank's gradient -> one sum of the flat gradient -> the same AdamW everywhere

Every rank holds the same adapter to the bit. Rank 0 speaks, writes and answers prompts. What may differ between ranks (a
signal, memory that ran out, a loss that is not finite) is told with the gradient, so that all of them do the same about it.
Without torchrun there is one rank and nothing here does anything. No object is pickled on the way.
"""

from __future__ import annotations

import json
import math
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import astuple, dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

from lorikit.data.values import Example
from lorikit.errors import Interrupted
from lorikit.model.engine import Engine
from lorikit.train.pulse import Pulse
from lorikit.train.signals import Signals

if TYPE_CHECKING:
    from torch import Tensor
    from torch.distributed.distributed_c10d import Store, Work

PATIENCE = timedelta(minutes=30)  # one rank may generate, write or compile while the others wait
_LOOK = timedelta(seconds=2)  # between two looks for signs of life while waiting
_LAST_ANSWER = 20.0  # seconds; torchrun kills what has not ended 30 s after its signal
LAST_ERROR = "last_error"
"""Key in the store, followed by a rank, of what it says when it tells that it failed."""

T = TypeVar("T")


class LostRank(Exception):
    """Another process of the run is gone, or its connection."""


@dataclass(frozen=True, slots=True)
class Ranks:
    """This process among those of the run; `active` is False where nobody but this process works on it."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    num_nodes: int = 1
    store: Store | None = None
    pulse: Pulse | None = None
    """Signs of life, where the run has several machines."""

    @property
    def active(self) -> bool:
        """Whether torchrun started this process; also where it started no other."""
        return self.store is not None

    @property
    def first(self) -> bool:
        """Whether this one speaks, writes and answers."""
        return self.rank == 0

    def share(self, rows: Sequence[T], lengths: Sequence[int]) -> list[T]:
        """This rank's part of `rows`, in their order; see `deal`."""
        return [rows[k] for k in deal(lengths, self.size)[self.rank]]

    def add(self, flat: Tensor) -> None:
        """Replace a tensor by its sum over all ranks, the same bits on each."""
        import torch.distributed as dist

        with _watched():
            self._complete(dist.all_reduce(flat, async_op=not flat.is_cuda))

    def tell(self, values: Tensor) -> Tensor:
        """values (K,) float64 of this rank -> (N, K): those of every rank, on the same device."""
        import torch
        import torch.distributed as dist

        told = torch.empty(self.size, len(values), dtype=values.dtype, device=values.device)
        with _watched():
            self._complete(dist.all_gather(list(told), values, async_op=not values.is_cuda))
        return told

    def numbers(self, *values: float) -> list[tuple[float, ...]]:
        """These numbers of every rank, in the order of ranks; float64."""
        if not self.active:
            return [values]
        import torch

        return [tuple(row) for row in self.tell(torch.tensor(values, dtype=torch.float64)).tolist()]

    def copy(self, tensors: Sequence[Tensor]) -> None:
        """Fill CPU tensors of the same shapes on every rank with what rank 0 holds."""
        import torch.distributed as dist

        with _watched():
            for tensor in tensors:
                self._complete(dist.broadcast(tensor, 0, async_op=True))

    def text(self, value: Any) -> Any:
        """What rank 0 gives, JSON values, on every rank."""
        if not self.active:
            return value
        import torch

        data = torch.tensor(list(json.dumps(value).encode()) if self.first else [], dtype=torch.uint8)
        length = torch.tensor([len(data)])
        self.copy([length])
        data = data if self.first else torch.empty(int(length), dtype=torch.uint8)
        self.copy([data])
        return json.loads(bytes(data.tolist()))

    def wait(self) -> None:
        """Until every rank is here."""
        self.numbers(0.0)

    def failure(self, told: Sequence[Told]) -> str:
        """Who could not do its part of a step, and why; empty if all could."""
        failed = [rank for rank, one in enumerate(told) if one.failed]
        if not failed:
            return ""
        assert self.store is not None
        return f"rank {failed[0]}: {self.store.get(f'{LAST_ERROR}/{failed[0]}').decode()}"

    def say(self, report: Callable[[str], None]) -> Callable[[str], None]:
        """For what this rank alone knows: rank 0 says it to `report`, the others to stderr with their number."""
        return report if self.first else lambda text: print(f"[rank {self.rank}] {text}", file=sys.stderr)  # noqa: T201

    def part(self) -> None:
        """After the last exchange: from here on nobody waits for another, however long one takes."""
        if self.pulse:
            self.pulse.stop()

    def lost(self) -> str:
        """Which machine is lost, for somebody who will end this process because of it; empty while all are there."""
        return self.pulse.take() if self.pulse else ""

    def _complete(self, exchange: Work | None) -> None:
        """Wait for an exchange between CPUs. None: one between GPUs, which stands in the order of their work."""
        deadline = time.monotonic() + PATIENCE.total_seconds()
        while exchange is not None:
            try:
                exchange.wait(_LOOK)
            except RuntimeError as error:
                if "Operation timed out" not in str(error) or time.monotonic() > deadline:
                    raise
                if lost := self.lost():
                    raise LostRank(lost) from None
            else:
                return

    @contextmanager
    def first_on_each_node(self) -> Iterator[None]:
        """The block runs on one rank of each machine, then on its others, which find what the first one fetched."""
        if self.local_rank > 0:
            self.wait()
        try:
            yield
        finally:
            if self.active and self.local_rank == 0:
                self.wait()


def deal(lengths: Sequence[int], parts: int) -> list[list[int]]:
    """Numbers of the rows for each of `parts` ranks, of about equally many tokens; some may get none.

    Longest first to the rank with the fewest tokens; inside a part the rows keep their order. Depends on the lengths alone.
    """
    loads, found = [0] * parts, [[] for _ in range(parts)]  # type: list[int], list[list[int]]
    for k in sorted(range(len(lengths)), key=lambda k: (-lengths[k], k)):
        lightest = loads.index(min(loads))
        loads[lightest] += lengths[k]
        found[lightest].append(k)
    return [sorted(part) for part in found]


def lengths_of(rows: Sequence[Example]) -> list[int]:
    """Tokens of each row."""
    return [len(row.input_ids) for row in rows]


@contextmanager
def _watched() -> Iterator[None]:
    """Turn what torch says about a broken connection into LostRank."""
    try:
        yield
    except RuntimeError as error:
        words = str(error)
        if not any(part in words for part in ("onnection", "imed out", "imeout", "Broken pipe", "remote process")):
            raise
        late = "imeout" in words or "imed out" in words
        raise LostRank("it gave no answer" if late else "its connection broke") from None


class AgreedSignals:
    """Signals as all ranks know them: what came to one of them counts when it was told, in the same step, to all."""

    def __init__(self, own: Signals, ranks: Ranks) -> None:
        self.own, self._ranks = own, ranks
        self.received: str | None = None
        self._noted: float | None = None

    def defer(self) -> None:
        """See `Signals.defer`."""
        self.own.defer()

    def check(self) -> None:
        """Raise Interrupted on every rank, or on none."""
        if self.received:
            raise Interrupted(f"stopped by {self.received}")

    def number(self) -> float:
        """What this rank has to tell: the number of its signal, or 0."""
        return float(signal.Signals[self.own.received]) if self.own.received else 0.0

    def hear(self, numbers: Iterable[float]) -> None:
        """What the ranks told."""
        worst = int(max(numbers))
        self.received = self.received or (signal.Signals(worst).name if worst else None)

    def agree(self) -> None:
        """Tell and hear, without anything else to say."""
        self.hear(number for (number,) in self._ranks.numbers(self.number()))

    def watch(self) -> None:
        """LostRank when a machine is lost, and when the launcher stops this rank, as it does when another is gone, and the
        device gives no answer."""
        if lost := self._ranks.lost():
            raise LostRank(lost)
        if self.own.received:
            self._noted = self._noted or time.monotonic()
            if time.monotonic() - self._noted > _LAST_ANSWER:
                raise LostRank("the device does not answer")


@dataclass(frozen=True, slots=True)
class Told:
    """What each rank says of its part of a step, beside its gradient; all as float64, which holds them exactly."""

    loss_sum: float
    failed: float
    signal: float
    max_tokens: float
    peak_memory: float


def add_gradients(ranks: Ranks, engine: Engine, *, spoilt: bool) -> None:
    """Replace the `.grad` of the adapter by its sum over all ranks, in one exchange; `spoilt`: by NaN, on every rank."""
    import torch

    flat = engine.flat()
    if flat is not None:
        if spoilt:
            flat[1].fill_(math.nan)
        ranks.add(flat[1])
        return
    parameters = engine.parameters()
    grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    joined = torch.cat([grad.reshape(-1) for grad in grads])
    if spoilt:
        joined.fill_(math.nan)
    ranks.add(joined)
    parts = torch.split(joined, [grad.numel() for grad in grads])
    for parameter, grad, part in zip(parameters, grads, parts, strict=True):
        parameter.grad = grad.copy_(part.view_as(grad))


def tell(ranks: Ranks, loss_sum: Tensor, told: Told) -> Tensor:
    """(N, 5) float64 on the device of `loss_sum`: the values of `told` from each rank, with `loss_sum` in its place."""
    import torch

    rest = torch.tensor(astuple(told)[1:], dtype=torch.float64)
    if loss_sum.is_cuda:
        rest = rest.pin_memory().to(loss_sum.device, non_blocking=True)
    return ranks.tell(torch.cat([loss_sum.detach().double().reshape(1), rest]))
