"""One write beside the steps: a thread puts on the disk what a step handed over, and whoever asks next hears how it went."""

from __future__ import annotations

from collections.abc import Callable
from threading import Thread


class Writer:
    """At most one piece of work at a time, each begun when the one before has ended.

    What it raises is raised again where `start`, `check` or `wait` is called next. All calls come from one thread, which
    also gives up what the work holds: pinned memory, about which CUDA is asked then, and not in the midst of a capture.
    """

    def __init__(self) -> None:
        self._thread: Thread | None = None
        self._work: Callable[[], None] | None = None
        self._error: BaseException | None = None

    def start(self, work: Callable[[], None]) -> None:
        """Begin `work`, after the one before."""
        self.wait()
        self._work, self._thread = work, Thread(target=self._run, args=(work,), name="checkpoint")
        self._thread.start()

    def check(self) -> None:
        """Raise what went wrong in work that has ended; waits for none."""
        if self._thread is None or not self._thread.is_alive():
            self.wait()

    def wait(self) -> None:
        """Until nothing is being written."""
        error = self.settle()
        self._error = None
        if error is not None:
            raise error

    def settle(self) -> BaseException | None:
        """Wait, and raise nothing; returns what was not raised so far, which is kept for the next call that may."""
        if self._thread is not None:
            self._thread.join()
            self._thread = self._work = None
        return self._error

    def _run(self, work: Callable[[], None]) -> None:
        try:
            work()
        except BaseException as error:  # told in `wait`
            self._error = error
