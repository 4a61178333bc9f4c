"""A checked request -> prompt ids, requests to the engine, and the answers in OpenAI's shapes, whole or in chunks."""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any, Protocol

from lorikit import __version__
from lorikit.errors import DataError
from lorikit.infer.generate import check_sampling
from lorikit.model.engine import Request
from lorikit.serve.metrics import Metrics
from lorikit.serve.models import Served
from lorikit.serve.protocol import ApiError, ChatRequest, CompletionRequest
from lorikit.serve.words import Piece, Words
from lorikit.serve.worker import Flight, Full, Worker

_FINGERPRINT = f"lorikit-{__version__}"


@dataclass(slots=True)
class Job:
    """One HTTP request being answered: `words` has one entry for each choice, `prompts` the ids of each of them."""

    served: Served
    flight: Flight
    words: list[Words]
    num_prompt_tokens: int
    form: Form
    metrics: Metrics
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    created: int = field(default_factory=lambda: int(time.time()))
    started: float = field(default_factory=time.perf_counter)

    async def pieces(self) -> AsyncGenerator[tuple[int, Piece]]:
        """What each choice says, as it comes. Closing it, or an error, frees the slots."""
        told = False
        try:
            async for number, token in self.flight:
                if not told:
                    self.metrics.time("lorikit_first_token_seconds", time.perf_counter() - self.started)
                    told = True
                piece = self.words[number].add(token)
                if piece.finish and token.finish is None:
                    self.flight.cancel(number)
                yield number, piece
        finally:
            self.flight.cancel()
            self.metrics.count(
                "lorikit_generated_tokens_total", sum(w.num_tokens for w in self.words), model=self.served.name
            )
            self.metrics.time("lorikit_request_seconds", time.perf_counter() - self.started)

    def usage(self) -> dict[str, Any]:
        """Token counts so far."""
        generated = sum(words.num_tokens for words in self.words)
        return {
            "prompt_tokens": self.num_prompt_tokens,
            "completion_tokens": generated,
            "total_tokens": self.num_prompt_tokens + generated,
        }

    def envelope(self, kind: str) -> dict[str, Any]:
        """What every answer and chunk has around its choices."""
        return {
            "id": f"{self.form.prefix}-{self.id}",
            "object": kind,
            "created": self.created,
            "model": self.served.name,
            "system_fingerprint": _FINGERPRINT,
        }


class Form(Protocol):
    """How one of the two kinds of completion writes its choices."""

    @property
    def prefix(self) -> str:
        """Of the answer's id."""
        ...

    @property
    def whole(self) -> str:
        """What an answer is called."""
        ...

    @property
    def chunk(self) -> str:
        """What a chunk is called."""
        ...

    def choice(self, number: int, text: str, logprobs: list[dict[str, Any]], finish: str | None) -> dict[str, Any]:
        """One choice of a whole answer."""
        ...

    def delta(self, number: int, piece: Piece) -> dict[str, Any]:
        """One choice of a chunk."""
        ...

    def opening(self, number: int) -> dict[str, Any] | None:
        """What a choice begins with in a stream."""
        ...


@dataclass(frozen=True, slots=True)
class ChatForm:
    """Of /v1/chat/completions."""

    logprobs: bool
    prefix: str = "chatcmpl"
    whole: str = "chat.completion"
    chunk: str = "chat.completion.chunk"

    def choice(self, number: int, text: str, logprobs: list[dict[str, Any]], finish: str | None) -> dict[str, Any]:
        """With the message."""
        message = {"role": "assistant", "content": text, "refusal": None}
        return {"index": number, "message": message, "logprobs": self._shown(logprobs), "finish_reason": finish}

    def delta(self, number: int, piece: Piece) -> dict[str, Any]:
        """With what is new."""
        content = {"content": piece.text} if piece.text else {}
        return {
            "index": number,
            "delta": content,
            "logprobs": self._shown(list(piece.logprobs)),
            "finish_reason": piece.finish,
        }

    def opening(self, number: int) -> dict[str, Any] | None:
        """Who speaks."""
        return {"index": number, "delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None}

    def _shown(self, entries: list[dict[str, Any]]) -> dict[str, Any] | None:
        return {"content": entries, "refusal": None} if self.logprobs else None


@dataclass(frozen=True, slots=True)
class TextForm:
    """Of /v1/completions."""

    logprobs: bool
    prefix: str = "cmpl"
    whole: str = "text_completion"
    chunk: str = "text_completion"

    def choice(self, number: int, text: str, logprobs: list[dict[str, Any]], finish: str | None) -> dict[str, Any]:
        """With the text."""
        return {"index": number, "text": text, "logprobs": self._shown(logprobs), "finish_reason": finish}

    def delta(self, number: int, piece: Piece) -> dict[str, Any]:
        """With what is new."""
        return self.choice(number, piece.text, list(piece.logprobs), piece.finish)

    def opening(self, number: int) -> dict[str, Any] | None:
        """Nothing."""
        return None

    def _shown(self, entries: list[dict[str, Any]]) -> dict[str, Any] | None:
        if not self.logprobs:
            return None
        return {
            "tokens": [entry["token"] for entry in entries],
            "token_logprobs": [entry["logprob"] for entry in entries],
            "top_logprobs": [{top["token"]: top["logprob"] for top in entry["top_logprobs"]} for entry in entries],
        }


class Answering:
    """Makes a Job of a request; holds the server's limits. `max_length` counts prompt and answer."""

    def __init__(self, worker: Worker, metrics: Metrics, max_length: int) -> None:
        self.worker, self.metrics, self.max_length = worker, metrics, max_length
        self._tokenizing = asyncio.Lock()  # an encoder is used by one thread at a time

    async def chat(self, served: Served, asked: ChatRequest) -> Job:
        """Raises ApiError for what cannot be answered, and when there is no room for it."""
        top = asked.num_top()
        self._check_room(1)  # before the work of making tokens
        messages = [turn.message() for turn in asked.messages]
        async with self._tokenizing:
            ids = await asyncio.to_thread(_or_bad_request, "messages", served.encoder.prompt_ids, messages)
        return self._start(served, asked, [ids], top, ChatForm(top is not None), "messages")

    async def text(self, served: Served, asked: CompletionRequest) -> Job:
        """As `chat`, for prompts without a chat template."""
        prompts = []
        self._check_room(len(asked.prompts()))
        for text in asked.prompts():
            async with self._tokenizing:
                prompts.append(await asyncio.to_thread(_or_bad_request, "prompt", served.encoder.text_ids, text))
        return self._start(served, asked, prompts, asked.logprobs, TextForm(asked.logprobs is not None), "prompt")

    def _check_room(self, count: int) -> None:
        try:
            self.worker.check_room(count)
        except Full:
            busy = f"all {self.worker.num_slots} slots are taken and the line is full; try again"
            raise ApiError(429, busy, code="rate_limit_exceeded") from None
        except Exception as error:
            raise engine_error(error) from error

    def _start(
        self,
        served: Served,
        asked: ChatRequest | CompletionRequest,
        prompts: Sequence[list[int]],
        top: int | None,
        form: Form,
        param: str,
    ) -> Job:
        stops = asked.stops()
        requests: list[Request] = []
        for ids in prompts:
            room = self.max_length - len(ids)
            if not ids:
                raise ApiError(400, "the prompt is empty", param=param)
            if room < 1:
                raise ApiError(
                    400,
                    f"This server's maximum context length is {self.max_length} tokens, the answer included; the prompt has "
                    f"{len(ids)}. Shorten it by {1 - room} or more.",
                    param=param,
                    code="context_length_exceeded",
                )
            for _ in range(asked.n or 1):
                sampling = asked.sampling(room, asked.longest(), len(requests))
                check_sampling(sampling)
                requests.append(Request(ids, sampling, served.encoder.stop_ids, served.adapter, top))
        self._check_room(len(requests))
        flight = self.worker.submit(*requests)
        words = [Words(served.encoder, stops) for _ in requests]
        num_prompt_tokens = sum(len(ids) for ids in prompts)
        self.metrics.count("lorikit_prompt_tokens_total", num_prompt_tokens, model=served.name)
        return Job(served, flight, words, num_prompt_tokens, form, self.metrics)


async def whole(job: Job) -> dict[str, Any]:
    """The answer in one piece."""
    logprobs: list[list[dict[str, Any]]] = [[] for _ in job.words]
    finish: list[str | None] = [None] * len(job.words)
    async with aclosing(job.pieces()) as pieces:
        async for number, piece in pieces:
            logprobs[number] += piece.logprobs
            finish[number] = piece.finish
    choices = [job.form.choice(n, words.text, logprobs[n], finish[n]) for n, words in enumerate(job.words)]
    return {**job.envelope(job.form.whole), "choices": choices, "usage": job.usage()}


async def chunks(job: Job, *, include_usage: bool) -> AsyncGenerator[str]:
    """The answer as server-sent events; an error of the engine is one of them, in OpenAI's shape."""

    def event(choices: list[dict[str, Any]], usage: dict[str, Any] | None = None) -> str:
        content = {**job.envelope(job.form.chunk), "choices": choices}
        content |= {"usage": usage} if include_usage else {}
        return f"data: {json.dumps(content, ensure_ascii=False)}\n\n"

    try:
        for number in range(len(job.words)):
            opening = job.form.opening(number)
            if opening is not None:
                yield event([opening])
        async with aclosing(job.pieces()) as pieces:
            async for number, piece in pieces:
                if piece.text or piece.finish or piece.logprobs:
                    yield event([job.form.delta(number, piece)])
        if include_usage:
            yield event([], job.usage())
        yield "data: [DONE]\n\n"
        job.metrics.count("lorikit_requests_total", model=job.served.name, status="200")
    except (asyncio.CancelledError, GeneratorExit):
        job.metrics.count("lorikit_requests_total", model=job.served.name, status="499")
        raise
    except Exception as error:  # the status was sent long ago: it can only be told here
        job.metrics.count("lorikit_requests_total", model=job.served.name, status="500")
        yield f"data: {json.dumps(engine_error(error).body())}\n\n"
    finally:
        job.flight.cancel()  # where a piece was asked for; else the response's background does it


def engine_error(error: Exception) -> ApiError:
    """What a client hears of an engine that failed."""
    return ApiError(500, f"the engine failed: {type(error).__name__}: {str(error)[:300]}", code="engine_error")


def _or_bad_request(param: str, make: Any, given: Any) -> list[int]:
    try:
        ids: list[int] = make(given)
    except DataError as error:
        raise ApiError(400, str(error), param=param) from None
    return ids
