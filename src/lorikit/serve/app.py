"""The HTTP application: OpenAI's routes, the tutorial's, health and metrics, and errors in one shape."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from datetime import datetime
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from pydantic import BaseModel
from starlette.background import BackgroundTask
from starlette.exceptions import HTTPException

from lorikit import __version__
from lorikit.serve.answers import Answering, Job, chunks, engine_error, whole
from lorikit.serve.docs_page import add_docs
from lorikit.serve.guard import Guard, extra_headers
from lorikit.serve.metrics import Metrics
from lorikit.serve.models import Models, Served
from lorikit.serve.protocol import ApiError, ChatRequest, CompletionRequest, TutorialRequest
from lorikit.serve.worker import Worker

HUNG_UP = 499  # nginx' status for a client that left before its answer
Background = Callable[[], Awaitable[None]]


class _Error(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """Every error."""

    error: _Error


_ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorBody, "description": text}
    for status, text in {
        400: "What was asked is not possible or not supported",
        401: "No key, or a wrong one",
        403: "Not from here",
        404: "No such model",
        413: "Too large",
        422: "Not used; bad input is 400, as in OpenAI's API",
        429: "All slots are taken and the line is full",
        500: "The engine failed",
        503: "Shutting down",
    }.items()
}

_STREAMED: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "The answer, or with stream: true its chunks as server-sent events",
        "content": {"text/event-stream": {}},
    }
}


def make_app(
    models: Models, worker: Worker, max_length: int, *, keys: Sequence[str] = (), background: Sequence[Background] = ()
) -> Guard:
    """The application inside its Guard. The worker's thread lives as long as the application does; `background` runs
    beside it."""
    metrics = Metrics()

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncGenerator[None]:
        worker.start()
        tasks = [asyncio.ensure_future(run()) for run in background]
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.to_thread(worker.stop)

    app = FastAPI(
        title="Lorikit",
        version=__version__,
        description="OpenAI's API for a base model and its LoRA adapters.",
        lifespan=lifespan,
        responses=_ERRORS,
        docs_url=None,
        redoc_url=None,
    )
    guard = Guard(app, keys)
    _handle_errors(app, metrics)
    add_docs(app)
    _add_status(app, models, worker, metrics, guard, max_length)
    _add_completions(app, models, Answering(worker, metrics, max_length))
    return guard


def _find(models: Models, name: str) -> Served:
    found = models.served.get(name)
    if found is None:
        names = ", ".join(models.served)
        raise ApiError(
            404, f"The model {name!r:.200} does not exist; there are {names}", param="model", code="model_not_found"
        )
    return found


def _add_status(app: FastAPI, models: Models, worker: Worker, metrics: Metrics, guard: Guard, max_length: int) -> None:
    created = int(time.time())
    base = next(served.name for served in models.served.values() if served.adapter is None)

    def entry(served: Served) -> dict[str, Any]:
        parent = {"root": base, "parent": base if served.adapter else None, "max_model_len": max_length}
        return {"id": served.name, "object": "model", "created": created, "owned_by": "lorikit", **parent}

    @app.get("/v1/models")
    async def list_models() -> dict[str, Any]:
        """The adapters and their base."""
        return {"object": "list", "data": [entry(served) for served in models.served.values()]}

    @app.get("/v1/models/{name:path}")
    async def show_model(name: str) -> dict[str, Any]:
        """One of them."""
        return entry(_find(models, name))

    @app.get("/health")
    async def health() -> dict[str, Any]:
        """200 while requests are taken, else 503."""
        if guard.draining:
            raise ApiError(503, "the server is shutting down", code="shutting_down")
        if worker.broken is not None:
            raise ApiError(503, f"the engine failed: {worker.broken}", code="engine_error")
        return {"status": "ok"}

    @app.get("/metrics", response_class=PlainTextResponse)
    async def show_metrics() -> PlainTextResponse:
        """Prometheus text."""
        running = min(worker.num_open, worker.num_slots)
        gauges = {
            "lorikit_requests_running": running,
            "lorikit_requests_waiting": worker.num_open - running,
            "lorikit_slots": worker.num_slots,
        }
        return PlainTextResponse(metrics.text(gauges), media_type="text/plain; version=0.0.4; charset=utf-8")


def _add_completions(app: FastAPI, models: Models, answering: Answering) -> None:
    async def respond(request: Request, job: Job, asked: ChatRequest | CompletionRequest) -> Response:
        if asked.stream:
            usage = asked.stream_options is not None and asked.stream_options.include_usage
            return StreamingResponse(
                chunks(job, include_usage=usage),
                media_type="text/event-stream",
                headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"},
                background=BackgroundTask(_end, job),  # where the client had gone before the first piece was asked for
            )
        answer = await _unless_hung_up(request, job)
        return Response(status_code=HUNG_UP) if answer is None else JSONResponse(answer)

    def check(asked: ChatRequest | CompletionRequest) -> Served:
        if asked.stream_options is not None and not asked.stream:
            raise ApiError(400, "stream_options needs stream: true", param="stream_options")
        return _find(models, asked.model)

    @app.post("/v1/chat/completions", responses=_STREAMED)
    async def chat(request: Request, asked: ChatRequest) -> Response:
        """The next turn of a conversation."""
        served = check(asked)
        request.state.model = served.name
        return await respond(request, await answering.chat(served, asked), asked)

    @app.post("/v1/completions", responses=_STREAMED)
    async def complete(request: Request, asked: CompletionRequest) -> Response:
        """How a text goes on."""
        served = check(asked)
        request.state.model = served.name
        return await respond(request, await answering.text(served, asked), asked)

    @app.post("/")
    async def tutorial(request: Request, asked: TutorialRequest) -> Response:
        """The tutorial's contract: {"prompt", "history"} -> {"response", "history", "status", "time"}."""
        served = models.first
        request.state.model = served.name
        job = await answering.chat(served, asked.chat(served.name))
        answer = await _unless_hung_up(request, job)
        if answer is None:
            return Response(status_code=HUNG_UP)
        text = answer["choices"][0]["message"]["content"]
        now = datetime.now().astimezone().strftime("%Y-%m-%d %H:%M:%S")
        return JSONResponse({"response": text, "history": asked.history_with(text), "status": 200, "time": now})


async def _unless_hung_up(request: Request, job: Job) -> dict[str, Any] | None:
    """The whole answer, or None, its slots freed, when the client leaves before it is there."""

    async def hung_up() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    answer, gone = asyncio.ensure_future(whole(job)), asyncio.ensure_future(hung_up())
    try:
        await asyncio.wait({answer, gone}, return_when=asyncio.FIRST_COMPLETED)
        status = "200" if answer.done() else str(HUNG_UP)
        found = answer.result() if answer.done() else None
    except ApiError:
        raise
    except Exception as error:
        raise engine_error(error) from error
    finally:
        for task in (answer, gone):
            task.cancel()
        job.flight.cancel()
    job.metrics.count("lorikit_requests_total", model=job.served.name, status=status)
    return found


def _handle_errors(app: FastAPI, metrics: Metrics) -> None:
    def told(request: Request, error: ApiError) -> JSONResponse:
        if request.method == "POST":
            model = getattr(request.state, "model", "")
            metrics.count("lorikit_requests_total", model=model, status=str(error.status))
        return JSONResponse(error.body(), error.status, headers=extra_headers(error))

    @app.exception_handler(ApiError)
    async def api_error(request: Request, error: ApiError) -> JSONResponse:
        return told(request, error)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        return told(request, _explained(error))

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> JSONResponse:
        response = told(request, ApiError(error.status_code, str(error.detail)))
        response.headers.update(error.headers or {})
        return response

    @app.exception_handler(Exception)
    async def bug(request: Request, error: Exception) -> JSONResponse:
        return told(request, ApiError(500, f"internal error: {type(error).__name__}"))


async def _end(job: Job) -> None:
    """Free its slot, if it has one still; on the event loop, which a plain function would not be called on."""
    job.flight.cancel()


def _explained(error: RequestValidationError) -> ApiError:
    """What is wrong with a body, in a line, with the name of the first bad value."""
    first = error.errors()[0]
    place = [part for part in first["loc"][1:] if not (isinstance(part, str) and "[" in part)]
    name = ".".join(map(str, place)) or None
    if first["type"] == "extra_forbidden":
        return ApiError(400, f"{name} is not supported", param=name, code="unsupported_parameter")
    if first["type"] == "json_invalid":  # whose place is a character of the body
        return ApiError(400, f"the body is no JSON: {first['ctx']['error']}, at character {name}")
    if first["type"] in ("model_attributes_type", "dict_type") and not name:
        return ApiError(400, f"the body is no JSON object: {first['msg']}")
    code = "unsupported_value" if first["type"] in ("literal_error", "too_long") else None
    return ApiError(400, f"{name}: {first['msg']}", param=name, code=code)
