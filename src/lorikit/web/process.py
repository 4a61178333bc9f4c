"""Lorikit's own command line as processes: asked for one JSON document, or started to live on without the page.

A process that is started lives in a session of its own: neither the end of the page's server nor Ctrl-C in its terminal
reaches it. What is known of it is in a small file beside its log, so that another server finds it again.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lorikit.errors import LorikitError

_TAIL = 8192  # bytes of a log that are looked at


@dataclass(frozen=True, slots=True)
class Started:
    """A process by its number and the time it began (clock ticks since boot), which no later process shares."""

    pid: int
    began: int
    command: list[str]


def ask(folder: Path, arguments: Sequence[str], seconds: float = 600) -> Any:
    """What `lorikit ARGUMENTS --json` says in `folder`; with exit code 3 or 6 too, if there is a document.

    Raises LorikitError with the command's own message.
    """
    try:
        done = subprocess.run(
            [*_lorikit(), *arguments, "--json"],
            cwd=folder,
            check=False,
            capture_output=True,
            stdin=subprocess.DEVNULL,
            timeout=seconds,
        )
    except subprocess.TimeoutExpired:
        raise LorikitError(f"lorikit {arguments[0]} took longer than {seconds:.0f} s and was stopped") from None
    with suppress(ValueError):
        return json.loads(done.stdout)
    raise LorikitError(
        complaint(done.stderr.decode(errors="replace")) or f"lorikit {arguments[0]}: exit code {done.returncode}"
    )


def start(folder: Path, arguments: Sequence[str], note: Path) -> Started:
    """Start `lorikit ARGUMENTS` in `folder`; its output goes to `note` with the ending .log, anew each time."""
    command = [*_lorikit(), *arguments]
    with note.with_suffix(".log").open("wb") as log:
        process = subprocess.Popen(
            command, cwd=folder, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
    started = Started(process.pid, _began(process.pid) or 0, command)
    note.write_text(json.dumps(asdict(started)), encoding="utf-8")
    return started


def running(note: Path) -> Started | None:
    """The process that was started with this note, if it is alive."""
    try:
        started = Started(**json.loads(note.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None
    with suppress(ChildProcessError):  # a child of this server that has ended has to be collected
        os.waitpid(started.pid, os.WNOHANG)
    return started if _began(started.pid) == started.began else None


def stop(note: Path) -> bool:
    """Ask the process to end (SIGTERM: a training saves a checkpoint first); False if there is none."""
    started = running(note)
    if started is None:
        return False
    with suppress(ProcessLookupError):
        os.kill(started.pid, signal.SIGTERM)
    return True


def log_tail(note: Path, lines: int = 30) -> str:
    """The last lines of what the process said."""
    try:
        with note.with_suffix(".log").open("rb") as log:
            log.seek(max(0, log.seek(0, os.SEEK_END) - _TAIL))
            text = log.read().decode(errors="replace")
    except OSError:
        return ""
    return "\n".join(text.splitlines()[-lines:])


def complaint(text: str) -> str:
    """The error message in what a command wrote to stderr: from its last line that begins with "lorikit: "; of a
    traceback the last line."""
    lines = text.rstrip().splitlines()
    for at in range(len(lines) - 1, -1, -1):
        if lines[at].startswith("lorikit: "):
            return "\n".join([lines[at].removeprefix("lorikit: "), *lines[at + 1 :]])
    return lines[-1] if lines else ""


def _lorikit() -> list[str]:
    return [sys.executable, "-m", "lorikit"]


def _began(pid: int) -> int | None:
    """When the process began, by /proc; None if it is gone or only waits to be collected."""
    try:
        # the name in brackets may hold anything; what follows is: state, then 18 fields, then the start time
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] == "Z" else int(fields[19])
