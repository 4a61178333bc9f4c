"""metrics.jsonl, one JSON object a line and one curve a run, however often it was resumed; trackers see the same lines."""

from __future__ import annotations

import importlib.util
import json
import os
import resource
import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any, Protocol

import torch

from lorikit.config import RunConfig
from lorikit.errors import ConfigError
from lorikit.train.storage import disk_errors

Record = dict[str, Any]


class MetricsFile:
    """The open metrics.jsonl of a run. Lines reach the file at once, the disk with the next checkpoint (`sync`)."""

    def __init__(self, path: Path, keep_bytes: int) -> None:
        """Open for appending; whatever stands after `keep_bytes`, and a last line that is not whole, is cut off."""
        self._path = path
        with disk_errors(path):
            path.touch()
            kept = path.read_bytes()[:keep_bytes]
            os.truncate(path, kept.rfind(b"\n") + 1)
            self._file = path.open("ab")

    def write(self, record: Record) -> None:
        """Append one line."""
        with disk_errors(self._path):
            self._file.write(json.dumps(record, ensure_ascii=False).encode() + b"\n")
            self._file.flush()

    def length(self) -> int:
        """Bytes of the lines so far."""
        return self._file.tell()

    def sync(self) -> None:
        """Have the disk hold every line so far."""
        with disk_errors(self._path):
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file; it is on the disk as far as the last `sync`."""
        self._file.close()


def peak_memory(device: torch.device) -> int:
    """Most bytes in use at any time: of all GPUs together, or of the process."""
    if device.type == "cuda":
        return sum(torch.cuda.max_memory_allocated(number) for number in range(torch.cuda.device_count()))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts in KiB


class Tracker(Protocol):
    """Where lines of metrics.jsonl are shown as curves."""

    def log(self, numbers: dict[str, float], step: int) -> None:
        """Add one point to each named curve."""
        ...

    def close(self) -> None:
        """Send what is still waiting."""
        ...


def check_trackers(names: Sequence[str]) -> None:
    """ConfigError if a tracker in train.report_to is not installed; before training starts, not at its first line."""
    missing = [name for name in names if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(
            f"train.report_to names {', '.join(missing)}, which is not installed: pip install {' '.join(missing)}, "
            "or leave it out (metrics.jsonl is always written)"
        )


def open_trackers(config: RunConfig, run: Path, step: int) -> list[Tracker]:
    """The trackers in train.report_to, to go on after `step` steps."""
    trackers: list[Tracker] = []
    for name in config.train.report_to:
        if name == "tensorboard":
            trackers.append(_TensorBoard(run / "tensorboard", step))
        else:
            trackers.append(_Client(name, config, run))
    return trackers


def numbers_of(record: Record) -> dict[str, float]:
    """What of a line can be drawn."""
    return {key: value for key, value in record.items() if key != "step" and type(value) in (int, float)}


class _TensorBoard:
    def __init__(self, folder: Path, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder), purge_step=step + 1 if step else None)

    def log(self, numbers: dict[str, float], step: int) -> None:
        for name, value in numbers.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class _Client:
    """trackio and wandb: the one has the other's interface. What they print goes to stderr; stdout is for results."""

    def __init__(self, module: str, config: RunConfig, run: Path) -> None:
        name = run.resolve().name
        # the inode makes the id one of this very folder: a resumed run is found again, another of its name is not
        extra: dict[str, Any] = {"dir": str(run), "id": f"{name}-{run.stat().st_ino}"} if module == "wandb" else {}
        settings = config.model_dump(mode="json")
        try:
            with redirect_stdout(sys.stderr):
                self._module = importlib.import_module(module)
                self._module.init(project="lorikit", name=name, config=settings, resume="allow", **extra)
        except Exception as error:  # each client has classes of its own
            raise ConfigError(f"train.report_to: {module} cannot start: {error}") from error

    def log(self, numbers: dict[str, float], step: int) -> None:
        self._module.log(numbers, step=step)

    def close(self) -> None:
        with redirect_stdout(sys.stderr):
            self._module.finish()
