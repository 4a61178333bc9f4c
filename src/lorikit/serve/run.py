"""`lorikit serve`: the model loaded, the socket opened, and an end that lets running requests finish."""

from __future__ import annotations

import asyncio
import ipaddress
import os
import socket
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import uvicorn

from lorikit.errors import ConfigError, OutOfMemoryError
from lorikit.infer.session import locate
from lorikit.model.engine import Decoding, Engine
from lorikit.serve.app import make_app
from lorikit.serve.guard import LOCAL_NAMES, Guard
from lorikit.serve.models import Models, open_models
from lorikit.serve.worker import Worker

KEY_VARIABLE = "LORIKIT_API_KEY"
MAX_LENGTH = 4096  # tokens of prompt and answer where nothing else is asked for; each slot's cache has room for them
SLOTS_CPU, SLOTS_GPU = 8, 64
_WATCH_SECONDS = 2.0


@dataclass(frozen=True, slots=True)
class Options:
    """How to serve. `slots` None: as many as fit, up to what is worth it; `drain` seconds for running requests at the end."""

    host: str = "127.0.0.1"
    port: int = 8000
    slots: int | None = None
    max_length: int | None = None
    max_waiting: int = 256
    drain: float = 30.0
    watch: bool = False
    merge: bool = False
    device: str = "auto"


def serve(runs: Sequence[str], options: Options, keys: Sequence[str], say: Callable[[str], None]) -> None:
    """Serve until a signal. ConfigError for an address that is taken or open without a key; whatever loading raises."""
    check_options(options, keys)
    with open_socket(options.host, options.port) as listening:
        models = open_models(runs, options.device, merge=options.merge)
        for served in models.served.values():
            for note in served.notes:
                say(f"{served.name}: {note}")
        length = min(options.max_length or MAX_LENGTH, models.max_length)
        worker = Worker(_slots(models.engine, options.slots, length), max_waiting=options.max_waiting)
        background = [lambda: watch(models, say)] if options.watch else []
        guard = make_app(models, worker, length, keys=keys, background=background)
        host, port = listening.getsockname()[:2]
        url = f"http://{f'[{host}]' if ':' in host else host}:{port}"
        say(
            f"serving {', '.join(models.served)} on {url} (OpenAI's API under /v1; /docs, /metrics): {worker.num_slots} "
            f"requests at a time, {length} tokens each"
        )
        config = uvicorn.Config(
            guard, log_level="warning", access_log=False, timeout_graceful_shutdown=2, lifespan="on"
        )
        asyncio.run(Server(config, guard, worker, options.drain, say).serve([listening]))


def check_options(options: Options, keys: Sequence[str]) -> None:
    """ConfigError for values that are not possible, all at once."""
    wrong = []
    for name, value, least in (
        ("port", options.port, 0),
        ("max-waiting", options.max_waiting, 0),
        ("drain", options.drain, 0),
    ):
        wrong += [f"--{name} is {value}: {least} or more"] if value < least else []
    wrong += [f"--port is {options.port}: at most 65535"] if options.port > 65535 else []
    for name, count in (("slots", options.slots), ("max-length", options.max_length)):
        wrong += [f"--{name} is {count}: 1 or more"] if count is not None and count < 1 else []
    if options.watch and options.merge:
        wrong.append("--watch and --merge: an adapter that is merged cannot be replaced")
    if not keys and not is_loopback(options.host):
        wrong.append(
            f"--host {options.host} can be reached from outside: give --api-key-file FILE, or set {KEY_VARIABLE}"
        )
    if wrong:
        raise ConfigError("; ".join(wrong))


def is_loopback(host: str) -> bool:
    """Whether an address can be reached from this machine alone."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host in LOCAL_NAMES


def read_keys(file: Path | None) -> list[str]:
    """The keys of a file, one a line, or that of the environment; ConfigError for a file without any."""
    if file is None:
        return [key] if (key := os.environ.get(KEY_VARIABLE, "").strip()) else []
    try:
        keys = [line.strip() for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--api-key-file {file}: cannot be read ({error})") from None
    if not keys or not all(key.isascii() and key.isprintable() and " " not in key for key in keys):
        raise ConfigError(f"--api-key-file {file}: give one key a line, of ASCII characters without blanks")
    return keys


def open_socket(host: str, port: int) -> socket.socket:
    """Bound, not yet listening: a taken port is told before the model is loaded."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listening = socket.socket(family, kind, protocol)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
    except OSError as error:
        raise ConfigError(
            f"{host}:{port} cannot be served on: {error.strerror or error}; give another --port or --host"
        ) from None
    return listening


def _slots(engine: Engine, asked: int | None, length: int) -> Callable[[], Decoding]:
    """Opens a Decoding; where nothing was asked for, half as many slots again and again until they fit."""

    def make() -> Decoding:
        slots = asked or (SLOTS_CPU if engine.device.type == "cpu" else SLOTS_GPU)
        while True:
            try:
                return engine.decoding(slots, length)
            except OutOfMemoryError:
                if asked or slots == 1:
                    raise
                slots //= 2

    return make


async def watch(models: Models, say: Callable[[str], None]) -> None:
    """Load what a run that trains has written since, without end: each newer checkpoint in place of the one before."""
    seen = {served.name: served.folder for served in models.served.values()}
    told: dict[str, str] = {}
    while True:
        await asyncio.sleep(_WATCH_SECONDS)
        for served in models.served.values():
            if served.adapter is None:
                continue
            try:
                newest = (await asyncio.to_thread(locate, served.run)).adapter
                if newest == seen[served.name] or newest is None:
                    continue
                await asyncio.to_thread(models.engine.add_adapter, served.adapter, newest)
                seen[served.name] = newest
                say(f"{served.name} is now {newest}")
            except Exception as error:  # the one before goes on being served; a GPU may have room at another time
                if told.get(served.name) != str(error):
                    say(f"{served.name}: {error}")
                told[served.name] = str(error)


class Server(uvicorn.Server):
    """The first signal refuses new requests and lets running ones finish, up to a limit; the second one ends them."""

    def __init__(
        self, config: uvicorn.Config, guard: Guard, worker: Worker, drain: float, say: Callable[[str], None]
    ) -> None:
        super().__init__(config)
        self._guard, self._worker, self._drain, self._say = guard, worker, drain, say
        self._until: float | None = None

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Begin to end, or end now. Nothing is kept for uvicorn to raise again: a signal is how a server ends."""
        if self._until is None:
            self._guard.draining = True
            self._until = time.monotonic() + self._drain
        else:
            self._until = 0.0

    async def on_tick(self, counter: int) -> bool:
        """Ten times a second: whether to leave the main loop."""
        if self._until is not None:
            idle = not self._guard.num_running
            if not idle and time.monotonic() >= self._until:
                self._say(f"{self._guard.num_running} requests are cut off")
            self.should_exit = self.should_exit or idle or time.monotonic() >= self._until
        return await super().on_tick(counter)


def exec_vllm(arguments: Sequence[str], keys: Sequence[str]) -> None:
    """Become vLLM's server; its key is the first of ours."""
    environment = {**os.environ, **({"VLLM_API_KEY": keys[0]} if keys else {})}
    sys.stdout.flush()
    os.execve(arguments[0], list(arguments), environment)  # noqa: S606  the interpreter that runs this, no shell
