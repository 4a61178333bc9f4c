"""Checkpoints that are written beside the steps: nothing is lost, mixed up or said too early, whatever happens meanwhile."""

import os
import signal
import threading
import time

import pytest

from lorikit.errors import DiskError, DivergedError, Interrupted
from lorikit.train.checkpoint import checkpoints, verify
from lorikit.train.run_folder import is_finished
from lorikit.train.signals import Signals
from lorikit.train.writer import Writer
from test_loop import adapter_bytes, begin, curve, full_after, settings
from tiny_engine import TinyEngine


class In(TinyEngine):
    """Says in forward number `forward` that it is there, and does something."""

    def __init__(self, forward, act=lambda loss: loss):
        super().__init__()
        self.forward, self.act, self.forwards, self.there = forward, act, 0, threading.Event()

    def loss_sum(self, batch):
        self.forwards += 1
        loss = super().loss_sum(batch)
        if self.forwards == self.forward:
            self.there.set()
            loss = self.act(loss)
        return loss


def held_back(training, step=4):
    """The write of one checkpoint ends only after the engine is where it waits for."""
    write = training._write

    def late(state, *given):
        if state.step == step:
            assert training.engine.there.wait(60)
            time.sleep(0.05)
        write(state, *given)

    training._write = late
    return training


def whole(run):
    """Numbers of the checkpoints, all of which are whole, with nothing half-written beside them."""
    assert all(verify(folder) == [] for folder in checkpoints(run)) and not list(run.glob(".staging*"))
    return [int(folder.name[11:]) for folder in checkpoints(run)]


def test_steps_go_on_while_a_checkpoint_of_the_step_that_it_names_is_written(tmp_path):
    begin(tmp_path / "plain").run()
    training = held_back(begin(tmp_path / "late", engine=In(forward=6)))
    training.run()
    assert whole(tmp_path / "late") == whole(tmp_path / "plain")
    for folder in checkpoints(tmp_path / "plain"):
        for name in ("adapter_model.safetensors", "adapter_config.json", "optimizer.safetensors", "README.md"):
            assert (folder / name).read_bytes() == (tmp_path / "late" / folder.name / name).read_bytes()
    assert adapter_bytes(tmp_path / "late") == adapter_bytes(tmp_path / "plain")
    assert curve(tmp_path / "late") == curve(tmp_path / "plain")


def test_a_run_goes_on_from_a_checkpoint_that_was_written_late(tmp_path):
    begin(tmp_path / "plain").run()
    run = tmp_path / "cut"
    training = held_back(begin(run, engine=In(6, act=lambda loss: loss * float("nan"))))
    with pytest.raises(DivergedError):
        training.run()
    begin(run).run()
    assert adapter_bytes(run) == adapter_bytes(tmp_path / "plain") and curve(run) == curve(tmp_path / "plain")


def test_one_checkpoint_is_written_at_a_time_and_old_ones_go_after_it(tmp_path):
    run, writing, most = tmp_path / "run", [], []
    training = begin(run, settings(run, train={"save_steps": 1, "save_total_limit": 2}))
    write = training._write

    def slow(state, *given):
        writing.append(state.step)
        most.append(len(writing))
        time.sleep(0.01)
        write(state, *given)
        writing.remove(state.step)

    training._write = slow
    training.run()
    assert most == [1] * 18 and whole(run) == [17, 18]


def test_a_write_that_fails_ends_the_run_before_the_next_step_with_the_last_checkpoint_whole(tmp_path):
    run = tmp_path / "run"
    training = begin(run, settings(run, train={"max_steps": 60, "save_steps": 4}), held_out=())
    training._adapter = full_after(4, training)
    step = training._step

    def after_the_write():
        training.writer._thread and training.writer._thread.join()
        step()

    training._step = after_the_write
    with pytest.raises(DiskError, match=r"checkpoint-8 cannot be written: No space left") as caught:
        training.run()
    assert caught.value.exit_code == 7 and training.state.step == 9  # begun before it was known
    assert whole(run) == [4] and not is_finished(run)
    assert "cannot be written" not in training.report.console.file.getvalue()  # once is enough


def test_a_run_whose_last_checkpoint_cannot_be_written_is_not_finished(tmp_path):
    training = begin(tmp_path / "run")
    training._adapter = full_after(17, training)
    with pytest.raises(DiskError, match="checkpoint-18 cannot be written"):
        training.run()
    assert whole(tmp_path / "run")[-1] == 16 and not is_finished(tmp_path / "run")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_during_a_write_leaves_two_whole_checkpoints(tmp_path, number):
    def stop(loss):
        os.kill(os.getpid(), number)
        return loss

    run = tmp_path / "run"
    with Signals() as signals:
        training = held_back(begin(run, engine=In(5, act=stop), signals=signals))
        with pytest.raises(Interrupted, match=r"after step 5; saved .*checkpoint-5: the same") as caught:
            training.run()
    assert caught.value.exit_code == 75 and whole(run) == [4, 5]


def test_a_signal_after_a_write_that_failed_is_a_full_disk(tmp_path):
    def stop(loss):
        os.kill(os.getpid(), signal.SIGTERM)
        return loss

    run = tmp_path / "run"
    with Signals() as signals:
        training = held_back(begin(run, engine=In(9, act=stop), signals=signals, held_out=()), step=8)
        training._adapter = full_after(4, training)
        with pytest.raises(DiskError, match="checkpoint-8 cannot be written"):
            training.run()
    assert whole(run) == [4]


def test_an_error_in_a_step_lets_the_write_end(tmp_path):
    def fail(loss):
        raise ZeroDivisionError("of another library")

    training = held_back(begin(tmp_path / "run", engine=In(5, act=fail)))
    with pytest.raises(ZeroDivisionError):
        training.run()
    assert whole(tmp_path / "run") == [4]


def test_a_message_names_the_checkpoint_that_was_being_written(tmp_path):
    training = held_back(begin(tmp_path / "run", engine=In(5, act=lambda loss: loss * float("nan"))))
    with pytest.raises(DivergedError, match=r"step 5: the loss is nan.* the last good checkpoint is .*checkpoint-4\."):
        training.run()


def test_of_two_errors_both_are_told(tmp_path):
    run = tmp_path / "run"
    training = begin(run, engine=In(9, act=lambda loss: loss * float("nan")), held_out=())
    training = held_back(training, step=8)
    training._adapter = full_after(4, training)
    with pytest.raises(DivergedError, match=r"step 9: the loss is nan.* the last good checkpoint is .*checkpoint-4\."):
        training.run()
    assert "checkpoint-8 cannot be written: No space left" in training.report.console.file.getvalue()
    assert whole(run) == [4]


def test_what_went_wrong_in_the_thread_is_raised_once_by_whoever_asks_next():
    def fail():
        raise KeyError("here")

    for ask in (Writer.wait, Writer.check, lambda writer: writer.start(print)):
        writer = Writer()
        writer.start(fail)
        assert isinstance(writer.settle(), KeyError)
        with pytest.raises(KeyError, match="here"):
            ask(writer)
        writer.wait()
        assert writer.settle() is None


def test_a_look_does_not_wait_and_tells_what_has_ended():
    writer, gate = Writer(), threading.Event()

    def fail():
        gate.wait(60)
        raise KeyError("late")

    writer.start(fail)
    writer.check()
    gate.set()
    writer._thread.join()
    with pytest.raises(KeyError, match="late"):
        writer.check()
