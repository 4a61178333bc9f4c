"""report.html: one file that opens anywhere, the verdict first; everything that comes from the data is escaped."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from lorikit.config import RunConfig, load_config
from lorikit.data.account import KINDS, DataReport
from lorikit.data.values import Message
from lorikit.data.view import Sample, sample, visible
from lorikit.report.compare import Compared
from lorikit.report.curves import read_points
from lorikit.report.svg import Line, bars, chart
from lorikit.train.run_folder import CONFIG, ENVIRONMENT
from lorikit.train.storage import write_file

PAGE = "report.html"
_SAMPLES = 3
_CURVES = {
    "Loss": (("loss", "training"), ("eval_loss", "held-out")),
    "Gradient norm": (("grad_norm", "gradient norm"),),
    "Learning rate": (("learning_rate", "learning rate"),),
    "Tokens a second": (("tokens_per_second", "tokens a second"),),
    "Peak memory, bytes": (("peak_memory_bytes", "peak memory"),),
}


def write_page(run: Path, compared: Compared) -> Path:
    """Write report.html into the run folder. Raises DiskError."""
    target = run / PAGE
    write_file(target, page(run, compared).encode("utf-8", "replace"))
    return target


def page(run: Path, compared: Compared) -> str:
    """The page as text."""
    report = compared.prepared.report if compared.prepared else None
    notes = _read_json(run / ENVIRONMENT)
    return (
        templates()
        .get_template("report.html.j2")
        .render(
            found=compared.comparison,
            verdict=compared.verdict,
            curves=_curves(run),
            account=_account(report) if report else [],
            lengths=_lengths(report) if report else Markup(""),
            report=report,
            samples=_samples(compared),
            worst=_worst(compared),
            settings=_settings(load_config(run / CONFIG)),
            environment=_environment(notes),
            command=str(notes.get("command", "")),
        )
    )


def templates() -> Environment:
    """The pages of this folder; what they show is escaped, and control characters in it are made visible."""
    environment = Environment(loader=PackageLoader("lorikit.report", ""), autoescape=True, undefined=StrictUndefined)
    environment.filters["seen"] = lambda text: visible(str(text), keep="\n")
    return environment


def _curves(run: Path) -> list[tuple[str, list[str], Markup]]:
    points = read_points(run)
    drawn = []
    for title, series in _CURVES.items():
        lines = [Line(name, points[key]) for key, name in series if points[key]]
        if lines:
            drawn.append((title, [line.name for line in lines] if len(series) > 1 else [], chart(title, lines)))
    return drawn


def _account(report: DataReport) -> list[tuple[str, int]]:
    dropped = [(f"dropped: {KINDS[kind]}", len(rows)) for kind, rows in report.dropped.items() if rows]
    rows = [("trained", report.num_trained), ("held out", len(report.held_out)), *dropped]
    return [*rows, ("duplicates removed", len(report.duplicates)), ("= rows read", report.num_rows)]


def _lengths(report: DataReport) -> Markup:
    if not report.lengths:
        return Markup("")
    rows = [(f"{one.low}-{one.high}", one.rows, one.low > report.max_length) for one in report.lengths.histogram]
    return bars("rows by length in tokens", rows)


def _samples(compared: Compared) -> list[Sample]:
    if not compared.prepared:
        return []
    return [sample(one, compared.session.encoder, "trained") for one in compared.prepared.train[:_SAMPLES]]


def _worst(compared: Compared) -> list[dict[str, Any]]:
    """The trained rows of the worst loss with what they say."""
    if not compared.data:
        return []
    texts = {
        row.source: row.messages
        for part in (compared.data.train, compared.data.eval)
        if part
        for row in part.conversations
    }
    return [
        {
            "source": row.source,
            "base": row.base / row.tokens,
            "tuned": row.tuned / row.tokens,
            "question": _question(texts[row.source]),
            "answer": texts[row.source][-1].content,
        }
        for row in compared.comparison.worst
    ]


def _question(messages: tuple[Message, ...]) -> str:
    return messages[-2].content if len(messages) > 1 else ""


def _settings(config: RunConfig) -> list[tuple[str, str, bool]]:
    """(name, value, whether it is the default) of every setting."""
    values = config.model_dump(mode="json")
    rows = []
    for group, of in type(config).model_fields.items():
        for name, field in of.annotation.model_fields.items():  # type: ignore[union-attr]
            value = values[group][name]
            default = None if field.is_required() else field.get_default(call_default_factory=True)
            shown = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
            rows.append((f"{group}.{name}", shown, value == default and not field.is_required()))
    return rows


def _environment(notes: dict[str, Any]) -> list[tuple[str, str]]:
    packages = notes.get("packages") or {}
    gpus = ", ".join(str(gpu.get("name")) for gpu in notes.get("gpus") or [] if isinstance(gpu, dict))
    rows = [
        ("python", notes.get("python")),
        ("system", notes.get("system")),
        ("CPUs", notes.get("cpus")),
        ("GPUs", gpus),
    ]
    return [(name, str(value)) for name, value in [*rows, *packages.items()] if value]


def _read_json(path: Path) -> dict[str, Any]:
    with suppress(OSError, ValueError):
        value = json.loads(path.read_bytes())
        if isinstance(value, dict):
            return value
    return {}
