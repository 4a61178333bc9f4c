"""The loop: rows -> gradient -> AdamW, and what a step ends with, each when it is due: log line, evaluation, checkpoint.

A checkpoint is a copy of its step on the host, which a thread writes while the steps go on. Whatever needs it on the disk
waits for it: the next one, the end of the run, a signal, and the other ranks of a run that has several.

A signal lets the step in hand finish, saves, and leaves the evaluation to the resumed run, which therefore writes the same
lines and the same bytes as if nothing had happened.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

from torch import Tensor

from lorikit.config import RunConfig
from lorikit.data.audit import fingerprint
from lorikit.data.encode import Encoder
from lorikit.data.values import Example
from lorikit.errors import DataError, DivergedError, Interrupted, ModelError, OutOfMemoryError
from lorikit.model.engine import Engine
from lorikit.model.lora import adapter_writer
from lorikit.train import checkpoint
from lorikit.train.adamw import make_optimizer
from lorikit.train.card import model_card
from lorikit.train.checkpoint import State
from lorikit.train.distributed import AgreedSignals, LostRank, Ranks, lengths_of
from lorikit.train.evaluate import agreed_answers, held_out_loss
from lorikit.train.metrics import MetricsFile, Record, numbers_of, open_trackers, peak_memory
from lorikit.train.optim import (
    Budget,
    InFlight,
    Shared,
    begin_step,
    derived_seed,
    is_out_of_memory,
    plan_steps,
    prepare_part,
)
from lorikit.train.progress import Report
from lorikit.train.run_folder import ADAPTER_FOLDER, METRICS, write_config
from lorikit.train.shared_state import check_same, share_state
from lorikit.train.signals import Signals
from lorikit.train.storage import new_folder
from lorikit.train.writer import Writer

_ADVICE = (
    "Look at the rows with `lorikit check`, then take a lower train.learning_rate, a longer warm-up or model.dtype bfloat16, "
    "with another train.output_dir"
)


class Training:
    """One run in progress: engine and optimizer, and the state that a checkpoint keeps.

    `rows` must not be empty; without `held_out` rows there is no held-out loss, without `encoder` no prompts are answered
    and no tokenizer is saved. Raises as `train`.
    """

    def __init__(
        self,
        config: RunConfig,
        run: Path,
        engine: Engine,
        rows: Sequence[Example],
        *,
        held_out: Sequence[Example] = (),
        encoder: Encoder | None = None,
        report: Report | None = None,
        signals: Signals | None = None,
        base_name: str = "base",
        base_revision: str | None = None,
        ranks: Ranks | None = None,
    ) -> None:
        self.config, self.run_folder, self.engine = config, run, engine
        self.rows, self.held_out, self.encoder = rows, held_out, encoder
        self.ranks = ranks or Ranks()
        own = signals or Signals()
        self.report, self.peak_memory = report or Report(), 0
        self.signals = AgreedSignals(own, self.ranks) if self.ranks.active else own
        self.base_name, self.base_revision = base_name, base_revision
        self.plan = plan_steps(config.train, len(rows))
        self.optimizer = make_optimizer(engine, config.train)
        say = self.ranks.say(self.report.say)
        most = config.train.max_tokens_per_forward or self._best_tokens()
        self.budget = Budget(most, say, fixed=engine.sharded)
        self.state = State()
        self.writer = Writer()
        self._ahead: InFlight | None = None

    def restore(self) -> None:
        """Go on from the newest whole checkpoint, if there is one, and make the folder a run with these settings.

        Raises DataError for other rows than it was begun with, ModelError for another revision of the base.
        """
        if self.ranks.first:
            self._restore()
        if self.ranks.active:
            self.state = share_state(self.ranks, self.state, self.engine, self.optimizer)
            self.budget.max_tokens = self.state.max_tokens or self.budget.max_tokens
        if self.writes:
            write_config(self.run_folder, self.config)

    def _restore(self) -> None:
        digest = fingerprint(self.rows, self.held_out)
        newest = checkpoint.newest(self.run_folder, self.report.say)
        if newest is None:
            self.state = State(data_sha256=digest, base_revision=self.base_revision)
        else:
            self.state = checkpoint.read_state(newest)
            if self.state.data_sha256 != digest:
                raise DataError(
                    f"{self.run_folder}: the rows are not those that this run began with (or they become other tokens now); "
                    "bring the old data back, or name another train.output_dir"
                )
            if self.state.base_revision != self.base_revision:
                raise ModelError(
                    f"{self.run_folder}: began with revision {self.state.base_revision} of {self.base_name}, which is now "
                    f"{self.base_revision}; set model.revision to the old one"
                )
            checkpoint.load(newest, self.engine, self.optimizer)
            self.budget.max_tokens = self.state.max_tokens
            self.report.say(f"going on with {newest}")

    def run(self) -> None:
        """Step until the plan or early stopping ends it, then write adapter/. `restore` comes first."""
        self.signals.defer()
        self.seconds_before, self.started = self.state.seconds, time.perf_counter()
        self.metrics = MetricsFile(self.run_folder / METRICS, self.state.metrics_bytes) if self.ranks.first else None
        self.trackers = open_trackers(self.config, self.run_folder, self.state.step) if self.ranks.first else []
        self.report.start(self.plan.num_steps, self.state.step)
        self.engine.train()
        try:
            if not self.state.settled:
                self._end_step()
            while not self._is_done():
                self.writer.check()
                self._step()
                self._end_step()
            self._write_adapter()
        except LostRank as lost:
            raise self._without(lost) from None
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            raise OutOfMemoryError(
                f"step {self.state.step + 1}: out of memory outside the forward and backward pass "
                f"({str(error).splitlines()[0]}); {self._kept()}"
            ) from None
        finally:
            if unheard := self.writer.settle():
                self.report.say(str(unheard))
            self.report.stop()
            if self.metrics is not None:
                self.metrics.close()
            for tracker in self.trackers:
                tracker.close()

    def _step(self) -> None:
        begun = time.perf_counter()
        state, config = self.state, self.config.train
        begun_step = self._ahead or self._begin(state.step)
        self._ahead = self._begin(state.step + 1) if self._may_run_ahead(state.step + 1) else None
        done = begun_step.result()
        if isinstance(self.signals, AgreedSignals):
            self.signals.hear(one.signal for one in done.told)
            self.budget.max_tokens = min(int(one.max_tokens) for one in done.told)
            problem = self.ranks.failure(done.told)
            if problem:
                raise OutOfMemoryError(f"step {state.step + 1}, {problem}; {self._kept()}")
        self._check_finite(done.loss_sum, done.norm)
        seconds = time.perf_counter() - begun
        self.state = replace(
            state,
            step=state.step + 1,
            settled=False,
            tokens=state.tokens + done.num_tokens,
            labelled_tokens=state.labelled_tokens + done.num_targets,
            window_loss=state.window_loss + done.loss_sum,
            window_labelled=state.window_labelled + done.num_targets,
            window_tokens=state.window_tokens + done.num_tokens,
            window_seconds=state.window_seconds + seconds,
        )
        loss, speed = done.loss_sum / done.num_targets, done.num_tokens / seconds
        self.peak_memory = max([peak_memory(self.engine.device), *(int(one.peak_memory) for one in done.told)])
        self.report.step(self.state.step, self.plan.epoch(self.state.step), loss, speed, self.peak_memory)
        if self.state.step % config.logging_steps == 0 or self.state.step == self.plan.num_steps:
            self._log(done.norm, self.plan.learning_rate(state.step))

    def _begin(self, step: int) -> InFlight:
        purpose = f"dropout of rank {self.ranks.rank}" if self.ranks.rank else "dropout"
        prepared = prepare_part(self.engine, self.ranks, self._rows_of(step), self.budget)
        seed, rate = derived_seed(self.config.train.seed, purpose, step), self.plan.learning_rate(step)
        given = self.engine, self.optimizer, prepared, self.budget
        if isinstance(self.signals, AgreedSignals):
            shared = Shared(self.ranks, self.signals, self._rows_of(step))
            return begin_step(*given, dropout_seed=seed, learning_rate=rate, shared=shared)
        return begin_step(*given, dropout_seed=seed, learning_rate=rate)

    def _rows_of(self, step: int) -> list[Example]:
        return [self.rows[row] for row in self.plan.rows(step)]

    def _share_of(self, step: int) -> list[Example]:
        """This rank's rows of a step: all of them where it is alone, none where there are more ranks than rows."""
        rows = self._rows_of(step)
        return self.ranks.share(rows, lengths_of(rows))

    def _may_run_ahead(self, step: int) -> bool:
        """Whether step number `step` may begin before the one in hand is looked at, so that a GPU never waits for the host:
        only when nothing reads the adapter between the two."""
        due = self._evaluation_is_due(step) or self._checkpoint_is_due(step)
        return self.optimizer.runs_behind() and step < self.plan.num_steps and not due and not self.signals.received

    def _evaluation_is_due(self, step: int) -> bool:
        every = self.config.eval.eval_steps or self.plan.steps_per_epoch
        return step % every == 0 or step == self.plan.num_steps

    def _checkpoint_is_due(self, step: int) -> bool:
        return step % self.config.train.save_steps == 0

    def _log(self, grad_norm: float, learning_rate: float) -> None:
        state = self.state
        self._write_line(
            {
                "step": state.step,
                "epoch": self.plan.epoch(state.step),
                "loss": state.window_loss / state.window_labelled,
                "learning_rate": learning_rate,
                "grad_norm": grad_norm,
                "tokens": state.tokens,
                "labelled_tokens": state.labelled_tokens,
                "tokens_per_second": state.window_tokens / state.window_seconds,
                "peak_memory_bytes": self.peak_memory,
                "seconds": self._seconds(),
            }
        )
        self.state = replace(state, window_loss=0.0, window_labelled=0, window_tokens=0, window_seconds=0.0)

    def _end_step(self) -> None:
        """Evaluation and checkpoint, if due. A signal before the end of the evaluation leaves it to the resumed run."""
        if self._ahead is not None:  # the adapter is past this step, which has nothing due
            self.state = replace(self.state, settled=True)
            return
        step = self.state.step
        try:
            self.signals.check()
            if self._evaluation_is_due(step):
                self._evaluate()
            self.state = replace(self.state, settled=True)
            self.signals.check()
        except Interrupted as signal:
            folder = self._save()
            raise Interrupted(
                f"{signal} after step {step}; saved {folder}: the same command goes on from there"
            ) from None
        if self._checkpoint_is_due(step) or step == self.state.best_step or self._is_done():
            self._save(beside=True)

    def _evaluate(self) -> None:
        state, config = self.state, self.config.eval
        record: Record = {"step": state.step, "epoch": self.plan.epoch(state.step)}
        if self.held_out:
            loss = held_out_loss(self.engine, self.held_out, self.budget, self.signals, self.ranks)
            if not math.isfinite(loss):
                raise DivergedError(f"step {state.step}: the held-out loss is {loss}; {self._kept()}. {_ADVICE}")
            best = state.best_loss is None or loss < state.best_loss
            record |= {"eval_loss": loss, "eval_perplexity": math.exp(min(loss, 700.0)), "best": best}
            if best:
                state = replace(state, best_loss=loss, best_step=state.step, num_worse=0)
            else:
                state = replace(state, num_worse=state.num_worse + 1)
        if config.prompts and self.encoder:
            wanted = config.prompts, config.max_new_tokens
            record["answers"] = agreed_answers(self.engine, self.encoder, *wanted, self.signals, self.ranks)
        if len(record) > 2:
            self._write_line(record | {"seconds": self._seconds()})
        self.state = state

    def _is_done(self) -> bool:
        patience = self.config.eval.early_stopping_patience
        stopped = patience is not None and self.state.num_worse >= patience
        return self.state.step >= self.plan.num_steps or stopped

    def _save(self, *, together: bool = True, beside: bool = False) -> Path:
        """A checkpoint of this step, with `beside` on its way to the disk, else on it.

        One that is there already was loaded at the start, and leads to the same bytes.
        """
        self.writer.wait()
        folder = checkpoint.folder_of(self.run_folder, self.state.step)
        together = together and self.ranks.active
        there = folder.exists()
        if together:  # a folder of this machine's alone decides nothing
            there = all(bool(found) for (found,) in self.ranks.numbers(there or not self.writes))
        if not there:
            if not checkpoint.all_finite(self.engine):
                raise DivergedError(
                    f"step {self.state.step}: the adapter holds NaN or infinity; {self._kept()}. {_ADVICE}"
                )
            length = self.metrics.length() if self.metrics is not None else 0
            state = replace(
                self.state, seconds=self._seconds(), metrics_bytes=length, max_tokens=self.budget.max_tokens
            )
            if together:
                check_same(self.ranks, self.engine)
                state = State(**self.ranks.text(asdict(state)))
            if self.writes:
                self.writer.start(partial(self._write, state, self.optimizer.state(), self._adapter()))
                if not beside or self.ranks.active:
                    self.writer.wait()
        if together:
            self.ranks.wait()
        return folder

    def _without(self, lost: LostRank) -> Interrupted:
        """What to say when another rank is gone, after saving the step that was done last, if nothing was begun after it."""
        words = f"another process of this run is gone ({lost}) after step {self.state.step}"
        if self.optimizer.runs_behind() or not self.ranks.first:  # behind the exchange that broke the device hangs
            return Interrupted(f"{words}; {self._kept()}: the same command goes on from there")
        return Interrupted(f"{words}; saved {self._save(together=False)}: the same command goes on from there")

    def _write(self, state: State, moments: dict[str, Tensor], write_adapter: Callable[[Path], None]) -> None:
        """Put a checkpoint on the disk: in the writer's thread, where nothing that a step changes may be looked at."""
        if self.metrics is not None:
            self.metrics.sync()
        checkpoint.save(self.run_folder, moments, state, write_adapter)
        checkpoint.prune(self.run_folder, self.config.train.save_total_limit, [state.best_step])

    def _adapter(self) -> Callable[[Path], None]:
        """Writes the adapter as it is now, with its card, into a folder."""
        card = model_card(self.config, self.base_name, self.state, len(self.rows))
        return adapter_writer(self.engine, base_name=self.base_name, base_revision=self.base_revision, card=card)

    def _write_adapter(self) -> None:
        """adapter/: the best checkpoint's or the last step's, with the tokenizer. It marks the run as finished."""
        best = self.state.best_step if self.config.eval.load_best_model_at_end else None
        if best is not None and best != self.state.step:
            folder = checkpoint.folder_of(self.run_folder, best)
            self.writer.wait()
            if self.writes:
                checkpoint.load_adapter(folder, self.engine)
        if self.writes:
            with new_folder(self.run_folder / ADAPTER_FOLDER) as staged:
                if self.encoder:
                    self.encoder.save_tokenizer(staged)
                self.writer.wait()  # the run is not finished before its last checkpoint is there
                self._adapter()(staged)
        if self.ranks.active:
            self.ranks.wait()
            self.ranks.part()
        which = f"of step {best}, which has the lowest held-out loss" if best is not None else "of the last step"
        self.report.say(f"wrote {self.run_folder / ADAPTER_FOLDER}, {which}")

    def _write_line(self, record: Record) -> None:
        if self.metrics is not None:
            self.metrics.write(record)
        self.report.line(record)
        for tracker in self.trackers:
            tracker.log(numbers_of(record), record["step"])

    @property
    def writes(self) -> bool:
        """Whether this rank writes checkpoints and adapter: rank 0, with save_on_each_node one of each machine."""
        return self.ranks.first or (self.config.train.save_on_each_node and self.ranks.local_rank == 0)

    def _best_tokens(self) -> int:
        """Tokens of a forward, as the rank with the least memory takes them."""
        return min(int(tokens) for (tokens,) in self.ranks.numbers(self.engine.best_tokens()))

    def _seconds(self) -> float:
        return self.seconds_before + time.perf_counter() - self.started

    def _check_finite(self, loss: float, norm: float) -> None:
        if math.isfinite(loss) and math.isfinite(norm):
            return
        sources = [example.source for example in self._rows_of(self.state.step)]
        rows = ", ".join(sources[:8]) + (f" and {len(sources) - 8} more" if len(sources) > 8 else "")
        raise DivergedError(
            f"step {self.state.step + 1}: the loss is {loss}, the gradient norm {norm}; this step is not kept and "
            f"{self._kept()}. Rows of the step: {rows}. {_ADVICE}"
        )

    def _kept(self) -> str:
        self.writer.settle()
        folders = checkpoint.checkpoints(self.run_folder)
        return f"the last good checkpoint is {folders[-1]}" if folders else "there is no checkpoint yet"
