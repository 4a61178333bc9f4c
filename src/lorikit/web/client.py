"""A client of any server that speaks OpenAI's protocol: its models, and answers as they come. Standard library only."""

from __future__ import annotations

import json
import os
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from http.client import HTTPException
from typing import Any
from urllib.parse import urlsplit

from lorikit.errors import ModelError

_SECONDS = 120  # without a byte from the server
_QUICK = 5
_OURS = ("127.0.0.1", "localhost", "::1")
_OPENER = urllib.request.build_opener(
    urllib.request.ProxyHandler({})
)  # a proxy has no way to this machine's own servers


def check_url(url: str) -> str:
    """`url` without its end, if it is one of a server; ModelError says how it should look."""
    parts = urlsplit(url.strip())
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ModelError(f"{url!r} is no address of a server; it looks like http://127.0.0.1:8000")
    return url.strip().rstrip("/").removesuffix("/v1")


def models(url: str) -> list[str]:
    """The names of the server's models. Raises ModelError."""
    with _open(f"{check_url(url)}/v1/models", None, _QUICK) as answer:
        try:
            return [str(one["id"]) for one in json.load(answer)["data"]]
        except (ValueError, KeyError, TypeError):
            raise ModelError(f"{url} answers, but not as a server of models does (/v1/models)") from None


def answer(url: str, model: str, messages: Sequence[Mapping[str, str]], sampling: Mapping[str, Any]) -> Iterator[str]:
    """Pieces of the model's answer. Closing the iterator hangs up. Raises ModelError with the server's own message."""
    body = {"model": model, "messages": list(messages), "stream": True, **sampling}
    with _open(f"{check_url(url)}/v1/chat/completions", body, _SECONDS) as stream:
        try:
            yield from _pieces(stream)
        except (OSError, HTTPException) as error:
            raise ModelError(f"{url}: the answer broke off ({error})") from None


def _pieces(stream: Iterator[bytes]) -> Iterator[str]:
    for line in stream:
        data = line.strip()
        if not data.startswith(b"data:") or data == b"data: [DONE]":
            continue
        try:
            event = json.loads(data.removeprefix(b"data:"))
            if "error" in event:
                raise ModelError(str(event["error"].get("message", event["error"])))
            choices = event["choices"]
            piece = choices[0]["delta"].get("content") if choices else None
        except (ValueError, KeyError, TypeError, AttributeError, IndexError):
            raise ModelError(f"the server sent what is no piece of an answer: {data[:80]!r}") from None
        if piece:
            yield piece


def _open(url: str, body: object, seconds: float) -> Any:
    headers = {"Content-Type": "application/json", "Accept": "application/json, text/event-stream"}
    key = os.environ.get("LORIKIT_API_KEY")  # what `lorikit serve` on this machine then asks for; no other host is told
    if key and urlsplit(url).hostname in _OURS:
        headers["Authorization"] = f"Bearer {key}"
    request = urllib.request.Request(url, None if body is None else json.dumps(body).encode(), headers)  # noqa: S310
    try:
        return _OPENER.open(request, timeout=seconds)
    except urllib.error.HTTPError as error:
        raise ModelError(f"{_message(error)} (HTTP {error.code})") from None
    except (OSError, HTTPException, ValueError) as error:
        raise ModelError(f"{url} cannot be reached: {getattr(error, 'reason', error)}") from None


def _message(error: urllib.error.HTTPError) -> str:
    try:
        return str(json.load(error)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return str(error.reason)
