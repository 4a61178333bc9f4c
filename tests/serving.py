"""A server in a thread of the tests, with a real tiny model, and plain HTTP to it."""

import asyncio
import http.client
import json
import threading
import time
from contextlib import contextmanager

import uvicorn

from lorikit.serve.app import make_app
from lorikit.serve.models import open_models
from lorikit.serve.run import Server, open_socket, watch
from lorikit.serve.worker import Worker


class Running:
    def __init__(self, models, worker, guard, port):
        self.models, self.worker, self.guard, self.port = models, worker, guard, port
        self.url = f"http://127.0.0.1:{port}"

    def ask(self, path="/v1/chat/completions", body=None, *, method="POST", headers=None, raw=None):
        """(status, headers, body as JSON or text)"""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        try:
            content = raw if raw is not None else None if body is None else json.dumps(body).encode()
            connection.request(method, path, content, {"Content-Type": "application/json", **(headers or {})})
            response = connection.getresponse()
            text = response.read().decode(errors="replace")  # the icon of /docs is no text
        finally:
            connection.close()
        is_json = (response.getheader("Content-Type") or "").startswith("application/json")
        headers = {name.lower(): value for name, value in response.getheaders()}
        return response.status, headers, json.loads(text) if is_json else text

    def get(self, path, **more):
        return self.ask(path, method="GET", **more)


def chat(content="hello", model="run", **more):
    messages = content if isinstance(content, list) else [{"role": "user", "content": content}]
    return {"model": model, "messages": messages, **more}


@contextmanager
def serving(
    *runs, slots=4, max_length=10**6, max_waiting=64, keys=(), drain=5, watching=False, models=None, host="127.0.0.1"
):
    models = models or open_models([str(run) for run in runs], "cpu")
    length = min(max_length, models.max_length)
    worker = Worker(lambda: models.engine.decoding(slots, length), max_waiting=max_waiting)
    said = []
    guard = make_app(
        models, worker, length, keys=keys, background=[lambda: watch(models, said.append)] if watching else []
    )
    with open_socket(host, 0) as listening:
        config = uvicorn.Config(
            guard, log_level="warning", access_log=False, timeout_graceful_shutdown=2, lifespan="on"
        )
        server = Server(config, guard, worker, drain, said.append)
        thread = threading.Thread(target=lambda: asyncio.run(server.serve([listening])))
        thread.start()
        try:
            until(lambda: server.started)
            running = Running(models, worker, guard, listening.getsockname()[1])
            running.said = said
            yield running
        finally:
            server.should_exit = True
            thread.join(timeout=20)
            assert not thread.is_alive()


def until(holds, seconds=10.0):
    """Wait for something to become true; how long it took."""
    started = time.monotonic()
    while not holds():
        assert time.monotonic() - started < seconds, "it never came true"
        time.sleep(0.01)
    return time.monotonic() - started
