"""What `lorikit plan` prints for people: tables of figures on stdout."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import groupby
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from lorikit.train.advice import gib, seconds
from lorikit.train.cost import PARTS
from lorikit.train.network import spread_rows
from lorikit.train.plan import Compared
from lorikit.train.predict import Memory, Prediction


def render(planned: Prediction | Compared) -> None:
    """A prediction, part by part, and what follows from it; or that of a run beside what was measured."""
    if isinstance(planned, Compared):
        _render_comparison(planned)
    else:
        _render(planned)


def _render(predicted: Prediction) -> None:
    console = Console(highlight=False)
    for rows in (_run_rows(predicted), _memory_rows(predicted), _time_rows(predicted)):
        _print(console, rows)
    console.print(verdict(predicted), style={True: "green", False: "red", None: ""}[predicted.fits], soft_wrap=True)
    for text in predicted.advice:
        console.print(f"- {text}", markup=False, soft_wrap=True)
    for text in predicted.notes:
        console.print(text, markup=False, soft_wrap=True)


def _render_comparison(compared: Compared) -> None:
    console = Console(highlight=False)
    table = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0))
    for title in (compared.run, "predicted", "measured", "measured / predicted"):
        table.add_column(title, justify="left" if title == compared.run else "right")
    for label, expected, found, words in _pairs(compared):
        ratio = f"{found / expected:.2f}" if expected and found else ""
        table.add_row(label, *(words(value) if value else "-" for value in (expected, found)), ratio)
    console.print(table)
    console.print()
    console.print(_about(compared), markup=False, soft_wrap=True)


def verdict(predicted: Prediction) -> str:
    """Whether it fits, in one sentence."""
    memory = predicted.memory
    if memory is None:
        return "How much memory the run needs cannot be predicted."
    if predicted.capacity is None:
        return f"The run needs {gib(memory.needed)}."
    rest = predicted.capacity - memory.needed
    where = f"{gib(predicted.capacity)} of {predicted.device}"
    if rest >= 0:
        return f"The run needs {gib(memory.needed)} and fits {where}: {gib(rest)} remain."
    return f"The run needs {gib(memory.needed)} and does not fit {where}: {gib(-rest)} are missing."


def _print(console: Console, rows: Iterable[tuple[str, str, str]]) -> None:
    table = Table.grid(padding=(0, 2))
    table.add_column()
    table.add_column(justify="right", no_wrap=True)
    table.add_column()
    for label, figure, words in rows:
        table.add_row(Text(label, "bold"), Text(figure), Text(words))
    if table.row_count:
        console.print(table)
        console.print()


def _run_rows(predicted: Prediction) -> Iterator[tuple[str, str, str]]:
    steps, rows = predicted.steps, predicted.rows
    why = f" (not the decoder: {predicted.choice})" if predicted.choice else ""
    yield "model", f"{predicted.base_parameters / 1e9:,.2f} B", f"{predicted.model} in {predicted.dtype}"
    yield "engine", predicted.engine, f"on {predicted.device}{why}"
    targets = ", ".join(f"{name} {count / 1e6:,.2f} M" for name, count in predicted.by_target.items())
    yield "adapter", f"{sum(predicted.by_target.values()) / 1e6:,.2f} M", targets
    yield "rows", f"{rows['train']:,}", f"to train, {rows['held_out']:,} held out"
    share = rows["labelled"] / rows["tokens"]
    yield "tokens", f"{rows['tokens']:,}", f"{share:.0%} of them labelled, the longest row has {rows['longest']:,}"
    yield (
        "steps",
        f"{steps.count:,}",
        f"of {steps.rows:,} rows: {steps.tokens_mean:,.0f} tokens, at most {steps.tokens_max:,}",
    )
    words = f"a step, at most {steps.forwards_max:,}, of up to {steps.max_tokens:,} tokens"
    yield "forwards", f"{steps.forwards_mean:,.1f}", words


def _memory_rows(predicted: Prediction) -> Iterator[tuple[str, str, str]]:
    memory = predicted.memory
    if memory is None:
        return
    for part, size in memory.parts.items():
        words = PARTS[part]
        if part == "activations":
            words += f": {_layers(memory)}"
        yield part, gib(size), words
    yield "peak", gib(memory.peak), f"of tensors, in the {memory.during}"
    gpu = predicted.kind == "cuda"
    words = "the GPU's context, rounding and gaps of the allocator" if gpu else "the program and the rows"
    yield "beside", gib(memory.beside), words


def _layers(memory: Memory) -> str:
    """layers 0-30 99.2 MiB each, layer 31 63.1 MiB"""
    words, number = [], 0
    for size, layers in groupby(memory.by_layer):
        count = len(list(layers))
        name = f"layers {number}-{number + count - 1} {gib(size)} each" if count > 1 else f"layer {number} {gib(size)}"
        number += count
        words += [name] if size else []
    return ", ".join(words)


def _time_rows(predicted: Prediction) -> Iterator[tuple[str, str, str]]:
    time = predicted.time
    if time is None:
        return
    yield "a step", seconds(time.step), f"{time.tokens_per_second:,.0f} tokens/s; speed of the machine: {time.source}"
    if predicted.spread:
        yield from spread_rows(predicted.spread)
    extra = [f"{seconds(time.evaluation)} of evaluations"] if time.evaluation else []
    extra += [f"{seconds(time.captures)} to capture {time.num_graphs} graphs"] if time.num_graphs else []
    yield "in all", seconds(time.total), ", ".join(["without loading the model", *(f"with {text}" for text in extra)])


def _pairs(compared: Compared) -> Iterator[tuple[str, float | None, float | None, Any]]:
    predicted, measured = compared.predicted, compared.measured
    memory, time = predicted.get("memory") or {}, predicted.get("time") or {}
    expected = memory.get("peak" if predicted.get("kind") == "cuda" else "needed")
    yield "peak memory", expected, measured.get("peak_memory_bytes"), gib
    yield "a step", time.get("step"), measured.get("seconds_per_step"), seconds
    yield "tokens a second", time.get("tokens_per_second"), measured.get("tokens_per_second"), "{:,.0f}".format
    total = time.get("total") if compared.finished else None
    yield "in all", total, measured.get("seconds"), seconds
    steps = (predicted.get("steps") or {}).get("count")
    yield "steps", steps, measured.get("steps"), "{:,.0f}".format


def _about(compared: Compared) -> str:
    if not compared.measured:
        return "Nothing was measured yet: the run has not logged a step."
    state = "The run is finished." if compared.finished else "The run is not finished: measured is what it took so far."
    if compared.predicted.get("kind") == "cuda":
        return f"{state} Memory is the most that torch had allocated on the GPU."
    return f"{state} Memory is the largest resident set of the process, since the run was not on an NVIDIA GPU."
