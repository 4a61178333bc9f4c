"""The verb web: starts streamlit with the page, for this machine alone."""

from __future__ import annotations

import importlib.util
import os
import socket
import sys
from contextlib import closing
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from lorikit.cli_data import say
from lorikit.errors import ConfigError

PORT = 8501
_TRIED = 20  # ports from PORT on, where none is named
_FLAGS = {
    "server.headless": "true",  # no browser is opened, no question asked
    "server.fileWatcherType": "none",
    "server.maxUploadSize": "500",  # MiB
    "browser.gatherUsageStats": "false",
    "client.toolbarMode": "minimal",
    "client.showErrorDetails": "none",  # the terminal has them
    "logger.hideWelcomeMessage": "true",
    "logger.enableRich": "false",
    "global.developmentMode": "false",
    "theme.primaryColor": "#0b7285",
    "theme.base": "light",
}


def web(
    folder: Path = Path(),
    /,
    *,
    port: int | None = None,
    host: Annotated[
        str, Parameter(help="Another address lets others train on this machine: there is no password.")
    ] = "127.0.0.1",
) -> None:
    """The page: look at data, train, compare, in a browser; works on the files of DIR and keeps its runs in DIR/runs.

    Closing the tab or this command stops no training. Ctrl-C ends the page.

    Parameters
    ----------
    folder
        The working folder; by default this one.
    port
        By default the first free one from 8501 on.
    """
    command = command_line(folder, port, host)
    address = f"http://{host}:{command[command.index('--server.port') + 1]}"
    if host not in ("127.0.0.1", "localhost", "::1"):
        say(f"lorikit web: {host} can be reached by others, and the page asks for no password")
    sys.stdout.write(f"{address}\n")
    sys.stdout.flush()
    os.execv(command[0], command)  # noqa: S606  the page takes this process's place, and its signals


def command_line(folder: Path, port: int | None, host: str) -> list[str]:
    """How streamlit is started. ConfigError for a folder that is none, a port in use, and where streamlit is missing."""
    missing = [name for name in ("streamlit", "altair") if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(f"lorikit web needs {' and '.join(missing)}: pip install 'lorikit[web]'")
    if not folder.is_dir():
        raise ConfigError(f"{folder}: no such folder; name the folder that your files are in")
    if not os.access(folder, os.W_OK):
        raise ConfigError(f"{folder}: not a folder that you may write to; uploads and runs go there")
    page = Path(__file__).parent / "web" / "app.py"
    flags = _FLAGS | {"server.address": host, "server.port": str(_port(host, port))}
    options = [word for name, value in flags.items() for word in (f"--{name}", value)]
    return [sys.executable, "-m", "streamlit", "run", str(page), *options, "--", str(folder.resolve())]


def _port(host: str, port: int | None) -> int:
    if port is not None and not 1 <= port <= 65535:
        raise ConfigError(f"--port is {port}: 1 to 65535")
    for one in [port] if port is not None else range(PORT, PORT + _TRIED):
        if _is_free(host, one):
            return one
    taken = f"port {port} is in use" if port else f"ports {PORT} to {PORT + _TRIED - 1} are in use"
    raise ConfigError(f"{taken}; name another one with --port")


def _is_free(host: str, port: int) -> bool:
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
    except OSError as error:
        raise ConfigError(f"--host is {host!r}: {error.strerror}") from None
    with closing(socket.socket(family, socket.SOCK_STREAM)) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError:
            return False
    return True
