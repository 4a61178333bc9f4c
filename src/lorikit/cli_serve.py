"""The verb that serves runs over HTTP."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from lorikit.cli_data import say
from lorikit.errors import ConfigError

if TYPE_CHECKING:
    from lorikit.serve.run import Options


@Parameter(name="*")
@dataclass(frozen=True)
class Serving:
    """How to serve.

    Parameters
    ----------
    host
        The address to listen on.
    port
        0 takes a free one and says which.
    api_key_file
        Keys that may ask, one a line.
    slots
        Requests answered at a time; by default as many as fit, 8 on a CPU and up to 64 on a GPU.
    max_length
        Most tokens of a prompt with its answer; by default what the model takes, up to 4096.
    max_waiting
        Requests that may wait in line; further ones get status 429.
    drain
        Seconds that running requests have to finish at the end.
    watch
        Pick up newer checkpoints of runs that still train.
    merge
        Fold the adapter of one run into the base in memory: answers take less time, and the base is not served.
    engine
        lorikit, or vllm: start vLLM's own server, if it is installed, for the same models.
    device
        auto, cpu, cuda, cuda:N or mps.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    api_key_file: Path | None = None
    slots: int | None = None
    max_length: int | None = None
    max_waiting: int = 256
    drain: float = 30.0
    watch: Annotated[bool, Parameter(negative="")] = False
    merge: Annotated[bool, Parameter(negative="")] = False
    engine: str = "lorikit"
    device: str = "auto"

    def options(self) -> Options:
        """The same as the server takes it."""
        from lorikit.serve.run import Options

        names = ("host", "port", "slots", "max_length", "max_waiting", "drain", "watch", "merge", "device")
        return Options(**{name: getattr(self, name) for name in names})


def serve(*runs: str, serving: Serving | None = None) -> None:
    """Serve RUN... and their base with OpenAI's API; each run is a model under its folder's name, or NAME as in NAME=RUN.

    Without a key only this machine may ask. Another --host needs --api-key-file, or the environment variable LORIKIT_API_KEY.
    The first SIGTERM or Ctrl-C lets running requests finish, the second ends them.

    Parameters
    ----------
    runs
        Run folders, checkpoints or PEFT adapter folders, all on one base.
    """
    serving = serving or Serving()
    if not runs:
        raise ConfigError("serve needs a run: lorikit serve runs/mine")
    if serving.engine not in ("lorikit", "vllm"):
        raise ConfigError(f"--engine is {serving.engine!r}: lorikit or vllm")
    lacking = [name for name in ("fastapi", "uvicorn") if importlib.util.find_spec(name) is None]
    if lacking:
        raise ConfigError(f"serving needs {' and '.join(lacking)}: pip install 'lorikit[serve]'")
    from lorikit.serve.run import read_keys
    from lorikit.serve.run import serve as run_server

    keys = read_keys(serving.api_key_file)
    if serving.engine == "vllm":
        _serve_with_vllm(runs, serving, keys)
    else:
        run_server(runs, serving.options(), keys, say)


def _serve_with_vllm(runs: Sequence[str], serving: Serving, keys: list[str]) -> None:
    from lorikit.serve.models import place_runs
    from lorikit.serve.run import check_options, exec_vllm
    from lorikit.serve.vllm import check_installed, command

    check_options(serving.options(), keys)
    given = (
        ("--watch", serving.watch),
        ("--merge", serving.merge),
        ("--slots", serving.slots),
        ("second key", len(keys) > 1),
    )
    refused = [name for name, present in given if present]
    if refused:
        raise ConfigError(f"--engine vllm takes no {' and no '.join(refused)}")
    check_installed()
    placed = place_runs(runs, serving.device)
    exec_vllm(command(placed, serving.host, serving.port, serving.max_length), keys)
