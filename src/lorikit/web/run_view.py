"""What the page knows of a run: its folder's files and whether a process works on it. Nothing here imports torch."""

from __future__ import annotations

import fcntl
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from lorikit.config import RunConfig, load_config
from lorikit.errors import ConfigError
from lorikit.web import process
from lorikit.web.folder import RUNS

State = Literal["running", "finished", "stopped", "new"]


@dataclass(frozen=True, slots=True)
class RunView:
    """A run folder, or the beginning of one. `steps` is how many it will have, None while that is not known; `trained` and
    `held_out` are lines of metrics.jsonl."""

    name: str
    path: Path
    state: State
    config: RunConfig | None
    steps: int | None
    trained: list[dict[str, Any]]
    held_out: list[dict[str, Any]]
    verdict: str | None

    @property
    def step(self) -> int:
        """The last step that a line was written for."""
        return max((line["step"] for line in [*self.trained, *self.held_out]), default=0)

    @property
    def best(self) -> float | None:
        """The lowest held-out loss."""
        return min((line["eval_loss"] for line in self.held_out), default=None)


def runs(folder: Path) -> list[RunView]:
    """The runs below `folder`/runs, by name, and those that were only just started."""
    place = folder / RUNS
    if not place.is_dir():
        return []
    names = {path.name for path in place.iterdir() if (path / "config.yaml").is_file()}
    names |= {path.stem for path in place.glob("*.yaml") if path.with_suffix(".json").is_file()}
    return [view(folder, name) for name in sorted(names)]


def view(folder: Path, name: str) -> RunView:
    """One of them, as it is now."""
    path = folder / RUNS / name
    lines = read_metrics(path / "metrics.jsonl")
    environment = _json(path / "environment.json")
    predicted = environment.get("predicted") if isinstance(environment, dict) else None
    steps = predicted.get("steps", {}).get("count") if isinstance(predicted, dict) else None
    compared = _json(path / "compare.json")
    verdict = compared.get("verdict") if isinstance(compared, dict) else None
    return RunView(
        name=name,
        path=path,
        state=state_of(folder, name),
        config=_config(path / "config.yaml") or _config(settings_file(folder, name)),
        steps=steps,
        trained=[line for line in lines if "loss" in line],
        held_out=[line for line in lines if "eval_loss" in line],
        verdict=str(verdict["title"]) if isinstance(verdict, dict) and "title" in verdict else None,
    )


def note(folder: Path, name: str) -> Path:
    """Where the page keeps which process it started for the run."""
    return folder / RUNS / f"{name}.json"


def settings_file(folder: Path, name: str) -> Path:
    """The settings that the page wrote for the run."""
    return folder / RUNS / f"{name}.yaml"


def state_of(folder: Path, name: str) -> State:
    """A run is running while a process that the page started lives, or one from elsewhere holds the folder's lock."""
    path = folder / RUNS / name
    if process.running(note(folder, name)) or _is_locked(path / ".lock"):
        return "running"
    if (path / "adapter").is_dir():
        return "finished"
    return "stopped" if (path / "config.yaml").is_file() or note(folder, name).is_file() else "new"


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The whole lines of metrics.jsonl; the last one may be half written."""
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return []
    lines = []
    for line in text.splitlines():
        try:
            value = json.loads(line)
        except ValueError:
            continue
        if isinstance(value, dict) and isinstance(value.get("step"), int):
            lines.append(value)
    return lines


def train(folder: Path, name: str) -> None:
    """Start or go on with a run. A run that is begun goes on with its own settings."""
    own = folder / RUNS / name / "config.yaml"
    source = own if own.is_file() else settings_file(folder, name)
    if not source.is_file():
        raise ConfigError(f"{name}: there are no settings of this run in {folder / RUNS}")
    output = ["--train.output_dir", f"{RUNS}/{name}"]
    process.start(folder, ["train", str(source.relative_to(folder)), *output], note(folder, name))


def write_settings(folder: Path, name: str, groups: dict[str, Any]) -> Path:
    """runs/NAME.yaml, with what differs from the defaults; ConfigError if a run of this name was begun."""
    if state_of(folder, name) == "running":
        raise ConfigError(f"the run {name} is being trained now; stop it first, or give this one another name")
    if (folder / RUNS / name / "config.yaml").is_file():
        raise ConfigError(f"there is a run {name} already; give this one another name, or go on with that one below")
    place = settings_file(folder, name)
    place.parent.mkdir(exist_ok=True)
    place.write_text(yaml.safe_dump(groups, sort_keys=False, allow_unicode=True), encoding="utf-8")
    return place


def _config(path: Path) -> RunConfig | None:
    try:
        return load_config(path)
    except ConfigError:
        return None


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _is_locked(path: Path) -> bool:
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False
