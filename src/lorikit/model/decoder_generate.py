"""Generation with the decoder: requests join and leave between steps, each step gives one token of every one of them.

The prompts of those that join go packed through one forward (decoder_prefill.py), all others one token on
(decoder_decode.py), on a GPU as a CUDA graph (decode_graph.py). There the chosen ids of a step are read while the next one is
already computed, so that the GPU never waits for Python; a request that stops has then one token computed in vain.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lorikit.model.decode_graph import DecodeGraphs, Modes
from lorikit.model.decoder_adapter import Adapter
from lorikit.model.decoder_decode import decode_logits
from lorikit.model.decoder_decode_host import HostAdapter, HostRows, decode_on_host, host_adapter
from lorikit.model.decoder_prefill import prefill
from lorikit.model.decoder_slots import Slots
from lorikit.model.decoder_stack import Stacked, Stacks, stack_adapters
from lorikit.model.engine import Request, Sampling, Token
from lorikit.model.kernels.launch import runs_kernel
from lorikit.model.sampling import draw_seed, modes, next_tokens, values
from lorikit.model.serial_decoding import check_request

if TYPE_CHECKING:
    from lorikit.model.decoder import DecoderEngine

SLOTS = 16  # answers side by side where the caller has a list of prompts; more would take memory and gain little
_PREFILL_TOKENS, _PREFILL_TOKENS_CPU = 8192, 2048  # of one forward; a longer prompt goes alone
_ROUND = 256  # positions that a cache is rounded up to


def stream_tokens(
    engine: DecoderEngine,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    stop_ids: frozenset[int],
    adapter: str | None,
) -> Iterator[Token]:
    """Tokens of all prompts, as many at a time as there are slots, prompts of like length together."""
    if not prompts:
        return
    longest = max(map(len, prompts)) + sampling.max_new_tokens
    decoding = engine.decoding(min(SLOTS, len(prompts)), -(-longest // _ROUND) * _ROUND)
    try:
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        names = {decoding.add(Request(prompts[i], sampling, stop_ids, adapter)): i for i in order}
        while tokens := decoding.step():
            for token in tokens:
                yield Token(names[token.prompt], token.id, token.finish)
    finally:
        decoding.close()


@dataclass(slots=True)
class _Active:
    """A request in its slot: how many tokens it may have, how many are asked for, how many were given out."""

    number: int
    request: Request
    slot: int
    limit: int
    launched: int = 0
    given: int = 0


@dataclass(frozen=True, slots=True)
class _Launched:
    """The tokens of a step on their way: of these requests, the ids (B,) on the host once `ready`, and logprobs."""

    active: tuple[_Active, ...]
    ids: Tensor
    ready: torch.cuda.Event | None
    logprobs: dict[int, tuple[Tensor, Tensor, Tensor]]
    """By number: the chosen token's logprob (), the likeliest tokens' (n,) and their ids (n,)."""


class DecoderDecoding:
    """`num_slots` requests at a time, of at most `max_length` tokens each with its answer."""

    def __init__(self, engine: DecoderEngine, num_slots: int, max_length: int) -> None:
        self.num_slots, self.max_length = num_slots, max_length
        self._engine = engine
        self._slots = Slots.allocate(engine.shape, num_slots, max_length, engine.weights.embed.dtype, engine.device)
        self._free = list(range(num_slots))[::-1]
        self._waiting: deque[_Active] = deque()
        self._active: dict[int, _Active] = {}
        self._in_flight: deque[_Launched] = deque()
        self._on_gpu = engine.device.type == "cuda"
        self._ahead = 1 if self._on_gpu else 0
        self._next_number = 0
        self._stacks: Stacks | None = None
        self._on_host: dict[Adapter, HostAdapter] = {}
        self._stacked: dict[str, Adapter] = {}  # what the stacks were made of
        # Without kernels a step asks the host for lengths, which no graph can hold.
        self._kernels = self._on_gpu and engine.decode_kernels and runs_kernel(engine.weights.embed)
        graphs = self._kernels and engine.decode_graphs
        self._graphs = DecodeGraphs(self._compute, num_slots, engine.device) if graphs else None

    @property
    def num_active(self) -> int:
        """Requests that have a slot."""
        return len(self._active)

    @property
    def num_waiting(self) -> int:
        """Requests that wait for one."""
        return len(self._waiting)

    def add(self, request: Request) -> int:
        """Its number. ModelError for an adapter that is not loaded, DataError for a prompt that is empty or too long."""
        check_request(request, self._engine.adapter_names(), self.max_length)
        limit = min(request.sampling.max_new_tokens, self.max_length - len(request.prompt_ids))
        number, self._next_number = self._next_number, self._next_number + 1
        self._waiting.append(_Active(number, request, -1, limit))
        return number

    def cancel(self, number: int) -> None:
        """Free its slot at once; nothing where the request has ended already."""
        if number in self._active:
            self._leave(self._active[number])
        else:
            self._waiting = deque(a for a in self._waiting if a.number != number)

    def step(self) -> list[Token]:
        """At most one token for each active request; [] only when there is none left."""
        while True:
            launched = self._launch()
            if launched is not None:
                self._in_flight.append(launched)
            if not self._in_flight:
                return []
            if launched is None or len(self._in_flight) > self._ahead:
                tokens = self._read(self._in_flight.popleft())
                if tokens:
                    return tokens

    def close(self) -> None:
        """Give the memory back."""
        self._waiting.clear()
        self._active.clear()
        self._in_flight.clear()
        self._graphs = self._stacks = None
        del self._slots

    @torch.no_grad()
    def _launch(self) -> _Launched | None:
        going = [a for a in self._active.values() if a.launched < a.limit]
        joining = self._admit()
        parts = []
        if going:
            going.sort(key=lambda a: a.request.adapter or "")
            parts.append((going, *self._decode(going)))
        for group in _by_adapter(joining):
            parts.append((group, *self._prefill(group)))
        if not parts:
            return None
        logprobs: dict[int, tuple[Tensor, Tensor, Tensor]] = {}
        for group, logits, chosen in parts:
            logprobs |= _logprobs(group, logits, chosen)
            for active in group:
                active.launched += 1
        ids = torch.cat([chosen for _, _, chosen in parts]).to("cpu", non_blocking=True)
        ready = None
        if self._on_gpu:
            ready = torch.cuda.Event()  # type: ignore[no-untyped-call]
            ready.record()
        return _Launched(tuple(a for group, _, _ in parts for a in group), ids, ready, logprobs)

    def _admit(self) -> list[_Active]:
        """Give slots to those that waited longest, as many as one forward takes."""
        joining: list[_Active] = []
        room = _PREFILL_TOKENS if self._on_gpu else _PREFILL_TOKENS_CPU
        while self._waiting and self._free:
            room -= len(self._waiting[0].request.prompt_ids)
            if room < 0 and joining:
                break
            active = self._waiting.popleft()
            active.slot = self._free.pop()
            self._active[active.number] = active
            joining.append(active)
        return joining

    def _prefill(self, group: Sequence[_Active]) -> tuple[Tensor, Tensor]:
        """Logits after the prompts, and the tokens chosen by them."""
        slots, requests = self._slots, [a.request for a in group]
        self._refresh_stacks()
        rows = slots.put(
            [a.slot for a in group],
            [len(r.prompt_ids) for r in requests],
            [values(r.sampling) for r in requests],
            [draw_seed(r.sampling) for r in requests],
            [0 if self._stacks is None else self._stacks.numbers[r.adapter] for r in requests],
        )
        wanted = modes([r.sampling for r in requests])
        layers = self._engine.layers_with(requests[0].adapter)
        if wanted[2] and slots.seen is None and self._graphs is not None:
            self._graphs.forget()  # from here on they have to note what was said
        logits = prefill(self._engine, layers, slots, [r.prompt_ids for r in requests], rows, note=wanted[2])
        chosen = next_tokens(logits, slots.seen_in(rows), slots.choice(rows, wanted))
        slots.advance(rows, chosen, decoded=False, penalises=wanted[2])
        return logits, chosen

    def _decode(self, going: Sequence[_Active]) -> tuple[Tensor, Tensor]:
        """Logits after the last token of each, and the tokens chosen by them."""
        rows = [a.slot for a in going]
        wanted = modes([a.request.sampling for a in going])
        adapted = any(a.request.adapter is not None for a in going)
        self._refresh_stacks()
        if self._graphs is not None:
            return self._graphs.run(rows, wanted, adapted)
        if self._kernels:
            return self._compute(torch.tensor(rows).to(self._engine.device), wanted, adapted)
        return self._choose(rows, wanted, decode_on_host(self._engine, self._slots, self._host_rows(going)))

    def _compute(self, rows: Tensor, wanted: Modes, adapted: bool) -> tuple[Tensor, Tensor]:
        """A step of rows that have each its own adapter, if any has one; nothing in it waits for the GPU."""
        products = Stacked(self._stacks if adapted else None, self._slots.adapter[rows])
        return self._choose(rows, wanted, decode_logits(self._engine, self._slots, rows, products))

    def _choose(self, rows: Tensor | list[int], wanted: Modes, logits: Tensor) -> tuple[Tensor, Tensor]:
        slots = self._slots
        seen = slots.seen_in(rows) if wanted[2] else None
        chosen = next_tokens(logits, seen, slots.choice(rows, wanted))
        slots.advance(rows, chosen, decoded=True, penalises=wanted[2])
        return logits, chosen

    def _refresh_stacks(self) -> None:
        """Let the stacks hold the adapters that are loaded now, after which graphs have to be captured anew."""
        if not self._kernels:
            return
        adapters = self._engine.adapters()
        if adapters == self._stacked:
            return
        self._stacks = stack_adapters(self._engine.shape, adapters) if adapters else None
        self._stacked = adapters
        if self._graphs is not None:
            self._graphs.forget()
        rows = [a.slot for a in self._active.values()]
        if rows and self._stacks is not None:
            numbers = [self._stacks.numbers[a.request.adapter] for a in self._active.values()]
            self._slots.adapter[rows] = torch.tensor(numbers).to(self._slots.adapter.device)

    def _host_rows(self, going: Sequence[_Active]) -> HostRows:
        """What a CPU computes with, for requests in the order of their adapters."""
        loaded, groups, first = self._engine.adapters(), [], 0
        for replaced in self._on_host.keys() - set(loaded.values()):
            del self._on_host[replaced]
        for group in _by_adapter(going):
            adapter = loaded.get(group[0].request.adapter or "")
            if adapter is not None:
                if adapter not in self._on_host:
                    self._on_host[adapter] = host_adapter(adapter)
                groups.append((self._on_host[adapter], first, first + len(group)))
            first += len(group)
        positions = [len(a.request.prompt_ids) + a.launched - 1 for a in going]
        return HostRows([a.slot for a in going], positions, groups)

    def _read(self, launched: _Launched) -> list[Token]:
        """The tokens of a step, without those of requests that ended in the meantime."""
        if launched.ready is not None:
            launched.ready.synchronize()
        tokens = []
        for active, chosen in zip(launched.active, launched.ids.tolist(), strict=True):
            if self._active.get(active.number) is not active:
                continue
            active.given += 1
            finish = "stop" if chosen in active.request.stop_ids else "length" if active.given == active.limit else None
            if finish:
                self._leave(active)
            logprob: float | None = None
            top: tuple[tuple[int, float], ...] = ()
            if active.number in launched.logprobs:
                own, likeliest, ids = launched.logprobs[active.number]
                logprob, top = float(own), tuple(zip(ids.tolist(), likeliest.tolist(), strict=True))
            tokens.append(Token(active.number, chosen, finish, logprob, top))
        return tokens

    def _leave(self, active: _Active) -> None:
        del self._active[active.number]
        self._free.append(active.slot)


def _by_adapter(group: Sequence[_Active]) -> list[list[_Active]]:
    """The requests of each adapter, the base first."""
    found: dict[str | None, list[_Active]] = {}
    for active in sorted(group, key=lambda a: a.request.adapter or ""):
        found.setdefault(active.request.adapter, []).append(active)
    return list(found.values())


def _logprobs(group: Sequence[_Active], logits: Tensor, chosen: Tensor) -> dict[int, tuple[Tensor, Tensor, Tensor]]:
    found = {}
    for row, active in enumerate(group):
        count = active.request.top_logprobs
        if count is not None:
            own = logits[row].log_softmax(0)
            top = own.topk(min(count, len(own)))
            logprob, likeliest, ids = (
                part.to("cpu", non_blocking=True) for part in (own[chosen[row]], top.values, top.indices)
            )
            found[active.number] = logprob, likeliest, ids
    return found
