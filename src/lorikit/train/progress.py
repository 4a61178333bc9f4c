"""What a person sees of a run: on a terminal one live line, elsewhere a plain line every logging_steps. On stderr."""

from __future__ import annotations

import io
import time

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from lorikit.train.metrics import Record


class Report:
    """Draws steps, lines of metrics.jsonl and messages. rich leaves colours away where NO_COLOR is set."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(stderr=True, highlight=False)
        self._live: Progress | None = None
        self._task = TaskID(0)
        self._num_steps = 0
        self._first = (0, 0.0)

    def say(self, text: str) -> None:
        """One message, above the live line."""
        self.console.print(text, markup=False, soft_wrap=True)

    def start(self, num_steps: int, done: int) -> None:
        """The loop begins, `done` steps after the beginning of the run."""
        self._num_steps = num_steps
        self._first = (done, time.perf_counter())
        if self.console.is_terminal:
            words = "step {task.completed}/{task.total}", "{task.fields[words]}"
            columns = TextColumn(words[0]), BarColumn(20), TextColumn(words[1]), TimeRemainingColumn()
            self._live = Progress(*columns, console=self.console, transient=True)
            self._task = self._live.add_task("", total=num_steps, completed=done, words="")
            self._live.start()

    def step(self, step: int, epoch: float, loss: float, tokens_per_second: float, memory: int) -> None:
        """A step is done."""
        if self._live:
            words = f"epoch {epoch:.2f}  loss {loss:.4f}  {tokens_per_second:,.0f} tokens/s  {_gib(memory)}"
            self._live.update(self._task, completed=step, words=words)

    def line(self, record: Record) -> None:
        """A line of metrics.jsonl was written."""
        if "eval_loss" in record:
            best = "  best so far" if record["best"] else ""
            self.say(
                f"step {record['step']}/{self._num_steps}  held-out loss {record['eval_loss']:.4f}  "
                f"perplexity {record['eval_perplexity']:.2f}{best}"
            )
        elif "loss" in record and not self._live:
            self.say(
                f"step {record['step']}/{self._num_steps}  epoch {record['epoch']:.2f}  loss {record['loss']:.4f}  "
                f"lr {record['learning_rate']:.2e}  {record['tokens_per_second']:,.0f} tokens/s  "
                f"{_gib(record['peak_memory_bytes'])}  ETA {self._eta(record['step'])}"
            )
        for answer in record.get("answers", ()):
            self.say(f"  {answer['prompt']} -> {answer['answer']}")

    def stop(self) -> None:
        """The loop is over: the live line goes, the cursor comes back."""
        if self._live:
            self._live.stop()
            self._live = None

    def _eta(self, step: int) -> str:
        done, since = self._first
        left = (time.perf_counter() - since) / max(1, step - done) * (self._num_steps - step)
        return f"{int(left // 3600)}:{int(left // 60 % 60):02}:{int(left % 60):02}"


def silent() -> Report:
    """For ranks that have nothing to say."""
    return Report(Console(file=io.StringIO(), quiet=True, force_terminal=False))


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.1f} GiB"
