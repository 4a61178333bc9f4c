"""The verb that serves runs over HTTP."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from lorikit.cli_data import say
from lorikit.errors import ConfigError

Runs = Annotated[list[str], Parameter(negative="")]


def serve(
    *runs: str,
    host: str = "127.0.0.1",
    port: int = 8000,
    api_key_file: Path | None = None,
    slots: int | None = None,
    max_length: int | None = None,
    max_waiting: int = 256,
    drain: float = 30.0,
    watch: Annotated[bool, Parameter(negative="")] = False,
    engine: str = "lorikit",
    device: str = "auto",
) -> None:
    """Serve RUN... and their base with OpenAI's API; each run is a model under its folder's name, or NAME as in NAME=RUN.

    Without a key only this machine may ask. Another --host needs --api-key-file, or the environment variable LORIKIT_API_KEY.
    The first SIGTERM or Ctrl-C lets running requests finish, the second ends them.

    Parameters
    ----------
    runs
        Run folders, checkpoints or PEFT adapter folders, all on one base.
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
    engine
        lorikit, or vllm: start vLLM's own server, if it is installed, for the same models.
    device
        auto, cpu, cuda, cuda:N or mps.
    """
    if not runs:
        raise ConfigError("serve needs a run: lorikit serve runs/mine")
    if engine not in ("lorikit", "vllm"):
        raise ConfigError(f"--engine is {engine!r}: lorikit or vllm")
    lacking = [name for name in ("fastapi", "uvicorn") if importlib.util.find_spec(name) is None]
    if lacking:
        raise ConfigError(f"serving needs {' and '.join(lacking)}: pip install 'lorikit[serve]'")
    from lorikit.serve.run import Options, check_options, exec_vllm, read_keys
    from lorikit.serve.run import serve as run_server

    options = Options(host, port, slots, max_length, max_waiting, drain, watch, device)
    keys = read_keys(api_key_file)
    if engine == "lorikit":
        run_server(runs, options, keys, say)
        return
    from lorikit.serve.models import place_runs
    from lorikit.serve.vllm import check_installed, command

    check_options(options, keys)
    refused = [flag for flag, given in (("--watch", watch), ("--slots", slots)) if given]
    if refused or len(keys) > 1:
        raise ConfigError(f"--engine vllm takes no {' and no '.join(refused) or 'second key'}")
    check_installed()
    exec_vllm(command(place_runs(runs, device), host, port, max_length, []), keys)
