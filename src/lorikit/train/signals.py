"""SIGTERM and SIGINT: finish what is in hand, save, exit 75; a second SIGINT ends the process at once with 130."""

from __future__ import annotations

import os
import signal
import sys
import threading
from types import FrameType, TracebackType
from typing import Any

from lorikit.errors import Interrupted

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Signals:
    """Context in which the signals are noted. Until `defer` is called there is nothing to save: they raise at once.

    Outside the main thread Python lets nobody handle signals; the context then does nothing.
    """

    def __init__(self) -> None:
        self.received: str | None = None
        self._deferred = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Signals:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._handle) for number in _SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if value is not None and not self._deferred:
            self.check()  # whoever made another error of the handler's Interrupted: it was the signal

    def defer(self) -> None:
        """From now on a signal waits for the next `check`."""
        self.check()
        self._deferred = True

    def hold(self) -> None:
        """From now on signals are noted and change nothing: the process is ending, with a reason of its own."""
        self._deferred = True
        # also after the context, until the process has ended
        self._before = dict.fromkeys(self._before, signal.SIG_IGN)

    def check(self) -> None:
        """Raise Interrupted if a signal came: also while starting up, where a library may have caught the handler's."""
        if self.received:
            rest = "" if self._deferred else " before the first step; nothing had to be saved"
            raise Interrupted(f"stopped by {self.received}{rest}")

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.received and number == signal.SIGINT:
            if sys.stderr.isatty():
                os.write(sys.stderr.fileno(), b"\x1b[?25h\n")  # the progress line hides the cursor
            os._exit(130)
        self.received = self.received or signal.Signals(number).name
        if not self._deferred:
            self.check()
