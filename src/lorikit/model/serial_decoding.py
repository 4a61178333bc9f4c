"""Decoding with transformers' generate: one request after the other, each as a stream of its own.

transformers cannot let a request join a batch that is on its way; whoever serves many at a time wants the decoder.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Generator
from contextlib import closing
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from torch import Tensor

from lorikit.errors import DataError, ModelError
from lorikit.model.engine import Request, Token
from lorikit.model.streaming import stream_tokens

if TYPE_CHECKING:
    from lorikit.model.generic import GenericEngine


class SerialDecoding:
    """The first request in line is answered, a token a step; `max_length` is the most tokens of one with its answer."""

    num_slots = 1

    def __init__(self, engine: GenericEngine, max_length: int) -> None:
        self.max_length = max_length
        self._engine = engine
        self._waiting: deque[tuple[int, Request]] = deque()
        self._number = -1  # of the request that is answered
        self._stream: Generator[Token] | None = None
        self._next_number = 0

    @property
    def num_active(self) -> int:
        """1 while a request is answered."""
        return int(self._stream is not None)

    @property
    def num_waiting(self) -> int:
        """Requests that wait for their turn."""
        return len(self._waiting)

    def add(self, request: Request) -> int:
        """Its number. ModelError for an adapter that is not loaded, DataError for a prompt that is empty or too long."""
        check_request(request, self._engine.adapter_names(), self.max_length)
        number, self._next_number = self._next_number, self._next_number + 1
        self._waiting.append((number, request))
        return number

    def cancel(self, number: int) -> None:
        """End it where it is; nothing where it has ended already."""
        if self._stream is not None and number == self._number:
            self._end()
        self._waiting = deque(entry for entry in self._waiting if entry[0] != number)

    def step(self) -> list[Token]:
        """The next token of the first request in line; [] only when there is none left."""
        while self._stream is not None or self._waiting:
            if self._stream is None:
                self._number, request = self._waiting.popleft()
                self._stream = self._answer(request)
            token = next(self._stream, None)
            if token is None or token.finish:
                self._end()
            if token is not None:
                return [replace(token, prompt=self._number)]
        return []

    def close(self) -> None:
        """End what is on its way."""
        self._waiting.clear()
        self._end()

    def _end(self) -> None:
        if self._stream is not None:
            self._stream.close()
            self._stream = None

    def _answer(self, request: Request) -> Generator[Token]:
        ids = list(request.prompt_ids)
        room = self.max_length - len(ids)
        sampling = replace(request.sampling, max_new_tokens=min(request.sampling.max_new_tokens, room))
        engine, count = self._engine, request.top_logprobs
        with engine.generating(request.adapter) as model:
            seen: deque[Tensor] = deque()  # logits (V,) of the tokens that have not been given out
            hook = None
            if count is not None:
                hook = engine.base.register_forward_hook(lambda _model, _inputs, out: seen.append(_last(out)))
            try:
                with closing(stream_tokens(model, engine.device, [ids], sampling, request.stop_ids)) as tokens:
                    for token in tokens:
                        yield token if count is None else _with_logprobs(token, seen.popleft(), count)
            finally:
                if hook is not None:
                    hook.remove()


def check_request(request: Request, names: list[str], max_length: int) -> None:
    """ModelError for an adapter that is not among the loaded ones, DataError for a prompt that is empty or too long."""
    if request.adapter is not None and request.adapter not in names:
        raise ModelError(f"no adapter {request.adapter!r} is loaded; there are {', '.join(names) or 'none'}")
    length = len(request.prompt_ids)
    if not 0 < length < max_length:
        raise DataError(f"a prompt of {length} tokens: 1 to {max_length - 1} leave room for an answer")


def _last(out: Any) -> Tensor:
    logits: Tensor = out.logits[0, -1].detach().float()
    return logits


def _with_logprobs(token: Token, logits: Tensor, count: int) -> Token:
    own = logits.log_softmax(0)
    top = own.topk(min(count, len(own)))
    pairs = zip(top.indices.tolist(), top.values.tolist(), strict=True)
    return replace(token, logprob=float(own[token.id]), top=tuple(pairs))
