"""Which rows each optimizer step takes, at which learning rate, and how their gradient is made and applied.

One step: g = (1 / labelled) * sum over its forwards of d loss_sum / d adapter, clipped by norm, then AdamW. The sum is
divided once, by the labelled tokens of the whole step, so that neither packing nor accumulation changes the gradient.
Counting follows transformers' Trainer, the schedules transformers.get_scheduler, clipping torch's clip_grad_norm_.
"""

from __future__ import annotations

import gc
import hashlib
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import torch

from lorikit.config import TrainConfig
from lorikit.data.pack import num_targets as num_targets_of
from lorikit.data.pack import pack, split_step
from lorikit.data.values import Example
from lorikit.errors import OutOfMemoryError
from lorikit.model.engine import Engine
from lorikit.train.adamw import AdamW
from lorikit.train.distributed import LAST_ERROR, AgreedSignals, Ranks, Told, add_gradients, deal, lengths_of, tell
from lorikit.train.metrics import peak_memory


@dataclass(frozen=True, slots=True)
class Plan:
    """The optimizer steps of a run, numbered from 0: rows, epochs and learning rates follow from the number alone."""

    num_rows: int
    rows_per_step: int
    steps_per_epoch: int
    num_steps: int
    warmup_steps: int
    schedule: str
    peak: float
    seed: int

    def rows(self, step: int) -> Sequence[int]:
        """Row numbers of a step; the last step of an epoch may have fewer."""
        epoch, within = divmod(step, self.steps_per_epoch)
        return epoch_order(self.num_rows, self.seed, epoch)[within * self.rows_per_step :][: self.rows_per_step]

    def epoch(self, done: int) -> float:
        """Passes over the rows after `done` steps."""
        return done / self.steps_per_epoch

    def learning_rate(self, step: int) -> float:
        """The rate that step is applied with."""
        if step < self.warmup_steps:
            return self.peak * step / self.warmup_steps
        share = (step - self.warmup_steps) / max(1, self.num_steps - self.warmup_steps)
        if self.schedule == "cosine":
            return self.peak * max(0.0, 0.5 * (1.0 + math.cos(math.pi * share)))
        return self.peak * max(0.0, 1.0 - share) if self.schedule == "linear" else self.peak


def plan_steps(config: TrainConfig, num_rows: int) -> Plan:
    """Steps as transformers' Trainer counts them: an incomplete last step of an epoch is taken, epochs may be fractions."""
    rows_per_step = config.per_device_train_batch_size * config.gradient_accumulation_steps
    steps_per_epoch = math.ceil(num_rows / rows_per_step)
    num_steps = config.max_steps if config.max_steps > 0 else math.ceil(config.num_train_epochs * steps_per_epoch)
    return Plan(
        num_rows,
        rows_per_step,
        steps_per_epoch,
        num_steps,
        config.warmup_steps or math.ceil(num_steps * config.warmup_ratio),
        config.lr_scheduler_type,
        config.learning_rate,
        config.seed,
    )


@lru_cache(maxsize=1)
def epoch_order(num_rows: int, seed: int, epoch: int) -> tuple[int, ...]:
    """The order of the rows in an epoch: a permutation that depends on nothing but these three numbers."""
    generator = torch.Generator().manual_seed(derived_seed(seed, "order", epoch))
    return tuple(torch.randperm(num_rows, generator=generator).tolist())


def derived_seed(seed: int, purpose: str, number: int) -> int:
    """A seed of its own for each purpose and number, below 2^63."""
    digest = hashlib.sha256(f"{seed} {purpose} {number}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


class Budget:
    """Most tokens in one forward; halved, for the rest of the run, when the device runs out of memory."""

    def __init__(self, max_tokens: int, say: Callable[[str], None], *, fixed: bool = False) -> None:
        """`fixed`: do not halve, for other processes count on the number of forwards."""
        self.max_tokens, self.fixed = max_tokens, fixed
        self._say = say

    def run(
        self, examples: Sequence[Example], begin: Callable[[], None], forward: Callable[[list[Example]], None]
    ) -> None:
        """Call `begin`, then `forward` for each share of the rows that fits; after a halving all of it once more.

        Raises OutOfMemoryError when one row alone does not fit.
        """
        failed: list[Example] | None = []
        while failed is not None:
            failed = None
            begin()
            for share in split_step(examples, self.max_tokens):
                try:
                    forward(share)
                except (RuntimeError, MemoryError) as error:
                    if not is_out_of_memory(error):
                        raise
                    failed = share
                if failed is not None:  # outside the handler: its traceback would keep the activations alive
                    self._halve(failed)
                    break

    def _halve(self, failed: list[Example]) -> None:
        tokens = sum(len(example.input_ids) for example in failed)
        if self.fixed:
            raise OutOfMemoryError(
                f"out of memory at {tokens} tokens in one forward; set train.max_tokens_per_forward to half of it, "
                "train.gradient_checkpointing, or take more GPUs"
            )
        if len(failed) == 1:
            raise OutOfMemoryError(
                f"{failed[0].source}: one row of {tokens} tokens does not fit into memory; lower data.max_length, "
                "set train.gradient_checkpointing, or take a smaller model or a larger device"
            )
        self.max_tokens = min(tokens, self.max_tokens) // 2
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        self._say(f"out of memory at {tokens} tokens in one forward: going on with at most {self.max_tokens}")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a device or the host refused memory; torch has an exception class of its own for CUDA only."""
    words = ("out of memory", "can't allocate memory", "not enough memory")
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError) and any(word in str(error) for word in words)
    )


@dataclass(frozen=True, slots=True)
class Prepared:
    """The rows of one step, and the forwards and backwards that they take within `max_tokens`, ready to be called."""

    examples: Sequence[Example]
    max_tokens: int
    calls: Sequence[Callable[[], torch.Tensor]]
    idle: Sequence[Callable[[], torch.Tensor]] = ()
    """Forwards and backwards for nothing, where a sharded base needs as many of every rank."""


@dataclass(frozen=True, slots=True)
class Gradient:
    """What the forwards and backwards of one step computed; the gradient of this sum lies in the parameters' `.grad`."""

    loss_sum: torch.Tensor
    """() float32, over the labelled tokens."""
    num_targets: int
    num_tokens: int


@dataclass(frozen=True, slots=True)
class Stepped:
    """What one optimizer step did: loss summed over its labelled tokens, and the norm of the mean's gradient before
    clipping. Where the norm is not finite nothing was applied."""

    loss_sum: float
    num_targets: int
    num_tokens: int
    norm: float
    told: Sequence[Told] = ()
    """By rank, where there are several."""


class InFlight:
    """A step that was started; a GPU may still be at it, or at an earlier one.

    `told` (N, 5) is what the ranks of a run say of it; `watch` may raise while it is waited for.
    """

    def __init__(
        self,
        gradient: Gradient,
        norm: torch.Tensor,
        told: torch.Tensor | None = None,
        watch: Callable[[], None] | None = None,
    ) -> None:
        self._gradient, self._watch = gradient, watch
        both = torch.stack([gradient.loss_sum, norm.to(gradient.loss_sum.device)])
        self._both = both.to("cpu", non_blocking=True)
        self._told = None if told is None else told.to("cpu", non_blocking=True)
        self._arrived = torch.cuda.Event() if both.is_cuda else None  # type: ignore[no-untyped-call]
        if self._arrived is not None:
            self._arrived.record(torch.cuda.current_stream(both.device))

    def result(self) -> Stepped:
        """Wait for it."""
        while self._arrived is not None and self._watch is not None and not self._arrived.query():  # type: ignore[no-untyped-call]
            self._watch()
            time.sleep(1e-4)
        if self._arrived is not None:
            self._arrived.synchronize()
        loss_sum, norm = self._both.tolist()
        told = () if self._told is None else tuple(Told(*row) for row in self._told.tolist())
        loss_sum = math.fsum(one.loss_sum for one in told) if told else loss_sum
        return Stepped(loss_sum, self._gradient.num_targets, self._gradient.num_tokens, norm, told)


def prepare_step(engine: Engine, examples: Sequence[Example], budget: Budget) -> Prepared:
    """What a step needs of the host, which can be done while the device computes the one before."""
    shares = split_step(examples, budget.max_tokens) if examples else []
    return Prepared(examples, budget.max_tokens, [engine.prepare(pack(share)) for share in shares])


def prepare_part(engine: Engine, ranks: Ranks, rows: Sequence[Example], budget: Budget) -> Prepared:
    """As `prepare_step` for this rank's part of `rows`."""
    step = prepare_step(engine, ranks.share(rows, lengths_of(rows)), budget)
    if not engine.sharded:
        return step
    missing = num_forwards(ranks, rows, budget.max_tokens) - len(step.calls)
    shortest = min(rows, key=lambda row: len(row.input_ids))
    return replace(step, idle=[engine.prepare(pack([shortest])) for _ in range(missing)])


def num_forwards(ranks: Ranks, rows: Sequence[Example], max_tokens: int) -> int:
    """Most forwards that a rank needs for its part of `rows`."""
    parts = [[rows[k] for k in part] for part in deal(lengths_of(rows), ranks.size)]
    return max(len(split_step(part, max_tokens)) for part in parts if part)


def compute_gradient(engine: Engine, step: Prepared, budget: Budget, *, dropout_seed: int) -> Gradient:
    """Fill `.grad` of the adapter with the gradient of the loss summed over the labelled tokens of a step.

    Dropout is seeded here instead of carried on as a stream: a step then depends on its number alone, whatever was
    evaluated, generated or resumed before it, and no random state has to be saved. The sum is differentiated and the
    gradient divided, not the other way round, which also keeps float16 bases away from underflow.
    """
    num_targets, num_tokens = _count(step.examples)
    losses: list[torch.Tensor] = []

    def begin() -> None:
        losses.clear()
        engine.clear_gradient()
        torch.manual_seed(dropout_seed)

    def forward(share: list[Example]) -> None:
        as_prepared = budget.max_tokens == step.max_tokens  # not after memory ran out
        call = step.calls[len(losses)] if as_prepared else engine.prepare(pack(share))
        losses.append(call())

    for call in step.idle:
        call()
    if not step.examples:  # of one rank among more ranks than rows
        begin()
        return Gradient(torch.zeros((), device=engine.device), 0, 0)
    assert num_targets > 0, "a row without labels reached training"
    budget.run(step.examples, begin, forward)
    return Gradient(torch.stack(losses).sum(), num_targets, num_tokens)


def _count(rows: Sequence[Example]) -> tuple[int, int]:
    """Labelled tokens, and all."""
    return sum(map(num_targets_of, rows)), sum(len(row.input_ids) for row in rows)


@dataclass(frozen=True, slots=True)
class Shared:
    """What a step of several ranks needs beside this rank's part of it: the others, and all `rows` of the step."""

    ranks: Ranks
    signals: AgreedSignals
    rows: Sequence[Example]


def begin_step(
    engine: Engine,
    optimizer: AdamW,
    step: Prepared,
    budget: Budget,
    *,
    dropout_seed: int,
    learning_rate: float,
    shared: Shared | None = None,
) -> InFlight:
    """Start one optimizer step; with `optimizer.runs_behind()` the host does not wait for the device.

    With `shared` every rank calls this with its own part; what they compute is added up. LostRank when one is gone.
    """
    if shared is not None:
        return _begin_shared(shared, engine, optimizer, step, budget, dropout_seed, learning_rate)
    gradient = compute_gradient(engine, step, budget, dropout_seed=dropout_seed)
    return InFlight(gradient, optimizer.step(learning_rate, gradient.num_targets))


def _begin_shared(
    shared: Shared,
    engine: Engine,
    optimizer: AdamW,
    step: Prepared,
    budget: Budget,
    dropout_seed: int,
    learning_rate: float,
) -> InFlight:
    """A rank whose part does not fit into its memory spoils the step for all, and tells why; nothing is applied then."""
    ranks, failed = shared.ranks, False
    try:
        gradient = compute_gradient(engine, step, budget, dropout_seed=dropout_seed)
    except OutOfMemoryError as error:
        if engine.sharded:  # the others wait in the middle of a forward: this is the end
            raise
        assert ranks.store is not None
        ranks.store.set(f"{LAST_ERROR}/{ranks.rank}", str(error))
        gradient, failed = Gradient(torch.zeros((), device=engine.device), 0, 0), True
    signal, peak = shared.signals.number(), float(peak_memory(engine.device))
    told = tell(ranks, gradient.loss_sum, Told(0.0, float(failed), signal, float(budget.max_tokens), peak))
    add_gradients(ranks, engine, spoilt=failed)
    whole = Gradient(gradient.loss_sum, *_count(shared.rows))
    return InFlight(whole, optimizer.step(learning_rate, whole.num_targets), told, shared.signals.watch)


def take_step(
    engine: Engine,
    optimizer: AdamW,
    examples: Sequence[Example],
    budget: Budget,
    *,
    dropout_seed: int,
    learning_rate: float,
) -> Stepped:
    """One optimizer step on `examples`, from beginning to end."""
    step = prepare_step(engine, examples, budget)
    return begin_step(engine, optimizer, step, budget, dropout_seed=dropout_seed, learning_rate=learning_rate).result()
