"""Settings that fit a data set, each with its reason: said to the person, never set for them.

max_length   the next multiple of 32 over the longest row, or over the 99th percentile where a few rows are far longer
batch        4 x 4 rows a step, fewer where an epoch would have under 20 steps
epochs       so many that there are about 150 steps, at least 1 and at most 5: more learns few rows by heart
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from lorikit.data.account import DataReport, Lengths

STEPS, STEPS_AN_EPOCH = 150, 20
MOST_EPOCHS = 5
_ROUND = 32  # tokens
_FAR = 2  # times the 99th percentile: longer rows cost every other row's memory


@dataclass(frozen=True, slots=True)
class Suggestion:
    """A setting by its dotted name, the value that the data speaks for, and why."""

    setting: str
    value: int
    reason: str


def suggest(report: DataReport) -> list[Suggestion]:
    """max_length, rows a step and epochs for these rows; nothing where no row is trained."""
    if not report.num_trained or report.lengths is None:
        return []
    rows = report.num_trained
    per_step = max(1, min(16, rows // STEPS_AN_EPOCH))
    batch = max(size for size in (1, 2, 4) if size <= max(1, per_step))
    accumulation = max(1, per_step // batch)
    steps = math.ceil(rows / (batch * accumulation))
    epochs = max(1, min(MOST_EPOCHS, round(STEPS / steps)))
    return [
        _max_length(report.lengths, report.max_length),
        Suggestion(
            "train.per_device_train_batch_size", batch, f"{rows:,} rows to train, {steps:,} steps an epoch, with"
        ),
        Suggestion(
            "train.gradient_accumulation_steps", accumulation, f"{batch} x {accumulation} rows an optimizer step"
        ),
        Suggestion(
            "train.num_train_epochs",
            epochs,
            f"{epochs * steps:,} steps; hold rows out, and the adapter of the lowest held-out loss is kept",
        ),
    ]


def _max_length(lengths: Lengths, now: int) -> Suggestion:
    far = lengths.max > _FAR * lengths.p99
    longest = lengths.p99 if far else lengths.max
    value = math.ceil(longest / _ROUND) * _ROUND
    what = (
        f"99 of 100 rows have at most {longest:,} tokens; the longest, {lengths.max:,}, is far over that"
        if far
        else f"the longest row has {longest:,} tokens, so that none is lost"
    )
    return Suggestion("data.max_length", value, f"{what} (now {now:,})")
