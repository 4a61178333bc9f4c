"""One thread drives the engine's Decoding; clients, on the event loop, hand in requests and get their tokens back.

    event loop   flight = submit(requests); async for number, token in flight; flight.cancel()
    thread       takes what came in, one step(), hands all tokens of the step over in one call

Requests beyond `num_slots` wait in line, at most `max_waiting` of them; then Full is raised. What goes wrong in a step is
given to every request that is being answered, and the next ones get a new Decoding.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from queue import SimpleQueue

from lorikit.model.engine import Decoding, Request, Token


class Full(Exception):
    """No request can be taken now."""


@dataclass(eq=False, slots=True)
class Ticket:
    """One request on its way; `tokens` is its flight's."""

    request: Request
    number: int
    tokens: asyncio.Queue[tuple[int, Token | Exception]]


class Flight:
    """Requests that were submitted together: iterate for (which of them, its next token); `cancel` when no longer wanted."""

    def __init__(self, requests: Sequence[Request], worker: Worker) -> None:
        self._tokens: asyncio.Queue[tuple[int, Token | Exception]] = asyncio.Queue()
        self.tickets = [Ticket(request, n, self._tokens) for n, request in enumerate(requests)]
        self._worker = worker
        self._open = set(range(len(requests)))

    def __aiter__(self) -> Flight:
        return self

    async def __anext__(self) -> tuple[int, Token]:
        """Raises what went wrong in the engine."""
        while self._open:
            number, got = await self._tokens.get()
            if number not in self._open:
                continue  # was on its way when it was cancelled
            if isinstance(got, Exception):
                raise got
            if got.finish is not None:
                self._open.discard(number)
            return number, got
        raise StopAsyncIteration

    def cancel(self, number: int | None = None) -> None:
        """Free the slot of one of them, or of all, before the next step; nothing where it has ended."""
        for ticket in self.tickets:
            if ticket.number in self._open and number in (None, ticket.number):
                self._open.discard(ticket.number)
                self._worker.cancel(ticket)


class Worker:
    """The thread, from `start` to `stop`. `make` opens a Decoding; all else is called on the event loop it started on."""

    def __init__(self, make: Callable[[], Decoding], *, max_waiting: int) -> None:
        self._make, self._max_waiting = make, max_waiting
        self._decoding = make()
        self.num_slots = self._decoding.num_slots
        self._orders: SimpleQueue[tuple[str, Ticket | None]] = SimpleQueue()
        self._open: set[Ticket] = set()  # the event loop's view: submitted, not ended, not cancelled
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread = threading.Thread(target=self._run, name="decoding", daemon=True)
        self.broken: Exception | None = None

    def start(self) -> None:
        """Begin, on the running event loop."""
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    @property
    def num_open(self) -> int:
        """Requests that have a slot or wait for one."""
        return len(self._open)

    def check_room(self, count: int = 1) -> None:
        """Raise what `submit` would for so many requests: Full, or why the engine answers no more."""
        if self.broken is not None:
            raise self.broken
        if len(self._open) + count > self.num_slots + self._max_waiting:
            raise Full

    def submit(self, *requests: Request) -> Flight:
        """All of these requests or none; Full when there is no room in the line."""
        self.check_room(len(requests))
        flight = Flight(requests, self)
        for ticket in flight.tickets:
            self._open.add(ticket)
            self._orders.put(("add", ticket))
        return flight

    def cancel(self, ticket: Ticket) -> None:
        """Take a request back, wherever it is."""
        if ticket in self._open:
            self._open.discard(ticket)
            self._orders.put(("cancel", ticket))

    def stop(self) -> None:
        """End the thread after its step and give the memory back."""
        self._orders.put(("stop", None))
        self._thread.join(timeout=30)

    def _run(self) -> None:
        numbers: dict[int, Ticket] = {}
        failed: Exception | None = None
        while failed is None or self._renew(failed):
            try:
                failed = None
                while self._obey(numbers):
                    if numbers:
                        self._hand_over(numbers, self._decoding.step())
                self._decoding.close()
                return
            except Exception as error:  # whatever the engine raises: those it concerns are told, the server goes on
                failed = error.with_traceback(None)  # whose frames hold the memory that is given back
                self._give([(ticket, failed) for ticket in numbers.values()])
                numbers.clear()

    def _obey(self, numbers: dict[int, Ticket]) -> bool:
        """Do what was ordered; waits for an order while there is nothing to decode. False to stop."""
        while not numbers or not self._orders.empty():
            order, ticket = self._orders.get()
            if ticket is None:
                return False
            if order == "add":
                try:
                    numbers[self._decoding.add(ticket.request)] = ticket
                except Exception as error:  # this request alone is at fault
                    self._give([(ticket, error)])
            else:
                for number in [n for n, own in numbers.items() if own is ticket]:
                    del numbers[number]
                    self._decoding.cancel(number)
        return True

    def _hand_over(self, numbers: dict[int, Ticket], tokens: list[Token]) -> None:
        given: list[tuple[Ticket, Token | Exception]] = []
        for token in tokens:
            if token.prompt in numbers:
                given.append((numbers[token.prompt], token))
                if token.finish is not None:
                    del numbers[token.prompt]
        self._give(given)

    def _give(self, given: list[tuple[Ticket, Token | Exception]]) -> None:
        """To the event loop, in one call for all."""
        assert self._loop is not None
        if given and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._deliver, given)

    def _deliver(self, given: list[tuple[Ticket, Token | Exception]]) -> None:
        for ticket, got in given:
            ticket.tokens.put_nowait((ticket.number, got))
            if isinstance(got, Exception) or got.finish is not None:
                self._open.discard(ticket)

    def _renew(self, error: Exception) -> bool:
        """A new Decoding after an error; False, and broken for good, when there is none to be had."""
        try:
            self._decoding.close()
            self._decoding = self._make()
            self.num_slots = self._decoding.num_slots
        except Exception as again:
            self.broken = again
            self._give([(ticket, error) for ticket in list(self._open)])
            return False
        return True
