"""What every request passes before it reaches the application: its host, its key, its size, and whether we still serve.

Without a key only this machine may ask, and only under a name of this machine: a web page that has its own name point
here (DNS rebinding) is turned away.
"""

from __future__ import annotations

import hmac
import json
from collections.abc import Awaitable, Callable, MutableMapping, Sequence
from typing import Any

from starlette.exceptions import HTTPException

from lorikit.serve.protocol import ApiError

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

MAX_BODY = 4 * 2**20  # bytes
LOCAL_NAMES = frozenset({"localhost", "127.0.0.1", "::1"})
_OPEN = frozenset({"/health"})


class Guard:
    """ASGI middleware. `keys` are allowed keys, none: anyone on this machine; `draining` refuses new work."""

    def __init__(self, app: App, keys: Sequence[str] = ()) -> None:
        self.app = app
        self._keys = [key.encode() for key in keys]
        self.draining = False
        self.num_running = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Refuse the request or hand it on, its body counted."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = dict(reversed(scope["headers"]))
        try:
            self._check(scope, headers)
        except ApiError as error:
            await _refuse(error, send)
            return
        self.num_running += scope["method"] == "POST"
        try:
            await self.app(scope, _counted(receive), send)
        finally:
            self.num_running -= scope["method"] == "POST"

    def _check(self, scope: Scope, headers: dict[bytes, bytes]) -> None:
        if self._keys:
            given = headers.get(b"authorization", b"")
            scheme, _, key = given.partition(b" ")
            known = [hmac.compare_digest(key.strip(), own) for own in self._keys]  # all of them, whichever fits
            if scope["path"] not in _OPEN and not (scheme.lower() == b"bearer" and any(known)):
                raise ApiError(401, "a key is needed: Authorization: Bearer KEY", code="invalid_api_key")
        elif _host(headers.get(b"host", b"localhost")) not in LOCAL_NAMES:
            raise ApiError(403, "without an API key this server answers to localhost alone", code="invalid_host")
        if self.draining and scope["method"] == "POST":
            raise ApiError(503, "the server is shutting down", code="shutting_down")
        length = headers.get(b"content-length", b"0")
        if not length.isdigit() or int(length) > MAX_BODY:
            raise ApiError(413, f"the body is larger than {MAX_BODY:,} bytes", code="too_large")


def _host(value: bytes) -> str:
    """The name in a Host header, without its port."""
    text = value.decode("latin-1").strip().lower()
    return text[1:].partition("]")[0] if text.startswith("[") else text.partition(":")[0]


def _counted(receive: Receive) -> Receive:
    """`receive` that stops a body without a length when it grows too large."""
    seen = 0

    async def counted() -> MutableMapping[str, Any]:
        nonlocal seen
        message = await receive()
        seen += len(message.get("body", b""))
        if seen > MAX_BODY:
            raise HTTPException(413, f"the body is larger than {MAX_BODY:,} bytes")  # FastAPI lets its own pass
        return message

    return counted


async def _refuse(error: ApiError, send: Send) -> None:
    body = json.dumps(error.body()).encode()
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(body)).encode()),
        (b"connection", b"close"),
    ]
    headers += [(name.lower().encode(), value.encode()) for name, value in extra_headers(error).items()]
    await send({"type": "http.response.start", "status": error.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def extra_headers(error: ApiError) -> dict[str, str]:
    """When to try again, and how to say who one is."""
    return {401: {"WWW-Authenticate": "Bearer"}, 429: {"Retry-After": "1"}, 503: {"Retry-After": "5"}}.get(
        error.status, {}
    )
