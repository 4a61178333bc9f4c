"""A server that speaks OpenAI's chat protocol, in the standard library, for the tests of its clients.

It answers with the question and its own name, a word at a time; questions that begin with "break", "refuse" or "nonsense"
get what a failing server sends.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

MODELS = ["base", "mine", "<b>odd</b> *name*"]


class Handler(BaseHTTPRequestHandler):
    def log_message(self, format: str, *arguments: Any) -> None:
        pass

    def do_GET(self) -> None:
        if self.path == "/v1/models":
            self._json(200, {"object": "list", "data": [{"id": name, "object": "model"} for name in MODELS]})
        else:
            self._json(404, {"error": {"message": f"no {self.path}"}})

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        prompt = asked["messages"][-1]["content"]
        if asked["model"] not in MODELS or prompt.startswith("refuse"):
            self._json(429, {"error": {"message": "the line is full, come back later"}})
            return
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
        if prompt.startswith("nonsense"):
            self.wfile.write(b"data: {not json\n\n")
            return
        if prompt.startswith("break"):
            self._event({"error": {"message": "the model fell over"}})
            return
        self._event({"choices": [{"delta": {"role": "assistant"}}]})
        for word in f"{asked['model']} says: {prompt}".split(" "):
            self._event({"choices": [{"delta": {"content": word + " "}}]})
        self._event({"choices": [], "usage": {}})
        self.wfile.write(b": a remark\n\ndata: [DONE]\n\n")

    def _event(self, value: Any) -> None:
        self.wfile.write(b"data: " + json.dumps(value).encode() + b"\n\n")

    def _json(self, status: int, value: Any) -> None:
        body = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


@contextmanager
def chat_server() -> Iterator[str]:
    """Its address while the block runs."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
