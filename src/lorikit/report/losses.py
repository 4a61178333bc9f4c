"""Loss by row, of the base and of the tuned model, on one engine: where the adapter helps, and which rows stay hard.

gain = sum(base - tuned) / tokens        over rows, whose spread gives its standard error (a ratio of two sums):
error = sqrt(k / (k - 1) * sum((d_i - gain n_i)^2)) / sum(n_i),    d_i = base_i - tuned_i,  n_i tokens of row i
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from lorikit.data.pack import num_targets, pack
from lorikit.data.values import IGNORE, Conversation, Example, Message
from lorikit.errors import DataError
from lorikit.model.engine import Engine
from lorikit.report.values import Fit, Losses, RowLoss
from lorikit.train.optim import Budget

if TYPE_CHECKING:
    from lorikit.data.encode import Encoder

Sums = list[float]
_BLOCK = 256  # rows packed at a time
_SWAPS = 2  # other questions that an answer is put to


def spaced(total: int, wanted: int) -> list[int]:
    """`wanted` numbers below `total`, evenly spaced, all of them where there are no more."""
    wanted = min(wanted, total)
    return [place * total // wanted for place in range(wanted)]


def within(examples: Sequence[Example], max_rows: int, max_tokens: int) -> list[Example]:
    """Evenly spaced examples, at most `max_rows` with at most about `max_tokens` tokens together; at least one."""
    if not examples:
        return []
    mean = sum(len(one.input_ids) for one in examples) / len(examples)
    return [examples[i] for i in spaced(len(examples), max(1, min(max_rows, int(max_tokens / mean))))]


def loss_sums(engine: Engine, examples: Sequence[Example], budget: Budget, check: Callable[[], None]) -> Sums:
    """For each example the cross entropy summed over its targets, with the adapter as it is now, dropout off."""
    sums: dict[int, float] = {}
    examples = list(examples)  # packed ones are made anew each time that they are asked for

    def forward(share: list[Example]) -> None:
        check()
        losses = engine.token_losses(pack(share)).double().tolist()
        start = 0
        for example in share:
            count = num_targets(example)
            sums[id(example)] = math.fsum(losses[start : start + count])
            start += count

    engine.train(False)
    for start in range(0, len(examples), _BLOCK):
        budget.run(examples[start : start + _BLOCK], lambda: None, forward)
    return [sums[id(example)] for example in examples]


def both(
    engine: Engine, examples: Sequence[Example], budget: Budget, check: Callable[[], None]
) -> tuple[Sums, Sums, list[int]]:
    """The sums of the base, those of the tuned model, and the targets of each example."""
    with engine.without_adapter():
        base = loss_sums(engine, examples, budget, check)
    return base, loss_sums(engine, examples, budget, check), [num_targets(example) for example in examples]


def row_losses(examples: Sequence[Example], base: Sums, tuned: Sums) -> list[RowLoss]:
    """One RowLoss a row; the Examples of one row (see encode) together."""
    rows: dict[str, RowLoss] = {}
    for example, before, after in zip(examples, base, tuned, strict=True):
        old = rows.get(example.source, RowLoss(example.source, 0.0, 0.0, 0))
        rows[example.source] = replace(
            old, base=old.base + before, tuned=old.tuned + after, tokens=old.tokens + num_targets(example)
        )
    return [row for row in rows.values() if row.tokens]


def summed(rows: Sequence[RowLoss], of_rows: int) -> Losses | None:
    """The losses of these rows together; None without rows."""
    if not rows:
        return None
    tokens = sum(row.tokens for row in rows)
    gain, error = mean_and_error([(row.base - row.tuned, row.tokens) for row in rows])
    return Losses(
        num_rows=len(rows),
        of_rows=of_rows,
        tokens=tokens,
        base=math.fsum(row.base for row in rows) / tokens,
        tuned=math.fsum(row.tuned for row in rows) / tokens,
        gain=gain,
        error=error,
        rows_better=sum(row.tuned < row.base for row in rows),
    )


def mean_and_error(pairs: Sequence[tuple[float, int]]) -> tuple[float, float | None]:
    """Of (sum, count) pairs the mean over all counts and its standard error, None for a single pair."""
    count = sum(n for _, n in pairs)
    mean = math.fsum(value for value, _ in pairs) / count
    if len(pairs) < 2:
        return mean, None
    spread = math.fsum((value - mean * n) ** 2 for value, n in pairs)
    return mean, math.sqrt(len(pairs) / (len(pairs) - 1) * spread) / count


def fit(
    engine: Engine,
    encoder: Encoder,
    rows: Sequence[Conversation],
    max_length: int,
    budget: Budget,
    check: Callable[[], None],
) -> Fit | None:
    """How much likelier last answers are after their own question than after other rows'; None for fewer than 3 rows that
    answer differently."""
    own: list[Example] = []
    others: list[list[Example]] = []
    for number, row in enumerate(rows):
        mine = _last_answer(encoder, row.messages, max_length)
        swapped = [_last_answer(encoder, messages, max_length) for messages in _swapped(rows, number)]
        usable = [example for example in swapped if example]
        if mine and usable:
            own.append(mine)
            others.append(usable)
    if len(own) < 3:
        return None
    every = [*own, *(example for some in others for example in some)]
    sides = both(engine, every, budget, check)
    figures: list[float] = []
    for sums in sides[:2]:
        rest = iter(sums[len(own) :])
        pairs = []
        for place, some in enumerate(others):
            elsewhere = math.fsum(next(rest) for _ in some) / len(some)
            pairs.append((elsewhere - sums[place], num_targets(own[place])))
        mean, error = mean_and_error(pairs)
        figures += [mean, error or 0.0]
    return Fit(len(own), *figures)


def _swapped(rows: Sequence[Conversation], number: int) -> list[tuple[Message, ...]]:
    """The answer of a row after the questions of the next rows that ask and answer something else."""
    row = rows[number]
    found: list[tuple[Message, ...]] = []
    for step in range(1, len(rows)):
        other = rows[(number + step * (1 + len(rows) // 3)) % len(rows)].messages
        if other[:-1] != row.messages[:-1] and other[-1].content.strip() != row.messages[-1].content.strip():
            found.append((*other[:-1], row.messages[-1]))
        if len(found) == _SWAPS:
            break
    return found


def _last_answer(encoder: Encoder, messages: Sequence[Message], max_length: int) -> Example | None:
    """A row with its last answer labelled and nothing else; None where it cannot be encoded or is too long."""
    try:
        example = encoder.encode(Conversation(tuple(messages), ""))[-1]
        start = len(encoder.prompt_ids(messages[:-1]))
    except DataError:
        return None
    if len(example.input_ids) > max_length:
        return None
    labels = [IGNORE] * start + example.labels[start:]
    return Example(example.input_ids, labels, "") if any(label != IGNORE for label in labels[1:]) else None
