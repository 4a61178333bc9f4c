"""A run is a folder: whose it is, who works on it now, with which settings, and whether it is finished."""

from __future__ import annotations

import fcntl
import importlib.metadata
import json
import os
import platform
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from lorikit.config import RunConfig, dump_config, load_config
from lorikit.data.account import DataReport
from lorikit.data.read import rejects_jsonl
from lorikit.errors import ConfigError
from lorikit.train.checkpoint import checkpoints
from lorikit.train.storage import STAGING, disk_errors, remove_staged, write_file

CONFIG = "config.yaml"
ENVIRONMENT = "environment.json"
METRICS = "metrics.jsonl"
ADAPTER_FOLDER = "adapter"
_LOCK = ".lock"
_MAY_CHANGE = {
    "train.output_dir",
    "train.logging_steps",
    "train.save_steps",
    "train.save_total_limit",
    "train.report_to",
}
_PACKAGES = ("lorikit", "torch", "transformers", "peft", "tokenizers", "safetensors", "triton", "accelerate")


@contextmanager
def open_run(config: RunConfig) -> Iterator[Path]:
    """The run folder of `config`, made if need be and locked against other processes while the block runs.

    ConfigError: the folder is something else, is in use, or was begun with other settings. DiskError.
    """
    run = Path(config.train.output_dir)
    try:
        run.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise ConfigError(f"train.output_dir is {run}: a file stands there; name a folder") from None
    except PermissionError as error:
        raise ConfigError(f"train.output_dir is {run}: {error.strerror}; name a folder that you may write to") from None
    except OSError:
        with disk_errors(run):
            raise
    with _locked(run):
        check_settings(run, config)
        if not is_finished(run):
            remove_staged(run)
        else:  # what a kill in the very last write left; a comparison, which takes no lock, may stage files of its own
            with disk_errors(run):
                (run / f"{STAGING}{ENVIRONMENT}").unlink(missing_ok=True)
        yield run


def is_finished(run: Path) -> bool:
    """Whether the run reached its end: adapter/ is the last thing it writes."""
    return (run / ADAPTER_FOLDER).is_dir()


def check_settings(run: Path, config: RunConfig) -> None:
    """ConfigError if the folder is no run, or holds work that was done with settings that mattered and differ."""
    if not (run / CONFIG).exists():
        others = [path.name for path in run.iterdir() if path.name != _LOCK and not path.name.startswith(STAGING)]
        if others:
            raise ConfigError(
                f"train.output_dir is {run}, which is no run of lorikit but holds {', '.join(sorted(others)[:3])}"
                f"{' and more' if len(others) > 3 else ''}; name a new or an empty folder"
            )
        return
    before, now = _flat(load_config(run / CONFIG)), _flat(config)
    changed = [f"{name}: {before[name]!r} -> {now[name]!r}" for name in now if before[name] != now[name]]
    if changed and (checkpoints(run) or is_finished(run)):
        raise ConfigError(
            f"{run} was trained with other settings: {'; '.join(changed)}. Give these settings another "
            "train.output_dir, or the old ones to go on with this run"
        )


def write_config(run: Path, config: RunConfig) -> None:
    """config.yaml and environment.json. Only now is the folder a run: what fails before leaves nothing to undo."""
    write_file(run / CONFIG, dump_config(config).encode())
    write_environment(run)


def write_environment(run: Path, **more: object) -> None:
    """environment.json: what a result may depend on, and `more`, such as what was predicted and what was measured."""
    write_file(run / ENVIRONMENT, json.dumps({**environment(), **more}, indent=1).encode() + b"\n")


def measured(run: Path) -> dict[str, Any]:
    """What the lines of metrics.jsonl say of memory and time; empty before the first one.

    `seconds` is the wall time of all processes that worked on the run, up to the last line.
    """
    lines = []
    with suppress(OSError, UnicodeDecodeError):
        for text in (run / METRICS).read_text(encoding="utf-8").splitlines():
            with suppress(ValueError):  # a killed process leaves half a line
                lines.append(json.loads(text))
    steps = [line for line in lines if "tokens_per_second" in line]
    if not steps:
        return {}
    tokens = [0, *(line["tokens"] for line in steps)]
    seconds = sum((tokens[n + 1] - tokens[n]) / line["tokens_per_second"] for n, line in enumerate(steps))
    return {
        "steps": steps[-1]["step"],
        "peak_memory_bytes": max(line["peak_memory_bytes"] for line in steps),
        "seconds_per_step": seconds / steps[-1]["step"],
        "tokens_per_second": tokens[-1] / seconds,
        "seconds": max(line["seconds"] for line in lines),
    }


def write_data_report(run: Path, report: DataReport) -> None:
    """data_report.json, and rejects.jsonl if rows were refused."""
    write_file(run / "data_report.json", json.dumps(report.to_dict(), ensure_ascii=False, indent=1).encode() + b"\n")
    if report.rejects:
        write_file(run / "rejects.jsonl", rejects_jsonl(report.rejects))


def environment() -> dict[str, object]:
    """What a result may depend on besides settings and data. Neither host nor user is named, home is written as ~."""
    import torch

    found = {}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    gpus = [torch.cuda.get_device_properties(number) for number in range(torch.cuda.device_count())]
    program = Path(sys.argv[0]).name.replace("__main__.py", "lorikit")
    command = shlex.join([program, *sys.argv[1:]])
    return {
        "command": command.replace(str(Path.home()), "~") if Path.home() != Path("/") else command,
        "packages": found,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "cuda": torch.version.cuda,
        "gpus": [{"name": gpu.name, "bytes": gpu.total_memory} for gpu in gpus],
    }


def _flat(config: RunConfig) -> dict[str, object]:
    return {
        f"{group}.{name}": value
        for group, settings in config.model_dump(mode="json").items()
        for name, value in settings.items()
        if f"{group}.{name}" not in _MAY_CHANGE
    }


@contextmanager
def _locked(run: Path) -> Iterator[None]:
    with disk_errors(run / _LOCK):
        descriptor = os.open(run / _LOCK, os.O_RDONLY | os.O_CREAT, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ConfigError(
            f"{run} is in use by another process; wait for it, or name another train.output_dir"
        ) from None
    else:
        yield
    finally:
        os.close(descriptor)  # the lock goes with it, as it does when a process is killed
