"""metrics.jsonl as curves: points of each quantity by step, and what the held-out loss says about when to stop."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

from lorikit.report.values import Curve
from lorikit.train.run_folder import METRICS

Points = list[tuple[float, float]]
QUANTITIES = ("loss", "eval_loss", "grad_norm", "learning_rate", "tokens_per_second", "peak_memory_bytes")


def read_lines(run: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl that are whole; none where there is no such file."""
    lines = []
    with suppress(OSError, UnicodeDecodeError):
        for text in (run / METRICS).read_text(encoding="utf-8").splitlines():
            with suppress(ValueError):  # a killed process leaves half a line
                line = json.loads(text)
                if isinstance(line, dict) and isinstance(line.get("step"), int):
                    lines.append(line)
    return lines


def read_points(run: Path) -> dict[str, Points]:
    """(step, value) of each of QUANTITIES."""
    lines = read_lines(run)
    return {
        name: [(float(line["step"]), float(line[name])) for line in lines if isinstance(line.get(name), int | float)]
        for name in QUANTITIES
    }


def read_curve(run: Path, saves_best: bool, step: int | None = None) -> Curve | None:
    """The held-out loss over the run; None where it was never taken, or not at `step`, which a checkpoint is of.

    `saves_best`: adapter/ is the one with the lowest.
    """
    lines = [line for line in read_lines(run) if isinstance(line.get("eval_loss"), int | float)]
    if not lines:
        return None
    lowest, last = min(lines, key=lambda line: line["eval_loss"]), lines[-1]
    saved = lowest if saves_best else last
    if step is not None:
        at = [line for line in lines if line["step"] == step]
        if not at:
            return None
        saved = at[-1]
    return Curve(
        lowest=lowest["eval_loss"],
        lowest_step=lowest["step"],
        last=last["eval_loss"],
        last_step=last["step"],
        saved_step=saved["step"],
        saved=saved["eval_loss"],
        num_steps=read_lines(run)[-1]["step"],
        epoch_of_lowest=float(lowest.get("epoch", 0.0)),
    )
