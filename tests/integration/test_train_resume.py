"""Real processes that are killed, stopped, starved of disk and set on a bad learning rate, on a real (tiny, random) Llama.

Importing torch, transformers and peft takes seconds, so most processes are forks of one that has imported them and
has done nothing else; each runs the whole `lorikit train`.
"""

import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

NUM_KILLS = 40
NUM_ROWS = 20


@pytest.fixture(scope="module")
def trainer():
    """Starts `lorikit train` in a fork: trainer(arguments, log, file_limit) -> pid; trainer.wait(pid) -> exit status."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "NO_COLOR": "1"}
    server = subprocess.Popen(
        [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    )

    class Trainer:
        def start(self, arguments, log, file_limit=None):
            self.log = log
            server.stdin.write(json.dumps([arguments, str(log), file_limit]) + "\n")
            server.stdin.flush()
            self.pid = int(server.stdout.readline())
            return self.pid

        def wait(self):
            """The exit code, negative for a signal, as subprocess has it."""
            return int(server.stdout.readline())

        def run(self, arguments, log, **limits):
            self.start(arguments, log, **limits)
            return self.wait()

    yield Trainer()
    server.stdin.close()
    server.wait(timeout=60)


def serve():
    """Read [arguments, log, file_limit] lines, fork a training for each, print its pid and then its exit code."""
    import peft  # noqa: F401
    import transformers  # noqa: F401
    from transformers.models.llama import modeling_llama  # noqa: F401

    import lorikit.train.loop  # noqa: F401
    from lorikit.cli import main

    for line in sys.stdin:
        arguments, log, file_limit = json.loads(line)
        pid = os.fork()
        if pid == 0:
            output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(output, 1)
            os.dup2(output, 2)
            if file_limit:
                resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, file_limit))
            sys.argv = ["lorikit", "train", *arguments]
            code = 1
            try:
                main()
                code = 0
            except SystemExit as end:
                code = end.code or 0
            except BaseException:
                sys.excepthook(*sys.exc_info())
            finally:
                os._exit(code)
        print(pid, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    """The YAML file of a run of 15 steps that saves at every step, evaluates at every fifth and answers a prompt there."""
    from tiny_model import save_model

    folder = tmp_path_factory.mktemp("recipe")
    save_model(folder / "model", longest=512)
    rows = [
        {"instruction": f"Count to {number}.", "input": "", "output": " ".join(map(str, range(1, number + 1)))}
        for number in range(1, NUM_ROWS + 1)
    ]
    (folder / "rows.json").write_text(json.dumps(rows))
    settings = {
        "model": {"name_or_path": str(folder / "model"), "device": "cpu"},
        "data": {"train": str(folder / "rows.json"), "max_length": 400},
        "lora": {"r": 4, "lora_dropout": 0.1},
        "train": {
            "output_dir": "unset",
            "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": 2,
            "num_train_epochs": 3,
            "learning_rate": 0.01,
            "save_steps": 1,
            "logging_steps": 1,
            "max_tokens_per_forward": 300,
        },
        "eval": {"eval_size": 0.1, "prompts": ["Count to 3."], "max_new_tokens": 4},
    }
    (folder / "run.yaml").write_text(json.dumps(settings))  # JSON is YAML
    return folder / "run.yaml"


def arguments(recipe, run, *more):
    return [str(recipe), "--no-compare", "--train.output-dir", str(run), *more]


@pytest.fixture(scope="module")
def whole(trainer, recipe, tmp_path_factory):
    """The uninterrupted run: its adapter's bytes, and the seconds it takes."""
    run = tmp_path_factory.mktemp("whole") / "run"
    log = run.parent / "log"
    for _ in range(2):  # the first fork also fills caches
        begun = time.perf_counter()
        subprocess.run(["rm", "-rf", str(run)], check=True)
        assert trainer.run(arguments(recipe, run), log) == 0, log.read_text()
        seconds = time.perf_counter() - begun
    return adapter_bytes(run), seconds


def adapter_bytes(run):
    return (run / "adapter" / "adapter_model.safetensors").read_bytes()


def steps_logged(run):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line["step"] for line in lines if "loss" in line]


def assert_usable(run):
    """Every folder that is called a checkpoint is whole, and so is everything else that has its final name."""
    from lorikit.config import load_config
    from lorikit.train.checkpoint import checkpoints, verify

    assert {folder.name: verify(folder) for folder in checkpoints(run) if verify(folder)} == {}
    if (run / "config.yaml").exists():
        load_config(run / "config.yaml")
    if (run / "adapter").exists():
        assert {"adapter_model.safetensors", "adapter_config.json", "README.md", "tokenizer.json"} <= {
            path.name for path in (run / "adapter").iterdir()
        }


def test_forty_kills_at_random_times_leave_no_unusable_run_and_change_no_byte(trainer, recipe, whole, tmp_path):
    wanted, seconds = whole
    chance = random.Random(7)
    kills, runs, writing = 0, 0, 0
    while kills < NUM_KILLS:
        runs += 1
        run, log = tmp_path / f"run{runs}", tmp_path / f"log{runs}"
        code = -signal.SIGKILL
        while code == -signal.SIGKILL:
            pid = trainer.start(arguments(recipe, run), log)
            if kills < NUM_KILLS:
                time.sleep(chance.uniform(0, seconds))
                try:
                    os.kill(pid, signal.SIGKILL)
                except ProcessLookupError:
                    assert is_done(run)
            code = trainer.wait()
            kills += code == -signal.SIGKILL
            writing += any(run.glob(".staging*"))
            assert_usable(run)
        assert code == 0, log.read_text()
        assert adapter_bytes(run) == wanted
        assert steps_logged(run) == list(range(1, 16))
        assert not list(run.glob(".staging*"))
    assert kills >= NUM_KILLS and runs >= 2
    print(f"{kills} kills in {runs} runs, {writing} of them in the middle of a write, 0 unusable")


def test_a_kill_in_the_comparison_leaves_a_finished_run_which_the_same_command_compares(
    trainer, recipe, whole, tmp_path
):
    run, log = tmp_path / "run", tmp_path / "log"
    compared = [str(recipe), "--train.output-dir", str(run)]
    for share in (0.0, 0.3):
        pid = trainer.start(compared, log)
        wait_for(run / "adapter", log)
        time.sleep(share * whole[1])
        os.kill(pid, signal.SIGKILL)
        assert trainer.wait() == -signal.SIGKILL, log.read_text()
        assert_usable(run)
        assert adapter_bytes(run) == whole[0]
    assert trainer.run(compared, log) == 0, log.read_text()
    assert json.loads((run / "compare.json").read_text())["verdict"] and (run / "report.html").is_file()
    assert adapter_bytes(run) == whole[0] and steps_logged(run) == list(range(1, 16))


def is_done(run):
    return (run / "adapter").exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_exits_75_and_the_same_command_finishes_to_the_same_bytes(trainer, recipe, whole, tmp_path, number):
    run, log = tmp_path / "run", tmp_path / "log"
    codes = []
    for step in (3, 10):
        pid = trainer.start(arguments(recipe, run), log)
        wait_for(run / f"checkpoint-{step}", log)
        os.kill(pid, number)
        codes.append(trainer.wait())
    assert codes == [75, 75], log.read_text()
    assert f"stopped by {number.name} after step" in log.read_text() and "Traceback" not in log.read_text()
    assert trainer.run(arguments(recipe, run), log) == 0, log.read_text()
    assert adapter_bytes(run) == whole[0] and steps_logged(run) == list(range(1, 16))


def test_a_signal_while_the_model_is_being_loaded_exits_75_and_leaves_a_usable_folder(trainer, recipe, whole, tmp_path):
    for number, share in enumerate((0.02, 0.1, 0.2)):
        run, log = tmp_path / f"run{number}", tmp_path / f"log{number}"
        pid = trainer.start(arguments(recipe, run), log)
        wait_for(run / ".lock", log)
        time.sleep(share * whole[1])
        os.kill(pid, signal.SIGTERM)
        assert trainer.wait() == 75, log.read_text()
        assert "Traceback" not in log.read_text()
    assert trainer.run(arguments(recipe, run), log) == 0, log.read_text()
    assert adapter_bytes(run) == whole[0]


def test_a_finished_run_says_so_and_nothing_in_it_changes(trainer, recipe, tmp_path):
    run, log = tmp_path / "run", tmp_path / "log"
    assert trainer.run(arguments(recipe, run), log) == 0
    before = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in run.rglob("*") if path.is_file()}
    assert trainer.run(arguments(recipe, run), tmp_path / "again") == 0
    assert {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in run.rglob("*") if path.is_file()} == before
    assert f"{run} is finished" in (tmp_path / "again").read_text()
    assert trainer.run(arguments(recipe, run, "--lora.r", "8"), tmp_path / "other") == 2
    assert "lora.r: 4 -> 8" in (tmp_path / "other").read_text()


def test_a_learning_rate_that_breaks_the_model_exits_5_and_names_step_and_rows(trainer, recipe, tmp_path):
    run, log = tmp_path / "run", tmp_path / "log"
    assert trainer.run(arguments(recipe, run, "--train.learning-rate", "1e30"), log) == 5, log.read_text()
    assert "the loss is" in log.read_text() and "rows.json:" in log.read_text() and "Traceback" not in log.read_text()
    assert_usable(run)
    assert not is_done(run)


def test_a_disk_without_room_exits_7_with_the_last_checkpoint_whole_and_can_be_resumed(
    trainer, recipe, whole, tmp_path
):
    run, log = tmp_path / "run", tmp_path / "log"
    pid = trainer.start(arguments(recipe, run), log)
    wait_for(run / "checkpoint-5", log)
    os.kill(pid, signal.SIGTERM)
    assert trainer.wait() == 75
    saved = sorted(path.name for path in run.glob("checkpoint-*"))
    assert trainer.run(arguments(recipe, run), log, file_limit=10_000) == 7, log.read_text()
    assert "cannot be written: " in log.read_text() and "Traceback" not in log.read_text()
    assert sorted(path.name for path in run.glob("checkpoint-*")) == saved and not list(run.glob(".staging*"))
    assert_usable(run)
    assert trainer.run(arguments(recipe, run), log) == 0, log.read_text()
    assert adapter_bytes(run) == whole[0]


def test_the_command_itself_trains_and_two_of_them_on_one_run_do_not_mix(recipe, whole, tmp_path):
    command = [sys.executable, "-m", "lorikit", "train", *arguments(recipe, tmp_path / "run")]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    first = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
    wait_for(tmp_path / "run" / ".lock", None)
    second = subprocess.run(command, stderr=subprocess.PIPE, text=True, env=environment, check=False)
    _, log = first.communicate()
    assert first.returncode == 0, log
    assert adapter_bytes(tmp_path / "run") == whole[0]
    assert (second.returncode == 2 and "in use by another process" in second.stderr) or "is finished" in second.stderr


def wait_for(path: Path, log):
    end = time.monotonic() + 60
    while not path.exists():
        assert time.monotonic() < end, log.read_text() if log else f"{path} did not appear"
        time.sleep(0.002)


if __name__ == "__main__":
    serve()
