"""The loop one step ahead of what it has looked at, as on a GPU: the same bytes, the same lines, nothing lost to a signal."""

import signal

import pytest

from lorikit.errors import DivergedError, Interrupted
from lorikit.train.checkpoint import checkpoints, verify
from lorikit.train.signals import Signals
from test_loop import StopAfter, TinyEngine, adapter_bytes, begin, curve, settings


def ahead(run, *given, **options):
    training = begin(run, *given, **options)
    training.optimizer.runs_behind = lambda: True
    return training


def test_it_gives_the_same_bytes_and_lines(tmp_path):
    begin(tmp_path / "plain").run()
    training, most = ahead(tmp_path / "ahead"), []
    finish = training._end_step

    def watch():
        most.append(training._ahead is not None)
        finish()

    training._end_step = watch
    training.run()
    assert adapter_bytes(tmp_path / "plain") == adapter_bytes(tmp_path / "ahead")
    assert curve(tmp_path / "plain") == curve(tmp_path / "ahead")
    # Nothing is in flight where a checkpoint (every 4 steps) or an evaluation (every 6) is due, and at the end.
    assert [step for step, flying in enumerate(most, 1) if not flying] == [4, 6, 8, 12, 16, 18]


@pytest.mark.parametrize("forward", range(1, 19))
def test_a_signal_in_any_step_loses_nothing(forward, tmp_path):
    begin(tmp_path / "plain").run()
    run = tmp_path / "cut"
    with Signals() as signals:
        training = ahead(run, engine=StopAfter(forward=forward, number=signal.SIGTERM), signals=signals)
        with pytest.raises(Interrupted, match="the same command goes on from there"):
            training.run()
    assert all(verify(folder) == [] for folder in checkpoints(run))
    ahead(run).run()
    assert adapter_bytes(tmp_path / "plain") == adapter_bytes(run)
    assert curve(tmp_path / "plain") == curve(run)


def test_a_step_that_diverges_is_named_although_the_next_one_has_begun(tmp_path):
    class Diverging(TinyEngine):
        count = 0

        def loss_sum(self, batch):
            self.count += 1
            loss = super().loss_sum(batch)
            return loss * float("nan") if self.count == 6 else loss

    training = ahead(tmp_path / "run", settings(tmp_path / "run", train={"save_steps": 3}), engine=Diverging())
    with pytest.raises(DivergedError, match=r"step 6: the loss is nan, .*checkpoint-3"):
        training.run()
    assert [folder.name for folder in checkpoints(tmp_path / "run")] == ["checkpoint-3"]
