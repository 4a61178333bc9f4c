"""Two runs on one page: figures, curves over each other, settings that differ, and answers to the same rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from markupsafe import Markup

from lorikit.config import load_config
from lorikit.report.curves import read_points
from lorikit.report.page import templates
from lorikit.report.runs import NOT_SHOWN
from lorikit.report.svg import Line, chart
from lorikit.train.run_folder import CONFIG
from lorikit.train.storage import write_file

_CURVES = {
    "Training loss": "loss",
    "Held-out loss": "eval_loss",
    "Gradient norm": "grad_norm",
    "Learning rate": "learning_rate",
    "Tokens a second": "tokens_per_second",
    "Peak memory, bytes": "peak_memory_bytes",
}


def write_beside(target: Path, beside: dict[str, Any]) -> Path:
    """Write what `runs.side_by_side` found, with the curves of both, as one HTML file. Raises DiskError."""
    runs = [Path(name) for name in beside["runs"]]
    names = [run.resolve().name for run in runs]
    if names[0] == names[1]:
        names = list(beside["runs"])
    text = (
        templates()
        .get_template("beside.html.j2")
        .render(
            names=names,
            not_compared=beside["not_compared"],
            figures=[(name, [_shown(value) for value in values]) for name, values in beside["figures"].items()],
            curves=_curves(runs, names),
            settings=_settings(runs),
            answers=beside["answers"],
        )
    )
    write_file(target, text.encode("utf-8", "replace"))
    return target


def _curves(runs: list[Path], names: list[str]) -> list[tuple[str, list[str], Markup]]:
    """(title, names of the runs, drawing) of each quantity that both runs have."""
    points = [read_points(run) for run in runs]
    drawn = []
    for title, quantity in _CURVES.items():
        lines = [Line(name, of[quantity]) for name, of in zip(names, points, strict=True)]
        if all(line.points for line in lines):
            drawn.append((title, names, chart(title, lines)))
    return drawn


def _settings(runs: list[Path]) -> list[tuple[str, str, str]]:
    one, other = (load_config(run / CONFIG).model_dump(mode="json") for run in runs)
    return [
        (f"{group}.{key}", _shown(value), _shown(other[group][key]))
        for group, values in one.items()
        for key, value in values.items()
        if value != other[group][key] and f"{group}.{key}" not in NOT_SHOWN
    ]


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
