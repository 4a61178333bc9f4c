"""What a run will need: its rows and steps, counted; its worst forward and its mean one, replayed.

    peak   = frozen weights + adapter and optimizer + the worst moment of the largest forward (or of an evaluation)
    needed = peak + what a process takes beside its tensors (a GPU's context, the allocator's rounding; a CPU's program)
    time   = steps x (forwards of their mean cost + the optimizer) + evaluations + captures of CUDA graphs

train/cost.py says how a forward's cost is modelled. The rows of every forward are those that training takes: same tokens,
same order, same split.
"""

from __future__ import annotations

import math
import os
import resource
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from lorikit.config import RunConfig
from lorikit.data.pack import split_step
from lorikit.data.values import Example
from lorikit.model.sharded import is_sharded
from lorikit.train.cost import Forward, Ledger, Uncounted, row_of, step_seconds
from lorikit.train.distributed import deal, lengths_of
from lorikit.train.optim import plan_steps
from lorikit.train.plan_costs import CONTEXT, Costs, Target

_STEPS = 4000  # steps whose rows are looked at; of longer runs as many, evenly spread
_EVAL_BLOCK = 256  # rows that evaluate.py packs at a time
_CAPTURE = 6  # times what starting the operations of a graph takes; an H100 took 0.24 s each (results/train_h100.jsonl)
_SLACK = 0.03  # of what comes and goes: rounding and gaps of the allocator
_TENSOR_SECONDS = 20e-6  # of the host, for each of the adapter's tensors in clipping and AdamW


@dataclass(frozen=True, slots=True)
class Steps:
    """The optimizer steps: how many, tokens and forwards in one, and the forwards that were looked at."""

    count: int
    an_epoch: int
    rows: int
    tokens_mean: float
    tokens_max: int
    forwards_mean: float
    forwards_max: int
    max_tokens: int
    """Most tokens in one forward."""
    forwards: tuple[Forward, ...] = field(repr=False)


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes at the worst moment by part, `peak` in all; `needed` with what a process takes beside its tensors."""

    parts: dict[str, int]
    by_layer: list[int]
    peak: int
    beside: int
    during: str

    @property
    def needed(self) -> int:
        """Bytes that must be there."""
        return self.peak + self.beside


@dataclass(frozen=True, slots=True)
class Time:
    """Seconds, and tokens a second of the steps; `source` says where the machine's speed is from."""

    step: float
    total: float
    evaluation: float
    captures: float
    num_graphs: int
    tokens_per_second: float
    source: str


@dataclass(frozen=True, slots=True)
class Spread:
    """A run on `ranks` GPUs: seconds of a step by cause, bytes that each GPU sends in a step, tokens a second of all."""

    ranks: int
    nodes: int
    sharded: bool
    compute: float | None
    network: float
    """Seconds of the step in which the network is waited for."""
    step: float | None
    tokens_per_second: float | None
    efficiency: float | None
    """Of so many times one GPU that computes all rows of a step; None where one GPU does not hold the base."""
    sent_bytes: int
    by_layer_bytes: int
    """Of it for each layer of a sharded base, in forward and backward of one step."""

    @property
    def network_share(self) -> float | None:
        """Share of a step in which the network is waited for."""
        return self.network / self.step if self.step else None

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return asdict(self) | {"network_share": self.network_share, "source": "computed"}


@dataclass(frozen=True, slots=True)
class Prediction:
    """All that `lorikit plan` prints. `fits` is None where the memory is not known, `time` where the speed is not."""

    model: str
    engine: str
    choice: str
    device: str
    kind: str
    """cuda, cpu or mps: on a GPU memory is that of torch's tensors, elsewhere the process's resident set."""
    dtype: str
    base_parameters: int
    by_target: dict[str, int]
    rows: dict[str, int]
    steps: Steps
    memory: Memory | None
    capacity: int | None
    alone: int | None
    """Bytes needed with the longest row in a forward of its own; None where that was not asked."""
    time: Time | None
    advice: list[str]
    notes: list[str]
    spread: Spread | None = None
    """What several GPUs make of it; memory is then that of each, times with the network."""

    @property
    def fits(self) -> bool | None:
        """Whether the run fits as it is."""
        return None if self.capacity is None or self.memory is None else self.memory.needed <= self.capacity

    @property
    def can_run(self) -> bool:
        """Whether training gets through, if with smaller forwards than it begins with."""
        return self.alone is None or self.capacity is None or self.alone <= self.capacity

    def to_dict(self) -> dict[str, Any]:
        """JSON values, for --json and environment.json."""
        values = asdict(self)
        del values["steps"]["forwards"]
        adapter = sum(self.by_target.values())
        values["adapter_parameters"], values["fits"] = adapter, self.fits
        values["spread"] = self.spread and self.spread.to_dict()
        if self.memory:
            values["memory"]["needed"] = self.memory.needed
        return values


def predict(
    config: RunConfig,
    name: str,
    costs: Costs,
    target: Target,
    train: Sequence[Example],
    held_out: Sequence[Example],
    *,
    max_tokens: int = 0,
    loaded: bool = False,
    ranks: int = 1,
) -> Prediction:
    """The prediction for rows that are tokens already. `max_tokens`: most tokens in a forward, if memory has set a limit;
    `loaded`: this process holds the weights and the adapter. Of several `ranks` it is for the one with the most tokens."""
    steps = count_steps(config, costs, train, max_tokens or config.train.max_tokens_per_forward, ranks)
    evaluations = evaluations_of(costs, held_out[::ranks], steps.max_tokens)
    notes = _notes(config, target)
    try:
        memory = memory_of(costs, target, steps.forwards, evaluations, loaded=loaded)
        time = _time(config, costs, target, steps, evaluations) if target.rates else None
    except Uncounted as reason:
        memory, time = None, None
        notes.append(f"Memory and time cannot be predicted for this model: {reason}")
    tokens = sum(len(example.input_ids) for example in train)
    rows = {
        "train": len(train),
        "held_out": len(held_out),
        "tokens": tokens,
        "labelled": sum(row_of(example).labels for example in train),
        "longest": max(len(example.input_ids) for example in train),
    }
    return Prediction(
        model=name,
        engine=costs.engine,
        choice=costs.choice,
        device=target.name,
        kind=target.kind,
        dtype=str(target.dtype).removeprefix("torch."),
        base_parameters=costs.base_parameters,
        by_target=costs.by_target,
        rows=rows,
        steps=steps,
        memory=memory,
        capacity=target.memory,
        alone=None,
        time=time,
        advice=[],
        notes=notes,
    )


def count_steps(config: RunConfig, costs: Costs, train: Sequence[Example], max_tokens: int, ranks: int = 1) -> Steps:
    """The steps of a run with at most `max_tokens` in a forward, 0 for what the engine takes by itself; of several `ranks`
    the forwards are those of the one with the most tokens in each step."""
    planned = plan_steps(config.train, len(train))
    budget = max_tokens or costs.best_tokens
    looked_at = min(_STEPS, planned.num_steps)
    tokens, counts, forwards = [], [], []
    for number in range(looked_at):
        examples = [train[row] for row in planned.rows(number * planned.num_steps // looked_at)]
        tokens.append(sum(len(example.input_ids) for example in examples))
        parts = [[examples[k] for k in part] for part in deal(lengths_of(examples), ranks)]
        groups = split_step(max(parts, key=lambda part: sum(lengths_of(part))) if ranks > 1 else examples, budget)
        counts.append(len(groups))
        forwards += [costs.sizes([row_of(example) for example in group]) for group in groups]
    return Steps(
        count=planned.num_steps,
        an_epoch=planned.steps_per_epoch,
        rows=planned.rows_per_step,
        tokens_mean=sum(tokens) / looked_at,
        tokens_max=max(tokens),
        forwards_mean=sum(counts) / looked_at,
        forwards_max=max(counts),
        max_tokens=budget,
        forwards=tuple(forwards),
    )


def memory_of(
    costs: Costs, target: Target, forwards: Sequence[Forward], evaluations: Sequence[Forward], *, loaded: bool = False
) -> Memory:
    """The worst moment of these forwards. Raises Uncounted for a model that cannot run without values.

    Beside the tensors of a CPU's process stands what it holds now: the program, its libraries and the rows; with `loaded`
    without the weights that it holds already, but not less than it held at its own worst moment so far.
    """
    worst: Ledger | None = None
    by_layer: list[int] = []
    during, moving = "training", [0, 0]
    for kind, candidates in enumerate((_largest(forwards), _largest(evaluations))):
        for forward in candidates:
            ledger = Ledger()
            for part, size in costs.static.items():
                ledger.take(part, size)
            kept = costs.evaluate(forward, ledger) if kind else costs.train(forward, ledger)
            moving[kind] = max(moving[kind], ledger.peak - sum(costs.static.values()))
            if worst is None or ledger.peak > worst.peak:
                worst, during = ledger, ("training", "evaluation")[kind]
                by_layer = kept if isinstance(kept, list) else by_layer
    assert worst is not None
    graphs = min(moving) if any(forward.bucket for forward in forwards) else 0  # their pool is not the evaluation's
    beside = CONTEXT + round(_SLACK * max(moving)) + graphs
    if target.kind != "cuda":
        here = costs.static["weights"] + 8 * sum(costs.by_target.values()) if loaded else 0
        most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 if loaded else 0  # Linux counts in KiB
        beside = max(0, resident_bytes() - here, most - worst.peak)
    parts = {part: size for part, size in worst.at_peak.items() if size}
    return Memory(parts, by_layer, worst.peak, beside, during)


def resident_bytes() -> int:
    """Bytes of memory that this process holds now."""
    statm = Path("/proc/self/statm")
    if statm.is_file():
        return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _largest(forwards: Sequence[Forward]) -> list[Forward]:
    """Those that may hold the worst moment: the most tokens, the most labels."""
    if not forwards:
        return []
    most = max(forwards, key=lambda f: (f.tokens, f.labels)), max(forwards, key=lambda f: (f.labels, f.tokens))
    return list(dict.fromkeys(most))


def evaluations_of(costs: Costs, held_out: Sequence[Example], max_tokens: int) -> list[Forward]:
    """The forwards of one evaluation."""
    return [
        costs.eval_sizes([row_of(example) for example in group])
        for start in range(0, len(held_out), _EVAL_BLOCK)
        for group in split_step(held_out[start : start + _EVAL_BLOCK], max_tokens)
    ]


def _time(config: RunConfig, costs: Costs, target: Target, steps: Steps, evaluations: Sequence[Forward]) -> Time:
    assert target.rates is not None
    ordered = sorted(steps.forwards, key=lambda f: (f.tokens, f.labels))
    count = min(costs.samples, len(ordered))
    seconds = host = 0.0
    for number in range(count):
        forward = ordered[(2 * number + 1) * len(ordered) // (2 * count)]
        ledger = Ledger(target.rates)
        costs.train(forward, ledger)
        seconds += step_seconds(ledger, graph=forward.bucket) / count
        host = max(host, ledger.host)
    parameters = sum(costs.by_target.values())
    update = _TENSOR_SECONDS * costs.num_tensors if target.kind == "cuda" else 0.0
    step = seconds * steps.forwards_mean + update + 44 * parameters / target.rates.bandwidth
    evaluation = 0.0
    if evaluations:
        ledger = Ledger(target.rates)
        largest = _largest(evaluations)[0]
        costs.evaluate(largest, ledger)
        share = sum(forward.tokens for forward in evaluations) / largest.tokens
        evaluation = max(ledger.seconds * share, ledger.host * len(evaluations))
    num_evaluations = math.ceil(steps.count / (config.eval.eval_steps or steps.an_epoch))
    graphs = len({_bucket(forward) for forward in steps.forwards if forward.bucket})
    captures = graphs * host * _CAPTURE
    total = steps.count * step + num_evaluations * evaluation + captures
    return Time(
        step=step,
        total=total,
        evaluation=num_evaluations * evaluation,
        captures=captures,
        num_graphs=graphs,
        tokens_per_second=steps.tokens_mean / step,
        source=target.rates.source,
    )


def _bucket(forward: Forward) -> tuple[int, ...]:
    """What tells one graph's sizes from another's, as decoder_graph.Bucket does."""
    longest = 1 << (max(forward.lengths) - 1).bit_length()
    return forward.tokens, forward.labels, len(forward.lengths), max(512, longest)


def _notes(config: RunConfig, target: Target) -> list[str]:
    """What the prediction leaves out or takes for granted."""
    notes = []
    if config.model.device_map is not None and not is_sharded(config.model):
        notes.append("model.device_map spreads the model: the figures are those of all GPUs together.")
    if config.model.attn_implementation is not None:
        notes.append(
            f"model.attn_implementation is {config.model.attn_implementation}: the figures are those of packed attention, "
            "which needs less."
        )
    if config.eval.prompts:
        notes.append("Answers to eval.prompts are not in the time.")
    if target.kind == "cuda" and target.rates is None:
        notes.append("The speed of this GPU is not in the table, so no time is predicted; --gpu names one that is.")
    return notes
