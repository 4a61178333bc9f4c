"""What `lorikit build` prints: what became of every line, and the first rows."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from lorikit.data.build import Built, Speaker
from lorikit.data.material import Material
from lorikit.data.view import visible

_KINDS = {
    "script": "dialogue script",
    "chat": "chat export",
    "table": "table of questions",
    "faq": "questions and answers",
}
_SHOWN = 4
_LONG = 200


def render_built(built: Built, console: Console, show: int = 3) -> None:
    """The account of each file, then the first `show` rows."""
    for material in built.materials:
        _account(material, console)
    console.print(Text(f"{len(built.rows):,} rows", "bold"), highlight=False)
    for row in built.rows[: max(show, 0)]:
        console.print()
        console.print(Text(visible(row["source"]), "dim"), highlight=False)
        for question, answer in row.get("history", ()):
            console.print(Text.assemble(("  history  ", "dim"), (_short(question), "dim")), highlight=False)
            console.print(Text.assemble(("        →  ", "dim"), (_short(answer), "dim")), highlight=False)
        console.print(Text(f"  {_short(row['instruction'])}"), highlight=False)
        console.print(Text.assemble("  → ", (_short(row["output"]), "bold green")), highlight=False)


def render_speakers(speakers: Sequence[Speaker], console: Console) -> None:
    """Who speaks how often."""
    table = Table(box=None, padding=(0, 2, 0, 0))
    table.add_column("speaker")
    table.add_column("turns", justify="right")
    table.add_column("lines", justify="right")
    for one in speakers:
        table.add_row(Text(visible(one.name)), f"{one.turns:,}", f"{one.lines:,}")
    console.print(table)


def _account(material: Material, console: Console) -> None:
    """A sum that the reader can check, with the first lines of each fate."""
    table = Table(box=None, padding=(0, 2, 0, 0), show_header=False)
    table.add_column()
    table.add_column(justify="right")
    table.add_column(style="dim", overflow="ellipsis", no_wrap=True)
    for fate, count in material.counts().items():
        numbers = [number for number, one in material.fates.items() if one == fate]
        first = ", ".join(map(str, numbers[:_SHOWN])) + (", ..." if count > _SHOWN else "")
        table.add_row(fate, f"{count:,}", f"{material.unit} {first}" if fate != "blank" else "")
    table.add_row(f"= {material.unit}s read", f"{len(material.fates):,}", "", style="bold")
    console.print(Text(f"{visible(material.name)}: {_KINDS[material.kind]}", "bold"), highlight=False)
    console.print(table, highlight=False)
    for number, reason in list(material.reasons.items())[:_SHOWN]:
        console.print(Text(f"{material.unit} {number}: {visible(reason)}"), highlight=False)
    for note in material.notes:
        console.print(Text(f"note: {note}"), highlight=False)
    console.print()


def _short(text: str) -> str:
    line = visible(text.replace("\n", " ⏎ "))
    return f"{line[:_LONG]}…" if len(line) > _LONG else line
