"""Signs of life of machines: one that vanishes without closing its connections would be waited for as long as for a slow one.

    first process of each machine   every 5 s: its count of signs -> the store of the run
    every process                   every 5 s: the counts of all machines <- the store
    a count that stays for 30 s, or a store that gives no answer for 30 s: that machine is lost

An exchange with the other ranks looks at `lost` while it waits. What waits in a library and cannot look is ended with its
process, 15 s later. Time in which this process itself was held up (suspended, say) does not count.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from lorikit.errors import Interrupted

if TYPE_CHECKING:
    from torch.distributed.distributed_c10d import Store

PERIOD = 5.0  # seconds between two signs
SILENCE = 30.0  # seconds without one after which a machine is lost
_GRACE = 15.0  # seconds for who waits to notice


class Pulse:
    """This process's threads that give and watch the signs; `connect` opens a connection to the store for them alone."""

    def __init__(self, connect: Callable[[], Store], machine: int, num_machines: int, *, speaks: bool) -> None:
        self.lost = ""
        """Which machine is lost, in words; empty while all are there."""
        self._connect, self._machine, self._speaks = connect, machine, speaks
        self._counts = [""] * num_machines
        self._heard = [time.monotonic()] * num_machines
        self._answered = time.monotonic()
        self._ended = threading.Event()
        self._known = False

    def start(self) -> None:
        """From now on, until `stop`."""
        for work in (self._give, self._watch):
            threading.Thread(target=work, name=f"pulse{work.__name__}", daemon=True).start()

    def stop(self) -> None:
        """No more signs: this process is done, or ends."""
        self._ended.set()

    def take(self) -> str:
        """`lost`, for somebody who ends the process because of it, so that this does not."""
        self._known = bool(self.lost)
        return self.lost

    def _give(self) -> None:
        store, count = None, 0
        while True:
            count += 1
            try:
                store = store or self._connect()
                if self._speaks:
                    store.set(_key(self._machine), str(count))
                self._hear([value.decode() for value in store.multi_get([_key(m) for m in range(len(self._counts))])])
            except RuntimeError:  # no answer; a new connection may get one
                store = None
            if self._ended.wait(PERIOD):
                return

    def _hear(self, counts: list[str]) -> None:
        now = time.monotonic()
        self._heard = [
            heard if new == old else now for new, old, heard in zip(counts, self._counts, self._heard, strict=True)
        ]
        self._counts, self._answered = counts, now

    def _watch(self) -> None:
        looked = since = noticed = time.monotonic()
        while not self._ended.wait(PERIOD):
            now = time.monotonic()
            if now - looked > 3 * PERIOD:  # this process was held up itself
                since = now
            looked = now
            if self.lost and now - noticed > _GRACE and not self._known:
                self._end()
            if not self.lost:
                self.lost, noticed = self._silent(now, since), now

    def _silent(self, now: float, since: float) -> str:
        if now - max(self._answered, since) > SILENCE:
            return f"the run's store gave no answer for {now - self._answered:.0f} s"
        for machine, heard in enumerate(self._heard):
            if self._answered - max(heard, since) > SILENCE:
                return f"machine {machine} gave no sign of life for {self._answered - heard:.0f} s"
        return ""

    def _end(self) -> None:
        words = (
            f"another process of this run is gone ({self.lost}); the same command goes on from the newest checkpoint"
        )
        print(f"\nlorikit: {words}", file=sys.stderr, flush=True)  # noqa: T201  the thread that would say it waits for ever
        os._exit(Interrupted.exit_code)


def _key(machine: int) -> str:
    return f"pulse/{machine}"
