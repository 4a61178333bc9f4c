"""A comparison in the terminal: the verdict first, then its reasons, then answers side by side."""

from __future__ import annotations

from textwrap import shorten

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from lorikit.data.view import visible
from lorikit.report.values import Comparison, Tone, Verdict

SHOWN = 6
_STYLES: dict[Tone, str] = {"good": "green", "bad": "red", "plain": ""}
_MARKS: dict[Tone, str] = {"good": "+", "bad": "-", "plain": " "}


def render(found: Comparison, verdict: Verdict, *, to_stderr: bool = False) -> None:
    """Print it; where there is no colour, + and - say what speaks for the run and against it."""
    console = Console(stderr=to_stderr, highlight=False)
    console.print()
    style = "bold green" if verdict.words == ("learned",) else "bold yellow"
    head = Text.assemble((verdict.title.capitalize(), style), ". ", verdict.sentence)
    console.print(head)
    for reason in verdict.reasons:
        console.print(Text(f" {_MARKS[reason.tone]} {reason.text}", _STYLES[reason.tone]))
    for line in verdict.unknown:
        console.print(Text(f" ? {visible(line)}", "yellow"))
    for line in verdict.advice:
        console.print(Text(f" > {line}", "bold"))
    lost = [one for one in found.panel if one.outcome == "lost"]
    rows = [(one.question, one.base.text, one.tuned.text) for one in found.answers[:SHOWN]]
    rows += [(one.question, one.base.text, one.tuned.text) for one in lost[:SHOWN]]
    if rows:
        console.print(_answers(rows))


def _answers(rows: list[tuple[str, str, str]]) -> Table:
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("asked", ratio=3, style="bold")
    table.add_column("base", ratio=4)
    table.add_column("tuned", ratio=4)
    for row in rows:
        table.add_row(*(Text(shorten(visible(text), 100, placeholder=" ...")) for text in row))
    return table
