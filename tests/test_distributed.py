"""Several processes work on one run: the same adapter as one, and what happens to one of them is known to all."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from lorikit.train.checkpoint import checkpoints, verify
from lorikit.train.distributed import Ranks, deal
from test_loop import adapter_bytes, begin, curve, lines
from tiny_engine import TinyEngine
from tiny_model import save_model

TESTS = Path(__file__).resolve().parent
WORKER = str(TESTS / "rank_worker.py")


def environment(**more):
    paths = [str(TESTS.parent / "src"), str(TESTS)]
    return os.environ | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"} | more


def torchrun(run, count, accident="", *options, **settings):
    """One run of the tiny engine in `count` processes; exit codes of the processes that failed by rank, and stderr."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}", *options]
    command += [WORKER, str(run), accident, json.dumps(settings)]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, check=False, timeout=280)
    found = re.findall(r"rank\s+: \d+ \(local_rank: (\d+)\)\s+exitcode\s+: (-?\d+)", done.stderr)
    codes = {int(rank): int(code) for rank, code in found}
    assert bool(codes) == bool(done.returncode), done.stderr
    return codes, done.stderr


def same(one, other, tolerance=1e-6):
    a, b = (load_file(run / "adapter" / "adapter_model.safetensors") for run in (one, other))
    return a.keys() == b.keys() and all((a[name] - b[name]).abs().max() <= tolerance for name in a)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The run of one process, without dropout."""
    run = tmp_path_factory.mktemp("alone") / "run"
    begin(run, engine=TinyEngine(dropout=0.0)).run()
    return run


def close(left, right):
    """Two curves: the same lines, numbers to float32's rounding."""
    assert [line.keys() for line in left] == [line.keys() for line in right]
    for a, b in zip(left, right, strict=True):
        assert a == pytest.approx(b, rel=1e-5)
    return True


@given(st.lists(st.integers(1, 5000), max_size=40), st.integers(1, 9))
def test_every_row_is_dealt_to_one_rank_and_no_rank_waits_for_more_than_one_row(lengths, parts):
    shares = deal(lengths, parts)
    assert sorted(k for share in shares for k in share) == list(range(len(lengths)))
    assert len(shares) == parts and all(share == sorted(share) for share in shares)
    loads = [sum(lengths[k] for k in share) for share in shares]
    assert max(loads) - min(loads) <= max(lengths, default=0)


def test_alone_nothing_is_exchanged():
    ranks = Ranks()
    assert not ranks.active and ranks.first
    assert ranks.numbers(1.5, 2.0) == [(1.5, 2.0)] and ranks.text({"a": 1}) == {"a": 1}
    assert ranks.share("abc", [3, 1, 2]) == ["a", "b", "c"]


def test_three_processes_give_the_adapter_and_the_curve_of_one(alone, tmp_path):
    codes, said = torchrun(tmp_path / "run", 3)  # the last step of an epoch has two rows: one process gets none
    assert codes == {}
    assert same(alone, tmp_path / "run")
    assert close(curve(alone), curve(tmp_path / "run"))
    assert [f.name for f in checkpoints(tmp_path / "run")] == [f.name for f in checkpoints(alone)]
    assert said.count("step 2/18") == 1, "one progress line"


def test_one_process_under_torchrun_is_byte_identical_with_dropout(tmp_path):
    begin(tmp_path / "plain", engine=TinyEngine(dropout=0.1)).run()
    assert torchrun(tmp_path / "run", 1, dropout=0.1)[0] == {}
    assert adapter_bytes(tmp_path / "plain") == adapter_bytes(tmp_path / "run")
    assert curve(tmp_path / "plain") == curve(tmp_path / "run")


def test_a_signal_to_one_process_stops_all_and_one_process_goes_on(alone, tmp_path):
    run = tmp_path / "run"
    codes, said = torchrun(run, 2, "SIGTERM")
    assert set(codes.values()) == {75}
    assert re.search(r"stopped by SIGTERM after step \d+; saved \S+checkpoint-\d+: the same command goes on", said)
    assert said.count("stopped by SIGTERM") == 1
    begin(run, engine=TinyEngine(dropout=0.0)).run()
    assert same(alone, run) and close(curve(alone), curve(run))


def test_a_killed_process_leaves_a_checkpoint_of_the_last_step_and_three_go_on(alone, tmp_path):
    run = tmp_path / "run"
    begun = time.monotonic()
    codes, said = torchrun(run, 2, "SIGKILL")
    assert time.monotonic() - begun < 60
    assert codes == {0: 75, 1: -9}
    assert re.search(r"another process of this run is gone \(its connection broke\) after step 6; saved \S+-6", said)
    assert all(verify(folder) == [] for folder in checkpoints(run))
    assert torchrun(run, 3)[0] == {}
    assert same(alone, run) and close(curve(alone), curve(run))


def test_torchrun_restarts_them_and_the_run_ends_as_if_nothing_had_been(alone, tmp_path):
    codes, said = torchrun(tmp_path / "run", 2, "SIGKILL once", "--max-restarts=1")
    assert codes == {} and "going on with" in said
    assert same(alone, tmp_path / "run") and close(curve(alone), curve(tmp_path / "run"))


def test_a_process_short_of_memory_takes_smaller_forwards_for_all(alone, tmp_path):
    codes, said = torchrun(tmp_path / "run", 2, "little memory")
    assert codes == {} and "[rank 1] out of memory at" in said
    assert same(alone, tmp_path / "run")
    states = [json.loads((f / "state.json").read_text())["max_tokens"] for f in checkpoints(tmp_path / "run")]
    assert states[0] == 256 > states[-1]


@pytest.mark.parametrize(
    ("accident", "code", "words"),
    [
        ("no memory", 6, r"lorikit: step 7, rank 1: tiny.json:\d+: one row of .* does not fit .*checkpoint-6"),
        ("NaN", 5, r"lorikit: step 7: the loss is nan"),
    ],
)
def test_what_one_process_cannot_do_ends_all_with_its_code_and_one_message(accident, code, words, tmp_path):
    codes, said = torchrun(tmp_path / "run", 2, accident)
    assert codes == {0: code, 1: code}
    assert len(re.findall("lorikit: ", said)) == 1 and re.search(words, said), said
    assert max(line["step"] for line in lines(tmp_path / "run")) == 6


def command(tmp_path, *arguments):
    rows = [{"instruction": f"what is {n}", "input": "", "output": "one two"[: n % 7 + 1]} for n in range(24)]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    base = save_model(tmp_path / "base")
    (tmp_path / "run.yaml").write_text(
        f"model: {{name_or_path: {base}}}\ndata: {{train: {tmp_path / 'rows.json'}}}\n"
        f"train: {{output_dir: {tmp_path / 'run'}, max_steps: 4, logging_steps: 2}}\n"
        "eval: {eval_size: 4, prompts: [what is 3], max_new_tokens: 3}\n"
    )
    return [sys.executable, "-m", "lorikit", "train", str(tmp_path / "run.yaml"), "--no-compare", *arguments]


def test_the_command_line_starts_the_processes_and_speaks_with_one_voice(tmp_path):
    given = command(tmp_path, "--gpus", "2", "--json")
    done = subprocess.run(given, env=environment(), capture_output=True, text=True, check=False, timeout=280)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {"run": str(tmp_path / "run"), "adapter": str(tmp_path / "run" / "adapter")}
    assert done.stderr.count("2 processes share the rows of each step") == 1
    assert (
        done.stderr.count("step 2/4  epoch") == 1 and done.stderr.count("what is 3 ->") == 2
    )  # at step 2 and at the end
    assert "torch" not in done.stderr.replace(str(tmp_path), "")
    again = subprocess.run(given, env=environment(), capture_output=True, text=True, check=False, timeout=280)
    assert again.returncode == 0 and again.stderr.count("is finished") == 1
    wrong = subprocess.run(
        [*given[:-1], "--lora.r", "3"], env=environment(), capture_output=True, text=True, check=False
    )
    assert wrong.returncode == 2
    assert wrong.stderr.count("was trained with other settings") == 1 and "Traceback" not in wrong.stderr


def test_a_signal_to_the_command_reaches_every_process(tmp_path):
    given = command(tmp_path, "--gpus", "2", "--train.max_steps", "100000")
    with subprocess.Popen(given, env=environment(), stderr=subprocess.PIPE, text=True) as process:
        said = ""
        while "step 2/" not in said:
            said += process.stderr.readline()
        process.send_signal(signal.SIGTERM)
        said += process.stderr.read()
    assert process.returncode == 75, said
    assert said.count("stopped by SIGTERM after step") == said.count("lorikit: ") == 1, said
    assert "Traceback" not in said and checkpoints(tmp_path / "run"), said
    assert all(verify(folder) == [] for folder in checkpoints(tmp_path / "run"))


@pytest.mark.parametrize("count", ["0", "-3"])
def test_a_number_of_gpus_that_cannot_be_is_refused(count, tmp_path, lorikit):
    code, _, said = lorikit(*command(tmp_path, "--gpus", count)[3:])
    assert code == 2 and f"lorikit: --gpus is {count}; this machine has" in said
