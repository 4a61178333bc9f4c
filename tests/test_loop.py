import fcntl
import io
import json
import math
import os
import shutil
import signal
import threading
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from lorikit.config import RunConfig, load_config
from lorikit.data.audit import fingerprint
from lorikit.data.values import Example
from lorikit.errors import ConfigError, DataError, DiskError, DivergedError, Interrupted, ModelError, OutOfMemoryError
from lorikit.model.engine import Sampling
from lorikit.train.checkpoint import checkpoints, read_state, verify
from lorikit.train.progress import Report
from lorikit.train.run_folder import environment, is_finished, open_run, write_config
from lorikit.train.signals import Signals
from lorikit.train.training import Training
from tiny_engine import VOCABULARY, TinyEngine, tiny_rows

ROWS, HELD_OUT = tiny_rows(22), tiny_rows(6, seed=1)


def settings(run, **groups):
    train = {
        "output_dir": str(run),
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "num_train_epochs": 3,
        "learning_rate": 0.1,
        "logging_steps": 2,
        "save_steps": 4,
        "save_total_limit": None,
    }
    tree = {"model": {"name_or_path": "m"}, "data": {"train": "d"}, "eval": {}, **groups}
    return RunConfig.model_validate(tree | {"train": train | groups.get("train", {})})


class Words:
    """An encoder of the tiny engine's vocabulary, one letter a token."""

    stop_ids = frozenset({1})

    def save_tokenizer(self, folder):
        (folder / "tokenizer.json").write_text("{}")

    def prompt_ids(self, messages):
        return [2 + (ord(letter) - ord("a")) % (VOCABULARY - 2) for letter in messages[-1].content]

    def decode(self, ids):
        return "".join(chr(ord("a") + i - 2) for i in ids)


def begin(run, config=None, engine=None, rows=ROWS, held_out=HELD_OUT, **options):
    run.mkdir(exist_ok=True)
    report = Report(Console(file=io.StringIO(), width=200))
    training = Training(
        config or settings(run), run, engine or TinyEngine(), rows, held_out=held_out, report=report, **options
    )
    training.restore()
    return training


def lines(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def curve(run):
    """metrics.jsonl without what depends on the clock and on the process."""
    clock = {"seconds", "tokens_per_second", "peak_memory_bytes"}
    return [{key: value for key, value in line.items() if key not in clock} for line in lines(run)]


def adapter_bytes(run):
    return (run / "adapter" / "adapter_model.safetensors").read_bytes()


class StopAfter(TinyEngine):
    """Sends this process a signal in the middle of forward number `forward` or evaluation number `evaluation`."""

    def __init__(self, forward=None, evaluation=None, number=signal.SIGTERM):
        super().__init__()
        self.forwards, self.evaluations, self.number = 0, 0, number
        self.forward, self.evaluation = forward, evaluation

    def loss_sum(self, batch):
        self.forwards += 1
        if self.forwards == self.forward:
            os.kill(os.getpid(), self.number)
        return super().loss_sum(batch)

    def token_losses(self, batch):
        self.evaluations += 1
        if self.evaluations == self.evaluation:
            os.kill(os.getpid(), self.number)
        return super().token_losses(batch)


def test_a_run_learns_and_leaves_metrics_checkpoints_and_an_adapter(tmp_path):
    run = tmp_path / "run"
    training = begin(run)
    training.run()
    logged = [line for line in lines(run) if "loss" in line]
    assert [line["step"] for line in logged] == [2, 4, 6, 8, 10, 12, 14, 16, 18]
    assert logged[-1]["loss"] < 0.75 * logged[0]["loss"]
    assert logged[-1]["epoch"] == 3.0
    assert logged[-1]["tokens"] == 3 * sum(len(row.input_ids) for row in ROWS)
    assert logged[-1]["labelled_tokens"] == 3 * sum(len(row.input_ids) - 2 for row in ROWS)
    assert logged[0]["learning_rate"] == pytest.approx(0.1 * 17 / 18)
    assert all(line["tokens_per_second"] > 0 and line["grad_norm"] > 0 for line in logged)
    evaluated = [line for line in lines(run) if "eval_loss" in line]
    assert [line["step"] for line in evaluated] == [6, 12, 18]
    assert all(math.exp(line["eval_loss"]) == pytest.approx(line["eval_perplexity"]) for line in evaluated)
    assert [folder.name for folder in checkpoints(run)] == [f"checkpoint-{step}" for step in (4, 6, 8, 12, 16, 18)]
    assert all(verify(folder) == [] for folder in checkpoints(run))
    assert is_finished(run) and load_config(run / "config.yaml") == settings(run)
    assert load_file(run / "adapter" / "adapter_model.safetensors").keys() == set(training.engine.parameter_names())
    assert not list(run.glob(".staging*"))


def test_the_same_seed_gives_the_same_bytes_and_another_seed_others(tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        begin(tmp_path / name, settings(tmp_path / name, train={"seed": seed})).run()
        torch.rand(17)
    assert adapter_bytes(tmp_path / "a") == adapter_bytes(tmp_path / "b") != adapter_bytes(tmp_path / "c")
    assert curve(tmp_path / "a") == curve(tmp_path / "b")


def test_four_by_four_is_sixteen_by_one(tmp_path):
    adapters = []
    for name, batch, accumulation in (("a", 4, 4), ("b", 16, 1), ("c", 1, 16)):
        sizes = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulation}
        begin(tmp_path / name, settings(tmp_path / name, train=sizes)).run()
        adapters.append(adapter_bytes(tmp_path / name))
    assert adapters[0] == adapters[1] == adapters[2]


def test_evaluating_and_answering_do_not_change_what_is_trained(tmp_path):
    for name, evaluation in (
        ("a", {"eval_steps": 1, "prompts": ["ab", "xyz"], "max_new_tokens": 5}),
        ("b", {"eval_steps": 99}),
    ):
        config = settings(tmp_path / name, eval=evaluation | {"load_best_model_at_end": False})
        training = begin(tmp_path / name, config, encoder=Words())
        training.run()
    assert adapter_bytes(tmp_path / "a") == adapter_bytes(tmp_path / "b")
    greedy = Sampling(max_new_tokens=5, temperature=0.0)
    said = [token.id for token in training.engine.generate([[2, 3]], greedy, frozenset({1})) if token.finish != "stop"]
    evaluated = [line for line in lines(tmp_path / "a") if "eval_loss" in line]
    assert len(evaluated) == 18 and [answer["prompt"] for answer in evaluated[0]["answers"]] == ["ab", "xyz"]
    assert evaluated[-1]["answers"][0]["answer"] == Words().decode(said)
    assert (tmp_path / "a" / "adapter" / "tokenizer.json").exists()


def test_prompts_are_answered_also_without_held_out_rows(tmp_path):
    run = tmp_path / "run"
    begin(run, settings(run, eval={"prompts": ["a"]}), held_out=(), encoder=Words()).run()
    answered = [line for line in lines(run) if "answers" in line]
    assert len(answered) == 3 and "eval_loss" not in answered[0]
    assert [folder.name for folder in checkpoints(run)] == [f"checkpoint-{step}" for step in (4, 8, 12, 16, 18)]


@pytest.mark.parametrize("forward", [1, 3, 5, 6, 7, 12, 17])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_finishes_the_step_and_the_resumed_run_gives_the_same_bytes_and_the_same_curve(
    tmp_path, forward, number
):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    evaluation = {"prompts": ["abc"], "max_new_tokens": 4}
    begin(whole, settings(whole, eval=evaluation), encoder=Words()).run()
    with Signals() as signals:
        training = begin(
            cut, settings(cut, eval=evaluation), StopAfter(forward, number=number), encoder=Words(), signals=signals
        )
        with pytest.raises(
            Interrupted, match=rf"{number.name} after step {forward}; saved .*checkpoint-{forward}: the same"
        ):
            training.run()
    assert checkpoints(cut)[-1].name == f"checkpoint-{forward}" and verify(checkpoints(cut)[-1]) == []
    begin(cut, settings(cut, eval=evaluation), encoder=Words()).run()
    assert adapter_bytes(cut) == adapter_bytes(whole)
    assert curve(cut) == curve(whole)


@pytest.mark.parametrize("evaluation", [1, 2, 3])
def test_a_signal_during_an_evaluation_leaves_it_to_the_resumed_run(tmp_path, evaluation):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    small = {"max_tokens_per_forward": 20}  # several forwards in an evaluation
    begin(whole, settings(whole, train=small)).run()
    with Signals() as signals:
        training = begin(cut, settings(cut, train=small), StopAfter(evaluation=evaluation), signals=signals)
        with pytest.raises(Interrupted, match="after step 6"):
            training.run()
    whole_evaluation_done = evaluation == 3
    assert read_state(cut / "checkpoint-6").settled is whole_evaluation_done
    assert sum("eval_loss" in line for line in lines(cut)) == whole_evaluation_done
    begin(cut, settings(cut, train=small)).run()
    assert adapter_bytes(cut) == adapter_bytes(whole) and curve(cut) == curve(whole)


@pytest.mark.parametrize("keep", [4, 6, 8, 12, 16, 18])
def test_a_run_killed_after_any_checkpoint_resumes_to_the_same_bytes(tmp_path, keep):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    begin(whole).run()
    expected = curve(whole)
    begin(cut).run()
    shutil.rmtree(cut / "adapter")
    for folder in checkpoints(cut):
        if int(folder.name[11:]) > keep:
            shutil.rmtree(folder)
    with (cut / "metrics.jsonl").open("a") as file:
        file.write('{"step": 99, "los')
    begin(cut).run()
    assert adapter_bytes(cut) == adapter_bytes(whole) and curve(cut) == expected


def test_a_damaged_newest_checkpoint_is_passed_over_and_written_again(tmp_path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    begin(whole).run()
    begin(cut).run()
    shutil.rmtree(cut / "adapter")
    (cut / "checkpoint-18" / "optimizer.safetensors").write_bytes(b"")
    training = begin(cut)
    training.run()
    shown = training.report.console.file.getvalue()
    assert "passed over" in shown and "checkpoint-18: optimizer.safetensors has 0 bytes" in shown
    assert "going on with" in shown and "checkpoint-16" in shown
    assert verify(cut / "checkpoint-18") == [] and (cut / "damaged-checkpoint-18").exists()
    assert adapter_bytes(cut) == adapter_bytes(whole)


def overfitting(run, **evaluation):
    """Rows without a rule, so that the held-out loss falls and rises again."""
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(2, VOCABULARY, (12, 8), generator=generator).tolist()
    rows = [Example(row, row, f"noise.json:{number}") for number, row in enumerate(ids)]
    config = settings(
        run,
        train={"num_train_epochs": 20, "learning_rate": 0.1, "save_steps": 1000, "save_total_limit": 1},
        eval={"eval_steps": 1, **evaluation},
    )
    return config, rows[:8], [*rows[8:], *rows[:2]]


def test_the_adapter_is_that_of_the_lowest_held_out_loss_and_its_checkpoint_is_kept(tmp_path):
    run, last = tmp_path / "run", tmp_path / "last"
    config, rows, held_out = overfitting(run)
    begin(run, config, rows=rows, held_out=held_out).run()
    losses = {line["step"]: line["eval_loss"] for line in lines(run) if "eval_loss" in line}
    best = min(losses, key=losses.get)
    assert best < 40 and {folder.name for folder in checkpoints(run)} == {f"checkpoint-{best}", "checkpoint-40"}
    assert adapter_bytes(run) == (run / f"checkpoint-{best}" / "adapter_model.safetensors").read_bytes()
    config, rows, held_out = overfitting(last, load_best_model_at_end=False)
    begin(last, config, rows=rows, held_out=held_out).run()
    assert (
        adapter_bytes(last) == (run / "checkpoint-40" / "adapter_model.safetensors").read_bytes() != adapter_bytes(run)
    )


def test_a_damaged_best_checkpoint_is_an_error_and_not_quietly_another_adapter(tmp_path):
    run = tmp_path / "run"
    config, rows, held_out = overfitting(run)
    begin(run, config, rows=rows, held_out=held_out).run()
    shutil.rmtree(run / "adapter")
    best, last = checkpoints(run)
    (best / "state.json").unlink()
    with pytest.raises(ModelError, match=rf"{best.name} is damaged: state.json is missing; restore it, or delete"):
        begin(run, config, rows=rows, held_out=held_out).run()
    assert not is_finished(run) and verify(last) == []


def test_early_stopping_counts_evaluations_without_a_lower_loss_also_over_a_resume(tmp_path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    config, rows, held_out = overfitting(whole, early_stopping_patience=3)
    begin(whole, config, rows=rows, held_out=held_out).run()
    evaluated = [line for line in lines(whole) if "eval_loss" in line]
    assert len(evaluated) < 40 and [line["best"] for line in evaluated[-4:]] == [True, False, False, False]
    config, rows, held_out = overfitting(cut, early_stopping_patience=3)
    with Signals() as signals:
        engine = StopAfter(forward=len(evaluated) - 1)
        with pytest.raises(Interrupted):
            begin(cut, config, engine, rows=rows, held_out=held_out, signals=signals).run()
    begin(cut, config, rows=rows, held_out=held_out).run()
    assert adapter_bytes(cut) == adapter_bytes(whole) and curve(cut) == curve(whole)


def test_a_loss_that_is_not_a_number_stops_before_it_is_applied_and_names_its_rows(tmp_path):
    class Diverging(TinyEngine):
        def loss_sum(self, batch):
            loss = super().loss_sum(batch)
            self.count = getattr(self, "count", 0) + 1
            self.before = self.adapter_state()
            return loss * float("nan") if self.count == 6 else loss

    run = tmp_path / "run"
    training = begin(run, engine=Diverging())
    with pytest.raises(DivergedError) as caught:
        training.run()
    message = str(caught.value)
    rows = [ROWS[row].source for row in training.plan.rows(5)]
    assert message.startswith("step 6: the loss is nan") and all(row in message for row in rows) and len(rows) == 2
    assert f"the last good checkpoint is {run / 'checkpoint-4'}" in message and "learning_rate" in message
    assert verify(run / "checkpoint-4") == [] and not is_finished(run)
    after = training.engine.adapter_state()
    assert all(torch.equal(after[name], value) for name, value in training.engine.before.items())


def test_an_infinite_gradient_under_a_finite_loss_stops_too(tmp_path):
    class Steep(TinyEngine):
        def loss_sum(self, batch):
            loss = super().loss_sum(batch)
            return loss + (self.lora_b.sum() * 1e38 - (self.lora_b.sum() * 1e38).detach()) * 1e3

    with pytest.raises(
        DivergedError, match=r"step 1: the loss is [0-9.]+, the gradient norm (inf|nan); .* no checkpoint yet"
    ):
        begin(tmp_path / "run", engine=Steep()).run()


def test_a_held_out_loss_that_is_not_a_number_stops_the_run(tmp_path):
    class Overflowing(TinyEngine):
        def token_losses(self, batch):
            return super().token_losses(batch) * float("inf")

    with pytest.raises(
        DivergedError, match=r"step 6: the held-out loss is inf; the last good checkpoint is .*checkpoint-4"
    ):
        begin(tmp_path / "run", engine=Overflowing()).run()


def test_an_adapter_that_the_last_step_ruined_is_not_saved(tmp_path):
    run = tmp_path / "run"
    training = begin(run, settings(run, train={"max_steps": 1, "learning_rate": 1e39}), held_out=())
    with pytest.raises(DivergedError, match="step 1: the adapter holds NaN or infinity; there is no checkpoint yet"):
        training.run()
    assert not is_finished(run) and checkpoints(run) == []


def test_running_out_of_memory_outside_a_forward_has_its_own_message(tmp_path):
    training = begin(tmp_path / "run")
    step = training.optimizer.step

    def refuse(*given):
        step(*given)
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate")

    training.optimizer.step = refuse
    with pytest.raises(
        OutOfMemoryError, match=r"step 1: out of memory outside .* \(CUDA out of memory\.\); there is no"
    ):
        training.run()


def test_running_out_of_memory_once_is_remembered_over_a_resume(tmp_path):
    class Small(StopAfter):
        def loss_sum(self, batch):
            if batch.num_tokens > 20:
                raise torch.OutOfMemoryError("out of memory")
            return super().loss_sum(batch)

    run = tmp_path / "run"
    with Signals() as signals, pytest.raises(Interrupted):
        begin(run, engine=Small(forward=8), signals=signals).run()
    (state,) = {read_state(checkpoints(run)[-1]).max_tokens}
    assert 10 < state <= 30
    training = begin(run, engine=Small())
    training.run()
    assert "out of memory" not in training.report.console.file.getvalue() and training.budget.max_tokens == state


def full_after(step, training):
    """For `training._adapter`: from a later step on its writes find no room."""
    adapter = training._adapter

    def without_room(folder):
        with Path("/dev/full").open("wb", buffering=0) as device:
            device.write(b"x")

    return lambda: adapter() if training.state.step <= step else without_room


def test_a_full_disk_ends_the_run_with_the_last_checkpoint_whole(tmp_path):
    run = tmp_path / "run"
    training = begin(run)
    training._adapter = full_after(4, training)
    with pytest.raises(DiskError, match=r"checkpoint-6 cannot be written: No space left on device"):
        training.run()
    assert [folder.name for folder in checkpoints(run)] == ["checkpoint-4"] and verify(run / "checkpoint-4") == []
    assert not list(run.glob(".staging*"))
    begin(run).run()
    assert is_finished(run)


def test_other_rows_than_the_run_began_with_are_refused(tmp_path):
    run = tmp_path / "run"
    begin(run).run()
    (run / "adapter").rename(tmp_path / "adapter")
    with pytest.raises(DataError, match="the rows are not those that this run began with"):
        begin(run, rows=[*ROWS[1:], ROWS[0]]).run()
    with pytest.raises(DataError):
        begin(run, held_out=HELD_OUT[1:]).run()
    moved = [Example(row.input_ids, row.labels, "elsewhere.json:1") for row in ROWS]
    begin(run, rows=moved).run()
    assert fingerprint(ROWS) == fingerprint(moved) != fingerprint([], ROWS)


def test_another_revision_of_the_base_is_refused(tmp_path):
    run = tmp_path / "run"
    begin(run, base_revision="aaa").run()
    (run / "adapter").rename(tmp_path / "adapter")
    with pytest.raises(ModelError, match=r"began with revision aaa .* now bbb; set model.revision"):
        begin(run, base_revision="bbb").run()


def test_a_signal_before_the_first_step_ends_at_once_with_nothing_to_save():
    for number in (signal.SIGTERM, signal.SIGINT):
        with Signals() as signals, pytest.raises(Interrupted, match=f"stopped by {number.name} before the first step"):
            os.kill(os.getpid(), number)
            for _ in range(1000):
                signals.check()


def test_a_signal_whose_exception_a_library_swallowed_is_seen_at_the_next_check():
    with Signals() as signals:
        with pytest.raises(Interrupted):
            os.kill(os.getpid(), signal.SIGTERM)
            for _ in range(1000):
                pass
        with pytest.raises(Interrupted):
            signals.defer()


def test_a_signal_that_a_library_took_for_an_error_of_its_own_still_ends_with_75():
    def load():
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            for _ in range(1000):
                pass
        except Exception as error:
            raise ModelError(f"cannot be loaded: {error}") from error

    with pytest.raises(Interrupted, match="stopped by SIGTERM before the first step"), Signals():
        load()
    with pytest.raises(ModelError, match="no such file"), Signals():
        raise ModelError("no such file")


def test_a_second_ctrl_c_ends_the_process_with_130():
    child = os.fork()
    if child == 0:
        with Signals() as signals:
            signals.defer()
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
            for _ in range(1000):
                pass
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 130


def test_signals_are_given_back_afterwards_and_left_alone_in_other_threads():
    before = signal.getsignal(signal.SIGTERM)
    with Signals():
        assert signal.getsignal(signal.SIGTERM) != before
    assert signal.getsignal(signal.SIGTERM) == before
    problems = []

    def other_thread():
        try:
            with Signals() as signals:
                signals.check()
        except Exception as error:
            problems.append(error)

    thread = threading.Thread(target=other_thread)
    thread.start()
    thread.join()
    assert problems == []


def test_a_folder_with_other_things_in_it_is_refused(tmp_path):
    (tmp_path / "thesis.tex").touch()
    with (
        pytest.raises(ConfigError, match=r"no run of lorikit but holds thesis.tex; name a new or an empty folder"),
        open_run(settings(tmp_path)),
    ):
        pass
    file = tmp_path / "thesis.tex"
    for path in (file, file / "run"):
        with pytest.raises(ConfigError, match="a file stands there"), open_run(settings(path)):
            pass
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.yaml").write_text("defaults: [base]\n")
    with pytest.raises(ConfigError, match="unknown setting defaults"), open_run(settings(tmp_path / "other")):
        pass


def test_a_folder_that_a_killed_process_only_just_made_can_be_used(tmp_path):
    (tmp_path / ".lock").touch()
    (tmp_path / ".staging-config.yaml").write_text("half")
    with open_run(settings(tmp_path)) as run:
        assert sorted(path.name for path in run.iterdir()) == [".lock"]


def test_a_kill_in_a_runs_very_last_write_leaves_nothing_but_what_a_comparison_may_be_staging(tmp_path):
    with open_run(settings(tmp_path)) as run:
        (run / "adapter").mkdir()
        write_config(run, settings(tmp_path))
    for name in ("environment.json", "compare.json"):
        (tmp_path / f".staging-{name}").write_text("half")
    with open_run(settings(tmp_path)) as run:
        assert [path.name for path in run.glob(".staging*")] == [".staging-compare.json"]


def test_two_processes_cannot_work_on_one_run(tmp_path):
    with (
        open_run(settings(tmp_path)),
        pytest.raises(ConfigError, match="in use by another process"),
        open_run(settings(tmp_path)),
    ):
        pass
    with open_run(settings(tmp_path)):
        pass
    with (tmp_path / ".lock").open() as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_other_settings_are_refused_once_there_is_work_and_each_is_named(tmp_path):
    run = tmp_path / "run"
    begin(run).run()
    changed = settings(run, lora={"r": 16}, train={"learning_rate": 1e-3, "logging_steps": 1, "save_steps": 9})
    with pytest.raises(ConfigError) as caught, open_run(changed):
        pass
    message = str(caught.value)
    assert "lora.r: 8 -> 16" in message and "train.learning_rate: 0.1 -> 0.001" in message
    assert "logging_steps" not in message and "save_steps" not in message and "another train.output_dir" in message
    with open_run(settings(run, train={"logging_steps": 1, "save_steps": 9, "save_total_limit": 3})):
        pass


def test_settings_may_change_as_long_as_nothing_was_trained(tmp_path):
    for rank in (8, 16):
        config = settings(tmp_path, lora={"r": rank})
        with open_run(config) as run:
            write_config(run, config)
    assert load_config(tmp_path / "config.yaml").lora.r == 16


def test_the_environment_names_versions_and_machine_but_neither_host_nor_user(tmp_path, monkeypatch):
    import getpass
    import platform

    home = tmp_path / "home" / "alice"
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setattr("sys.argv", [f"{home}/bin/lorikit", "train", f"{home}/run.yaml"])
    found = environment()
    assert found["command"] == "lorikit train ~/run.yaml"
    assert found["packages"]["torch"] == torch.__version__
    text = json.dumps(found)
    assert "alice" not in text and "hf_secret" not in text and platform.node() not in text
    assert getpass.getuser() not in text or getpass.getuser() == "root"


def test_a_row_too_long_for_the_memory_ends_with_exit_code_six(tmp_path):
    class Tiny(TinyEngine):
        def loss_sum(self, batch):
            raise torch.OutOfMemoryError("out of memory")

    with pytest.raises(OutOfMemoryError, match=r"tiny.json:\d+: one row"):
        begin(tmp_path / "run", engine=Tiny()).run()
    assert OutOfMemoryError.exit_code == 6
