"""`lorikit serve` as a process: its end, its address and key; picking up checkpoints; an engine that fails; vLLM's command."""

import gc
import hashlib
import http.client
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from itertools import pairwise
from pathlib import Path

import pytest

from lorikit.errors import ModelError
from lorikit.infer.session import open_run
from lorikit.model import lora
from lorikit.model.decoder_slots import Slots
from lorikit.serve import vllm
from lorikit.serve.models import name_of, open_models, place_runs
from lorikit.serve.run import is_loopback
from serving import chat, serving, until
from tiny_model import save_adapter, save_model, save_run

GREEDY = {"temperature": 0, "max_tokens": 8}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("serve")
    save_run(folder / "run", save_model(folder / "base", longest=4096))
    return folder


@pytest.fixture
def process(made):
    """A started server and its port."""
    command = [
        sys.executable,
        "-m",
        "lorikit",
        "serve",
        str(made / "run"),
        "--port",
        "0",
        "--device",
        "cpu",
        "--drain",
        "60",
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "LORIKIT_API_KEY": "secret"}
    with subprocess.Popen(
        command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    ) as server:
        line = server.stderr.readline()
        assert line.startswith("serving run, base on http://127.0.0.1:"), line + server.stderr.read()
        yield server, int(line.split("127.0.0.1:")[1].split()[0])
        server.kill()


def ask(port, body, key="secret"):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {key}"}
    connection.request("POST", "/v1/chat/completions", json.dumps(body), headers)
    return connection.getresponse()


def test_sigterm_lets_a_running_answer_finish_refuses_the_next_and_exits_with_0(process):
    server, port = process
    deadline = time.monotonic() + 20
    while True:  # the line is printed before the socket listens
        try:
            assert ask(port, chat(**GREEDY), key="wrong").status == 401
            break
        except ConnectionRefusedError:
            assert time.monotonic() < deadline
            time.sleep(0.05)
    running = ask(port, chat(temperature=0, max_tokens=2500, stream=True))
    assert running.status == 200 and running.readline().startswith(b"data: ")
    server.send_signal(signal.SIGTERM)
    time.sleep(0.3)
    refused = ask(port, chat(**GREEDY))
    assert refused.status == 503 and refused.getheader("Retry-After") == "5"
    rest = running.read().decode()
    assert rest.rstrip().endswith("data: [DONE]") and '"finish_reason": "' in rest
    assert server.wait(timeout=60) == 0
    assert server.stdout.read() == "" and "Traceback" not in server.stderr.read()


def test_the_second_signal_and_the_end_of_the_time_cut_answers_off(process):
    server, port = process
    until(lambda: socket.socket().connect_ex(("127.0.0.1", port)) == 0, 20)
    running = ask(port, chat(temperature=0, max_tokens=3900, stream=True))
    assert running.readline().startswith(b"data: ")
    server.send_signal(signal.SIGINT)
    time.sleep(0.3)
    assert server.poll() is None
    server.send_signal(signal.SIGINT)
    assert server.wait(timeout=10) == 0
    assert "1 requests are cut off" in server.stderr.read()


@pytest.mark.parametrize(
    ("flags", "code", "reason"),
    [
        (["--host", "0.0.0.0"], 2, "give --api-key-file FILE"),
        (["--port", "70000"], 2, "at most 65535"),
        (["--slots", "0", "--max-length", "-1"], 2, "--max-length is -1"),
        (["--host", "no.such.host.invalid"], 2, "--api-key-file"),
        (["--engine", "fast"], 2, "lorikit or vllm"),
        (["--api-key-file", "/no/such"], 2, "cannot be read"),
        (["--engine", "vllm"], 4, "pip install vllm"),
        (["--engine", "vllm", "--watch"], 2, "takes no --watch"),
    ],
)
def test_what_cannot_be_served_is_told_at_once(flags, code, reason, made, lorikit):
    got, out, err = lorikit("serve", made / "run", *flags)
    assert (got, out) == (code, "") and reason in err and len(err.splitlines()) <= 2


def test_ipv6_is_an_address_too_and_names_of_this_machine_need_no_key(made):
    models = open_models([str(made / "run")], "cpu")
    with serving(models=models, host="::1") as server:
        connection = http.client.HTTPConnection("::1", server.port, timeout=20)
        connection.request("GET", "/health")
        assert connection.getresponse().status == 200
        connection.close()
    assert [is_loopback(h) for h in ("::1", "127.0.0.9", "localhost", "0.0.0.0", "::", "192.168.0.1", "example.org")] == [
        True, True, True, False, False, False, False,
    ]  # fmt: skip


def test_a_taken_port_no_run_and_an_empty_key_file_are_usage_errors(made, lorikit, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        code, _, err = lorikit("serve", made / "run", "--port", taken.getsockname()[1])
        assert code == 2 and "in use" in err
    assert lorikit("serve")[0] == 2
    for text in ("\n\n", "two words\n", "schlüssel\n"):
        (tmp_path / "keys").write_text(text)
        code, _, err = lorikit("serve", made / "run", "--api-key-file", tmp_path / "keys")
        assert code == 2 and "one key a line" in err
    assert lorikit("serve", made / "base")[0] == 4


def test_a_run_that_trains_is_served_and_its_next_checkpoint_picked_up(made, tmp_path):
    run = save_run(tmp_path / "run", made / "base")
    checkpoint(shutil.move(run / "adapter", tmp_path / "first"), run / "checkpoint-1")
    with serving(run, watching=True) as server:
        assert "not finished: this is its checkpoint-1" in server.models.first.notes[0]
        before = server.ask(body=chat(**GREEDY))[2]["choices"][0]["message"]["content"]
        other = save_adapter(tmp_path / "second", made / "base", strength=0.2)
        (run / "checkpoint-2").mkdir()  # half a checkpoint is passed over
        time.sleep(2.5)
        assert server.ask(body=chat(**GREEDY))[2]["choices"][0]["message"]["content"] == before
        shutil.rmtree(run / "checkpoint-2")
        checkpoint(other, run / "checkpoint-2")
        until(lambda: any("checkpoint-2" in line for line in server.said))
        after = server.ask(body=chat(**GREEDY))[2]["choices"][0]["message"]["content"]
    with serving(run) as server:
        assert server.ask(body=chat(**GREEDY))[2]["choices"][0]["message"]["content"] == after != before


def checkpoint(adapter, folder):
    shutil.copytree(adapter, folder)
    files = {f.name: {"sha256": hashlib.sha256(f.read_bytes()).hexdigest()} for f in folder.iterdir()}
    (folder / "manifest.json").write_text(json.dumps({"files": files}))


def num_caches():
    return sum(isinstance(one, Slots) for one in gc.get_objects())


def test_an_engine_that_fails_is_told_to_those_it_concerns_and_the_next_request_is_answered(made):
    models = open_models([str(made / "run")], "cpu")
    with serving(models=models) as server:
        want = server.ask(body=chat(**GREEDY))[2]["choices"][0]["message"]["content"]
        norm, caches = models.engine.weights.norm, num_caches()
        whole = norm.clone()
        norm.set_(whole[:3])  # a shape that no product takes
        status, _, body = server.ask(body=chat(**GREEDY))
        assert status == 500 and body["error"]["code"] == "engine_error"
        streamed = server.ask(body=chat(**GREEDY, stream=True))[2]
        assert "engine_error" in streamed and "[DONE]" not in streamed
        norm.set_(whole)
        assert server.ask(body=chat(**GREEDY))[2]["choices"][0]["message"]["content"] == want
        assert num_caches() == caches, "those that failed were given back"
        assert server.worker.num_open == 0 and server.get("/health")[0] == 200


def test_a_stopped_server_leaves_no_thread_behind(made):
    models = open_models([str(made / "run")], "cpu")
    before = threading.active_count()
    for _ in range(2):
        with serving(models=models) as server:
            assert server.ask(body=chat(**GREEDY))[0] == 200
    assert threading.active_count() == before


def test_runs_are_named_by_their_folder_or_as_asked(made, tmp_path):
    assert name_of(str(made / "run")) == ("run", str(made / "run"))
    assert name_of(f"mine={made / 'run'}") == ("mine", str(made / "run"))
    assert name_of(str(made / "run" / "adapter"))[0] == "run"
    assert name_of(str(made / "run" / "checkpoint-3"))[0] == "run-checkpoint-3"


def test_vllm_is_started_with_the_same_names_rank_and_template_and_no_key(made, tmp_path):
    encoder = open_run(made / "run", device="cpu").encoder
    run = shutil.copytree(made / "run", tmp_path / "run")
    encoder.save_tokenizer(run / "adapter")
    arguments = vllm.command(place_runs([str(run), f"b={made / 'run'}"]), "127.0.0.1", 9000, 2048)
    assert arguments[:3] == [sys.executable, "-m", "vllm.entrypoints.openai.api_server"]
    flags = dict(pairwise(arguments))
    assert flags["--model"] == str(made / "base") and flags["--served-model-name"] == "base"
    assert (flags["--host"], flags["--port"], flags["--max-model-len"]) == ("127.0.0.1", "9000", "2048")
    assert (flags["--max-loras"], flags["--max-lora-rank"]) == ("2", "8")
    at = arguments.index("--lora-modules")
    assert arguments[at + 1 : at + 3] == [f"run={run / 'adapter'}", f"b={made / 'run' / 'adapter'}"]
    assert Path(flags["--chat-template"]).read_text() == encoder.tokenizer.chat_template
    assert not any("key" in argument for argument in arguments)


def test_the_process_becomes_vllms_server_with_the_key_in_its_environment(made, tmp_path):
    package = tmp_path / "vllm" / "entrypoints" / "openai"
    package.mkdir(parents=True)
    (package / "api_server.py").write_text(
        "import json, os, sys\nprint(json.dumps([os.getpid(), os.environ['VLLM_API_KEY'], sys.argv[1:]]))\n"
    )
    path = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "PYTHONPATH": path, "LORIKIT_API_KEY": "secret"}
    command = [
        sys.executable,
        "-m",
        "lorikit",
        "serve",
        str(made / "run"),
        "--engine",
        "vllm",
        "--host",
        "0.0.0.0",
        "--port",
        "9000",
    ]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as server:
        pid, key, arguments = json.loads(server.communicate(timeout=60)[0])
    assert (pid, key, server.returncode) == (server.pid, "secret", 0)
    assert arguments == vllm.command(place_runs([str(made / "run")]), "0.0.0.0", 9000, None)[3:]


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        ({"r": 16, "target_modules": ["q_proj"]}, None),
        ({"r": 513}, "at most 512"),
        ({"r": 8, "use_dora": True}, "DoRA"),
        ({"r": 8, "bias": "all"}, "biases"),
        ({"r": 8, "modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"r": 8, "rank_pattern": {"q_proj": 4}}, "rank_pattern"),
        ({"r": 8, "target_modules": ["c_attn"]}, "c_attn"),
    ],
)
def test_what_vllm_would_refuse_is_known_before(values, problem, made, tmp_path):
    found = vllm.problems(values)
    assert found == [] if problem is None else len(found) == 1 and problem in found[0]
    assert [vllm.max_lora_rank(r) for r in (1, 2, 8, 9, 300, 512, 600)] == [1, 8, 8, 16, 320, 512, None]
    if problem and "c_attn" not in problem:
        run = shutil.copytree(made / "run", tmp_path / "run")
        path = run / "adapter" / lora.CONFIG
        path.write_text(json.dumps(json.loads(path.read_text()) | values))
        with pytest.raises(ModelError, match=problem):
            vllm.command(place_runs([str(run)]), "127.0.0.1", 1, None)
