"""Two machines with addresses of their own, as network namespaces on one: torchrun's rendezvous, and who writes what."""

import json
import os
import shutil
import subprocess
import sys
import time
import uuid
from contextlib import suppress
from pathlib import Path

import pytest

from lorikit.train.checkpoint import checkpoints, verify
from test_distributed import WORKER, environment, same
from test_loop import begin, curve
from tiny_engine import TinyEngine

PORT = 29471  # inside a namespace of its own no other process can have it


def obstacle():
    """Why there can be none here; empty where there can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    if shutil.which("ip") is None:
        return "network namespaces need the command ip"
    name = f"lk{uuid.uuid4().hex[:8]}"
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True, check=False)
    if made.returncode:
        return f"network namespaces cannot be made here: {made.stderr.strip()}"
    pair = ["ip", "link", "add", f"{name}a", "type", "veth", "peer", "name", f"{name}b"]
    linked = subprocess.run(pair, capture_output=True, text=True, check=False)
    subprocess.run(["ip", "link", "del", f"{name}a"], capture_output=True, check=False)
    subprocess.run(["ip", "netns", "del", name], check=True)
    return f"veth pairs cannot be made here: {linked.stderr.strip()}" if linked.returncode else ""


@pytest.fixture(scope="module")
def machines():
    """Names of two namespaces, joined by a cable; the first is 10.77.0.1, the second 10.77.0.2."""
    reason = obstacle()
    if reason:
        pytest.skip(reason)
    name = f"lk{uuid.uuid4().hex[:8]}"
    both = [f"{name}a", f"{name}b"]
    try:
        for machine in both:
            subprocess.run(["ip", "netns", "add", machine], check=True)
        ends = ["name", "eth0", "netns"]
        cable = ["ip", "link", "add", *ends, both[0], "type", "veth", "peer", *ends, both[1]]
        subprocess.run(cable, check=True)
        for number, machine in enumerate(both, 1):
            for command in (f"addr add 10.77.0.{number}/24 dev eth0", "link set eth0 up", "link set lo up"):
                subprocess.run(["ip", "-n", machine, *command.split()], check=True)
        yield both
    finally:
        for machine in both:
            subprocess.run(["ip", "netns", "del", machine], check=False, capture_output=True)


def train(machines, runs, accident="", processes=1, **settings):
    """Start one run on both machines, whose run folders are `runs`: a torchrun on each."""
    options = [
        "--nnodes=2",
        f"--nproc-per-node={processes}",
        "--rdzv-backend=c10d",
        f"--rdzv-endpoint=10.77.0.1:{PORT}",
    ]
    options += [f"--rdzv-id={uuid.uuid4().hex}"]
    started = []
    for number, (machine, run) in enumerate(zip(machines, runs, strict=True), 1):
        # By itself torchrun asks the resolver whether the endpoint is this machine, which a namespace shares with the other.
        own = ["--local-addr", f"10.77.0.{number}", "--rdzv-conf", f"is_host={number % 2}"]
        command = ["ip", "netns", "exec", machine, sys.executable, "-m", "torch.distributed.run", *options, *own]
        command += [WORKER, str(run), accident, json.dumps(settings)]
        place = environment(GLOO_SOCKET_IFNAME="eth0")
        started.append(subprocess.Popen(command, env=place, stderr=subprocess.PIPE, text=True))
    return started


def ends(started):
    """Exit codes of the torchruns, and what they said."""
    said = [process.communicate(timeout=100)[1] for process in started]
    return [process.returncode for process in started], said


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    run = tmp_path_factory.mktemp("alone") / "run"
    begin(run, engine=TinyEngine(dropout=0.0)).run()
    return run


def until(holds, seconds=90.0):
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def children(started):
    """Processes that the torchruns started and that work; a torchrun may notice their end later than we do."""
    for process in started:
        for task in Path(f"/proc/{process.pid}/task").glob("*/children"):
            for child in task.read_text().split():
                with suppress(OSError):
                    if "State:\tZ" not in Path(f"/proc/{child}/status").read_text():
                        yield child


def names(run):
    return sorted(path.name for path in run.iterdir() if not path.name.startswith("."))


def test_two_machines_with_disks_of_their_own_each_write_the_same_checkpoints(machines, alone, tmp_path):
    runs = [tmp_path / "a", tmp_path / "b"]
    for run in runs:
        run.mkdir()
    codes, said = ends(train(machines, runs, train={"save_on_each_node": True}))
    assert codes == [0, 0], said
    assert same(alone, runs[0])
    first = next(run for run in runs if (run / "metrics.jsonl").exists())
    second = next(run for run in runs if run != first)
    assert not (second / "metrics.jsonl").exists(), "one curve a run, where rank 0 is"
    assert [f.name for f in checkpoints(second)] == [f.name for f in checkpoints(first)] != []
    for one, other in zip(checkpoints(first), checkpoints(second), strict=True):
        assert verify(other) == [] and names(one) == names(other)
        files = [name for name in names(one) if name.endswith((".safetensors", "state.json"))]
        assert len(files) == 3
        assert all((one / name).read_bytes() == (other / name).read_bytes() for name in files)
    assert names(second / "adapter") == names(first / "adapter")
    assert sum(text.count("step 2/18  epoch") for text in said) == 1, "one progress line in all"


def test_two_machines_with_one_disk_write_one_folder_and_survive_a_lost_process(machines, alone, tmp_path):
    runs, begun = [tmp_path / "run", tmp_path / "run"], time.monotonic()
    codes, said = ends(train(machines, runs, "SIGKILL"))
    assert time.monotonic() - begun < 90
    assert codes == [1, 1], said  # torchrun's own code; those of the processes are in what it says
    together = "".join(said)
    assert "another process of this run is gone" in together and ": -9" in together and ": 75" in together
    assert [f.name for f in checkpoints(runs[0])][-1] == "checkpoint-6"
    codes, said = ends(train(machines, runs))
    assert codes == [0, 0], said
    assert same(alone, runs[0]) and [line["step"] for line in curve(runs[0])] == [line["step"] for line in curve(alone)]
    assert names(tmp_path) == ["run"]
    assert Path(runs[0] / "adapter" / "adapter_model.safetensors").is_file()


@pytest.mark.slow
def test_a_machine_that_vanishes_without_a_word_ends_the_run_of_the_others_within_a_minute(machines, tmp_path):
    run = tmp_path / "run"
    started = train(machines, [run, run], "slow", train={"save_steps": 100})
    until(lambda: (run / "metrics.jsonl").exists() and len(curve(run)) >= 3)
    cut = time.monotonic()
    subprocess.run(["ip", "-n", machines[0], "link", "set", "eth0", "down"], check=True)
    try:
        until(lambda: not list(children(started)))
        assert time.monotonic() - cut < 60
    finally:
        subprocess.run(["ip", "-n", machines[0], "link", "set", "eth0", "up"], check=True)
    codes, said = ends(started)
    assert all(codes), said
    assert all("another process of this run is gone" in text for text in said), said
    assert any(": 75" in text for text in said), said  # the other torchrun may only tell of its lost rendezvous
    saved = checkpoints(run)[-1]
    assert verify(saved) == [] and saved.name == f"checkpoint-{curve(run)[-1]['step']}", "what was done is kept"
