"""Runs beside each other: all in a folder as a table, or two of them as far as they compare."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from lorikit.config import load_config
from lorikit.data.view import visible
from lorikit.errors import ConfigError, DataError, LorikitError
from lorikit.report.compare import COMPARISON
from lorikit.train.run_folder import CONFIG, is_finished, measured

NOT_SHOWN = {"train.output_dir"}  # which differs in any case


def list_runs(folder: Path) -> list[dict[str, Any]]:
    """Each run in `folder` or at most two levels below: name, state, settings by dotted name that differ, and figures.

    ConfigError where there is no such folder or no run in it. A run that cannot be read is listed with its problem.
    """
    if not folder.is_dir():
        raise ConfigError(f"{folder}: no such folder; name one that holds run folders")
    places = [path.parent for level in ("", "*/", "*/*/") for path in sorted(folder.glob(f"{level}{CONFIG}"))]
    if not places:
        raise ConfigError(f"{folder}: holds no run; a run folder has a {CONFIG}")
    found = [_describe(place, folder) for place in places]
    settings = [one["settings"] for one in found if one["settings"]]
    differ = {
        name for values in settings for name in values if any(other.get(name) != values[name] for other in settings)
    }
    for one in found:
        one["settings"] = {name: one["settings"][name] for name in sorted(differ & set(one["settings"]) - NOT_SHOWN)}
    return found


def render_runs(found: list[dict[str, Any]]) -> None:
    """Print them as a table."""
    names = sorted({name for one in found for name in one["settings"]})
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for column in ("run", *(name.partition(".")[2] for name in names), "held-out loss", "tokens/s", "verdict"):
        table.add_column(column, overflow="fold")
    for one in found:
        cells = [one["run"], *(str(one["settings"].get(name, "")) for name in names)]
        cells += [_figure(one["held_out_loss"], ".3f"), _figure(one["tokens_per_second"], ",.0f")]
        cells.append(one["problem"] or one["verdict"] or ("not compared" if one["finished"] else "not finished"))
        table.add_row(*(Text(visible(cell)) for cell in cells))
    Console(highlight=False).print(table)


def side_by_side(first: Path, second: Path) -> dict[str, Any]:
    """Two runs that were compared with their bases: figures and answers as far as they compare, and why not further.

    DataError for a run without compare.json.
    """
    a, b = _comparison(first), _comparison(second)
    not_compared = []
    same_rows = a["rows_sha256"] is not None and a["rows_sha256"] == b["rows_sha256"]
    same_tokens = same_rows and a["tokens_sha256"] == b["tokens_sha256"]
    if not same_rows:
        not_compared.append("held-out losses and answers: the two were judged on other held-out rows")
    elif not same_tokens:
        not_compared.append("held-out losses: the same rows are other tokens to these two models")
    figures: dict[str, list[Any]] = {"verdict": [one["verdict"]["title"] for one in (a, b)]}
    if same_tokens:
        figures |= {name: [one["held_out"][key] for one in (a, b)] for name, key in _LOSSES.items()}
    if same_rows and a["tuned_side"] and b["tuned_side"]:
        figures |= {name: [one["tuned_side"][key] for one in (a, b)] for name, key in _SIDES.items()}
    for word in ("kept", "lost", "gained"):
        figures[f"panel: {word}"] = [sum(q["outcome"] == word for q in one["panel"]) for one in (a, b)]
    answers = []
    if same_rows:
        answers = [
            {
                "question": x["question"],
                "reference": x["reference"],
                "answers": [x["tuned"]["text"], y["tuned"]["text"]],
            }
            for x, y in zip(a["answers"], b["answers"], strict=False)
            if x["source"] == y["source"]
        ]
    return {"runs": [str(first), str(second)], "not_compared": not_compared, "figures": figures, "answers": answers}


_LOSSES = {"held-out loss, base": "base", "held-out loss, tuned": "tuned", "perplexity, tuned": "tuned_perplexity"}
_SIDES = {"answers equal to the data's": "exact", "chrF": "chrf", "answers that stop by themselves": "stopped"}


def render_side_by_side(beside: dict[str, Any]) -> None:
    """Print two runs."""
    console = Console(highlight=False)
    names = [visible(Path(name).name) for name in beside["runs"]]
    table = Table("", *map(escape, names), box=SIMPLE_HEAD, pad_edge=False)
    for name, values in beside["figures"].items():
        table.add_row(name, *(value if isinstance(value, str) else _figure(value, ".4g") for value in values))
    console.print(table)
    if beside["answers"]:
        said = Table("asked", *map(escape, names), box=SIMPLE_HEAD, pad_edge=False)
        for one in beside["answers"]:
            said.add_row(*(Text(visible(text)) for text in (one["question"], *one["answers"])))
        console.print(said)
    for line in beside["not_compared"]:
        console.print(Text(f"not compared: {line}", "yellow"))


def _describe(run: Path, folder: Path) -> dict[str, Any]:
    name = run.name if run == folder else str(run.relative_to(folder))
    settings: dict[str, Any] = {}
    problem, compared = None, None
    try:
        tree = load_config(run / CONFIG).model_dump(mode="json")
        settings = {f"{group}.{key}": value for group, values in tree.items() for key, value in values.items()}
        compared = _comparison(run) if (run / COMPARISON).is_file() else None
    except LorikitError as error:
        problem = str(error).splitlines()[0]
    held_out = compared and compared.get("held_out")
    return {
        "run": name,
        "finished": is_finished(run),
        "settings": settings,
        "held_out_loss": held_out["tuned"] if held_out else None,
        "tokens_per_second": measured(run).get("tokens_per_second"),
        "verdict": compared["verdict"]["title"] if compared else None,
        "problem": problem,
    }


def _comparison(run: Path) -> dict[str, Any]:
    try:
        value = json.loads((run / COMPARISON).read_bytes())
    except FileNotFoundError:
        raise DataError(f"{run} was not compared with its base yet: lorikit compare {run}") from None
    except (OSError, ValueError) as error:
        raise DataError(
            f"{run / COMPARISON} cannot be read ({error}); `lorikit compare {run}` writes it anew"
        ) from None
    if not isinstance(value, dict) or "verdict" not in value or "panel" not in value:
        raise DataError(f"{run / COMPARISON} is no comparison; `lorikit compare {run}` writes it anew")
    return value


def _figure(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)
