"""Many clients at once against `lorikit serve`: every greedy answer equals the serial one, and nothing is left behind.

    python benchmarks/serve_load.py RUN [--clients 64] [--requests 20] [--slots 8] [--json]

Starts the server as a process on a free port. Each client sends greedy, streamed, sampled and base requests in turn, and
hangs up at random; afterwards the server's slots must be free, and its memory, file descriptors and threads as after the
warm-up round with the same load (memory: within 64 MiB). Exit code 1 if anything differs.
"""

import argparse
import http.client
import json
import random
import re
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

QUESTIONS = [f"Question {n}: what do you think of the number {n}?" for n in range(12)]
TOKENS = 24


def request(port, body, path="/v1/chat/completions"):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=300)
    try:
        connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
        response = connection.getresponse()
        return response.status, response.read().decode()
    finally:
        connection.close()


def body(model, text, **more):
    return {
        "model": model,
        "messages": [{"role": "user", "content": text}],
        "temperature": 0,
        "max_tokens": TOKENS,
        **more,
    }


def hang_up(port, content, after):
    data = json.dumps(content).encode()
    head = "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    with socket.create_connection(("127.0.0.1", port)) as connection:
        connection.sendall(f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data)
        time.sleep(after)


def client(port, seed, num, models, want):
    """(requests answered, hang-ups, wrong answers) of one client."""
    rng, answered, hung, wrong = random.Random(seed), 0, 0, []
    for _ in range(num):
        model, text = rng.choice(models), rng.choice(QUESTIONS)
        kind = rng.choice(["whole", "whole", "stream", "stream", "sampled", "hang up"])
        if kind == "hang up":
            hang_up(port, body(model, text, max_tokens=2000, stream=rng.random() < 0.5), rng.choice([0, 0.01, 0.1]))
            hung += 1
            continue
        extra = {"stream": True} if kind == "stream" else {"temperature": 1, "seed": seed} if kind == "sampled" else {}
        status, got = request(port, body(model, text, **extra))
        answered += 1
        if status != 200:
            wrong.append((status, got[:200]))
        elif kind == "stream":
            events = [json.loads(line[6:]) for line in got.splitlines() if line.startswith("data: {")]
            said = "".join(e["choices"][0]["delta"].get("content", "") for e in events)
            wrong += [] if said == want[model, text] else [(model, text, said)]
        elif kind == "whole":
            said = json.loads(got)["choices"][0]["message"]["content"]
            wrong += [] if said == want[model, text] else [(model, text, said)]
    return answered, hung, wrong


def footprint(pid):
    """Resident MiB, open file descriptors and threads of a process."""
    status = Path(f"/proc/{pid}/status").read_text()
    return {
        "mib": int(re.search(r"VmRSS:\s+(\d+)", status)[1]) / 1024,
        "descriptors": len(list(Path(f"/proc/{pid}/fd").iterdir())),
        "threads": int(re.search(r"Threads:\s+(\d+)", status)[1]),
    }


def idle(port):
    """Wait until no slot is taken; seconds."""
    started = time.monotonic()
    while True:
        connection = http.client.HTTPConnection("127.0.0.1", port)
        connection.request("GET", "/metrics")
        text = connection.getresponse().read().decode()
        connection.close()
        if "lorikit_requests_running 0" in text and "lorikit_requests_waiting 0" in text:
            return time.monotonic() - started
        assert time.monotonic() - started < 30, "slots are still taken"
        time.sleep(0.05)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run")
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--requests", type=int, default=20)
    parser.add_argument("--slots", type=int, default=8)
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    command = [sys.executable, "-m", "lorikit", "serve", given.run, "--port", "0", "--slots", str(given.slots)]
    with subprocess.Popen([*command, "--max-waiting", "100000"], stderr=subprocess.PIPE, text=True) as server:
        line = server.stderr.readline()
        while "http://" not in line:
            assert line, "the server did not start"
            line = server.stderr.readline()
        port = int(re.search(r"http://127\.0\.0\.1:(\d+)", line)[1])
        time.sleep(1)
        models = line.removeprefix("serving ").partition(" on ")[0].split(", ")
        want = {}
        for model in models:
            for text in QUESTIONS:
                status, got = request(port, body(model, text))
                assert status == 200, got
                want[model, text] = json.loads(got)["choices"][0]["message"]["content"]

        def load(offset):
            started = time.monotonic()
            with ThreadPoolExecutor(given.clients) as pool:
                done = list(
                    pool.map(lambda n: client(port, offset + n, given.requests, models, want), range(given.clients))
                )
            seconds = time.monotonic() - started
            return done, seconds, idle(port), footprint(server.pid)

        _, _, _, before = load(10**6)
        done, seconds, freed, after = load(0)
        server.terminate()
        code = server.wait(timeout=60)
    wrong = [item for one in done for item in one[2]]
    result = {
        "clients": given.clients,
        "answered": sum(one[0] for one in done),
        "hung_up": sum(one[1] for one in done),
        "wrong": len(wrong),
        "seconds": round(seconds, 1),
        "slots_free_after_seconds": round(freed, 2),
        "before": before,
        "after": after,
        "exit_code": code,
    }
    leaked = after["mib"] > before["mib"] + 64 or after["descriptors"] > before["descriptors"] + 2
    leaked = leaked or after["threads"] > before["threads"] + 2
    print(json.dumps(result) if given.json else "\n".join(f"{name:<26}{value}" for name, value in result.items()))
    for item in wrong[:5]:
        print(item, file=sys.stderr)
    sys.exit(bool(wrong) or leaked or code != 0)


if __name__ == "__main__":
    main()
