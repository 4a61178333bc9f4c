"""What becomes of every row: rows read = trained + held out + dropped, by reason + duplicates removed.

    files -> rows -> each said once -> tokens -> max_length -> trained | held out
              |                          |           |
          unreadable                  refused    too_long, cut_off

Counts are rows. A row of several Examples (see encode) is dropped as a whole and is as long as its longest one.
"""

from __future__ import annotations

import hashlib
import re
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from lorikit.config import DataConfig, EvalConfig, RunConfig
from lorikit.data.account import KINDS, DataFile, DataReport, Kind, SameAs, count_tokens, measure, num_labelled
from lorikit.data.examples import PackedExamples
from lorikit.data.findings import Kept, find
from lorikit.data.read import Rows, data_files, read_rows
from lorikit.data.split import group_keys, prompt_key, split
from lorikit.data.values import Conversation, Example, Message, Reject
from lorikit.errors import ConfigError, DataError

if TYPE_CHECKING:
    from lorikit.data.encode import Encoder

Progress = Callable[[int, int], None]
"""Called now and then with the rows done and the rows in all."""

_SHOWN = 5


@dataclass(frozen=True, slots=True)
class Prepared:
    """What is trained and what is held out, in the order of the files, and the account of every row."""

    train: Sequence[Example]
    held_out: Sequence[Example]
    report: DataReport


@dataclass(frozen=True, slots=True)
class DataSet:
    """The rows of the training files and of eval.data, no source standing for two rows, and the files themselves."""

    train: Rows
    eval: Rows | None
    files: list[DataFile]


def prepare(
    paths: Sequence[Path],
    eval_paths: Sequence[Path] | None,
    config: RunConfig,
    encoder: Encoder,
    *,
    progress: Progress | None = None,
) -> Prepared:
    """The rows of these files, ready to train, and the account of every one.

    Raises DataError for files that cannot be read, for bad rows under `on_bad_row: error`, for long ones under
    `on_long_row: error` and when no row is left; ConfigError when `eval_size` asks for every row.
    """
    prepared = audit(read(paths, eval_paths, config.data), config.data, config.eval, encoder, progress=progress)
    if prepared.report.refused:
        raise DataError("\n".join(prepared.report.refusals))
    return prepared


def read(paths: Sequence[Path], eval_paths: Sequence[Path] | None, config: DataConfig) -> DataSet:
    """The rows of both sets of files. Raises what `read_rows` raises."""
    rows, eval_rows = read_rows(paths, config), read_rows(eval_paths, config) if eval_paths else None
    files = [_describe(file, "train") for path in paths for file in data_files(path)]
    eval_files = [_describe(file, "eval") for path in eval_paths or () for file in data_files(path)]
    if eval_rows and not {file.name for file in files}.isdisjoint(file.name for file in eval_files):
        eval_rows = Rows(
            [replace(row, source=f"eval.data {row.source}") for row in eval_rows.conversations],
            [replace(row, source=f"eval.data {row.source}") for row in eval_rows.rejects],
            eval_rows.num_rows,
        )
    return DataSet(rows, eval_rows, files + eval_files)


def audit(
    data: DataSet, config: DataConfig, evaluation: EvalConfig, encoder: Encoder, *, progress: Progress | None = None
) -> Prepared:
    """As `prepare`, from rows that are read already, and with what training would refuse in `report.refusals`.

    Raises only ConfigError, when `eval_size` asks for every row and nothing else is wrong.
    """
    done = _Progress(progress, data.train.num_rows + (data.eval.num_rows if data.eval else 0))
    sides = [_encode(rows, config, encoder, done) for rows in (data.train, data.eval) if rows]
    done.finish()
    refusals = [*_bad_rows(sides, config), *_long_rows(sides, config), *_nothing_left(sides, config)]
    notes = list(encoder.notes)
    kept = [row for side in sides for row in side.kept]
    keys = group_keys([row.conversation for row in kept])
    if data.eval:
        trained, held_out = sides[0].kept, sides[1].kept
    else:
        trained, held_out = _split(kept, keys, evaluation.eval_size, refusals, notes)
    train_examples = PackedExamples.joined(row.examples for row in trained)
    held_out_examples = PackedExamples.joined(row.examples for row in held_out)
    report = DataReport(
        files=data.files,
        num_rows=done.total,
        num_trained=len(trained),
        held_out=[row.source for row in held_out],
        dropped={kind: [reject for side in sides for reject in side.dropped[kind]] for kind in KINDS},
        duplicates=[pair for side in sides for pair in side.duplicates],
        truncated=[reject for side in sides for reject in side.truncated],
        leaks=_leaks(trained, held_out) if data.eval else [],
        control_text=_control_text([*trained, *held_out], encoder),
        lost_text=_lost_text([*trained, *held_out], encoder),
        train_tokens=count_tokens(train_examples),
        held_out_tokens=count_tokens(held_out_examples),
        lengths=measure((length for side in sides for length in side.lengths), config.max_length),
        max_length=config.max_length,
        on_long_row=config.on_long_row,
        on_bad_row=config.on_bad_row,
        notes=notes,
        refusals=refusals,
        fingerprint=fingerprint(train_examples, held_out_examples),
    )
    every = [conversation for rows in (data.train, data.eval) if rows for conversation in rows.conversations]
    outside = {id(row) for row in held_out}
    used = [Kept(row.conversation, key, id(row) in outside) for row, key in zip(kept, keys, strict=True)]
    scripts, findings = find(report, every, used)
    return Prepared(train_examples, held_out_examples, replace(report, scripts=scripts, findings=findings))


def fingerprint(*parts: Iterable[Example]) -> str:
    """sha256 over ids and labels, in order; where the rows came from does not matter."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(b"part")
        for example in part:
            digest.update(len(example.input_ids).to_bytes(8, "little"))
            digest.update(array("q", example.input_ids).tobytes())
            digest.update(array("q", example.labels).tobytes())
    return digest.hexdigest()


@dataclass(frozen=True, slots=True)
class _Row:
    conversation: Conversation
    examples: PackedExamples

    @property
    def source(self) -> str:
        return self.conversation.source


@dataclass(frozen=True, slots=True)
class _Side:
    """What became of the rows of one set of files. `lengths` in tokens, of the rows that could be encoded."""

    num_rows: int
    kept: list[_Row] = field(default_factory=list)
    dropped: dict[Kind, list[Reject]] = field(default_factory=lambda: {kind: [] for kind in KINDS})
    duplicates: list[SameAs] = field(default_factory=list)
    truncated: list[Reject] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)


class _Progress:
    """Counts rows and tells the caller at every 100th, as a display need not know more."""

    def __init__(self, tell: Progress | None, total: int) -> None:
        self.tell, self.total, self.done = tell, total, 0

    def add(self, rows: int) -> None:
        self.done += rows
        if self.tell and self.done % 100 == 0:
            self.tell(self.done, self.total)

    def finish(self) -> None:
        if self.tell:
            self.tell(self.total, self.total)


def _encode(rows: Rows, config: DataConfig, encoder: Encoder, done: _Progress) -> _Side:
    """Each row once through the encoder. A copy of a kept row is a duplicate, one of a dropped row shares its fate."""
    side = _Side(rows.num_rows)
    side.dropped["unreadable"].extend(rows.rejects)
    done.add(len(rows.rejects))
    first: dict[tuple[Message, ...], str | tuple[Kind, str]] = {}
    each_once: dict[tuple[Message, ...], Conversation] = {}
    for conversation in rows.conversations:
        each_once.setdefault(conversation.messages, conversation)
    encoded = encoder.encode_all(each_once.values())
    for conversation in rows.conversations:
        done.add(1)
        fate = first.get(conversation.messages)
        if isinstance(fate, str):
            side.duplicates.append(SameAs(conversation.source, fate))
            continue
        if fate is None:
            fate = first[conversation.messages] = _judge(conversation, next(encoded), config, side)
        if isinstance(fate, tuple):
            kind, reason = fate
            row = {"messages": [asdict(message) for message in conversation.messages]}
            side.dropped[kind].append(Reject(conversation.source, reason, row))
    return side


def _judge(
    conversation: Conversation, examples: list[Example] | DataError, config: DataConfig, side: _Side
) -> str | tuple[Kind, str]:
    """The row's source after it was kept in `side`, or why it is dropped."""
    if isinstance(examples, DataError):
        return "refused", str(examples)
    if not any(num_labelled(example.labels) for example in examples):
        return "refused", "nothing in it is labelled: there is no answer to learn"
    length, limit = max(len(example.input_ids) for example in examples), config.max_length
    side.lengths.append(length)
    if length > limit:
        if config.on_long_row != "truncate":
            return "too_long", f"{length} tokens, over {limit}"
        examples = [replace(e, input_ids=e.input_ids[:limit], labels=e.labels[:limit]) for e in examples]
        examples = [example for example in examples if num_labelled(example.labels)]
        if not examples:
            return "cut_off", f"{length} tokens, and none of the first {limit} is learnt"
        side.truncated.append(Reject(conversation.source, f"{length} tokens, cut to {limit}"))
    side.kept.append(_Row(conversation, PackedExamples(examples)))
    return conversation.source


def _split(
    rows: list[_Row], keys: list[bytes], eval_size: float, refusals: list[str], notes: list[str]
) -> tuple[list[_Row], list[_Row]]:
    """Rows trained and held out, by the keys of their groups.

    Where the data is refused anyway, an impossible eval_size is one more reason."""
    try:
        is_held_out = split(keys, eval_size)
    except ConfigError as error:
        if not refusals:
            raise
        refusals.append(str(error))
        return rows, []
    if eval_size and rows and not any(is_held_out):
        notes.append("nothing is held out, because all rows ask the same, or nearly the same")
    pairs = list(zip(rows, is_held_out, strict=True))
    return [row for row, out in pairs if not out], [row for row, out in pairs if out]


def _leaks(trained: Sequence[_Row], held_out: Sequence[_Row]) -> list[SameAs]:
    """Held-out rows whose prompt is trained, each with the first row that trains it."""
    first: dict[bytes, str] = {}
    for row in trained:
        first.setdefault(prompt_key(row.conversation), row.source)
    keys = ((row.source, prompt_key(row.conversation)) for row in held_out)
    return [SameAs(source, first[key]) for source, key in keys if key in first]


def _bad_rows(sides: Sequence[_Side], config: DataConfig) -> Iterator[str]:
    bad = [row for kind in ("unreadable", "refused") for side in sides for row in side.dropped[kind]]
    if bad and config.on_bad_row == "error":
        yield (
            f"{len(bad)} of {_total(sides)} cannot be used:{_first(bad)}\n"
            "Mend them, or set data.on_bad_row: skip to train on the others."
        )


def _long_rows(sides: Sequence[_Side], config: DataConfig) -> Iterator[str]:
    long = [row for side in sides for row in side.dropped["too_long"]]
    if long and config.on_long_row == "error":
        longest = max(length for side in sides for length in side.lengths)
        yield (
            f"{len(long)} of {_total(sides)} longer than data.max_length:{_first(long)}\n"
            f"Set data.max_length: {longest} to keep them all, or data.on_long_row: drop or truncate."
        )


def _nothing_left(sides: Sequence[_Side], config: DataConfig) -> Iterator[str]:
    for side, name, verb in zip(sides, ("data.train", "eval.data"), ("train", "evaluate"), strict=False):
        if side.kept:
            continue
        why = ", ".join(f"{len(rows)} {KINDS[kind]}" for kind, rows in side.dropped.items() if rows)
        text = f"{name} leaves no row to {verb}: of {_total([side])} {why}."
        if lengths := measure(side.lengths, config.max_length):
            text += (
                f" The rows have {lengths.min} to {lengths.max} tokens (median {lengths.median}, 90 % up to {lengths.p90}); "
                f"data.max_length is {config.max_length}, {lengths.max} would keep them all."
            )
        elif config.on_bad_row == "skip":  # under error the rows are named already
            text += _first([*side.dropped["unreadable"], *side.dropped["refused"]])
        yield text


def _total(sides: Sequence[_Side]) -> str:
    total = sum(side.num_rows for side in sides)
    return "1 row" if total == 1 else f"{total} rows"


def _first(rows: Sequence[Reject]) -> str:
    """The first few rows on lines of their own."""
    more = [f"and {len(rows) - _SHOWN} more"] if len(rows) > _SHOWN else []
    return "".join(f"\n  {line}" for line in [*map(str, rows[:_SHOWN]), *more])


def _control_text(rows: Iterable[_Row], encoder: Encoder) -> list[str]:
    """Sources of rows that spell a control token somewhere."""
    added = encoder.tokenizer.added_tokens_decoder
    spelled = [re.escape(token.content) for i, token in added.items() if i in encoder.control_ids and token.content]
    if not spelled:
        return []
    search = re.compile("|".join(spelled)).search
    texts = (
        (row.source, (text for m in row.conversation.messages for text in (m.content, m.name, m.reasoning)))
        for row in rows
    )
    return [source for source, parts in texts if any(text and search(text) for text in parts)]


def _lost_text(rows: Iterable[_Row], encoder: Encoder) -> list[Reject]:
    """Rows with characters that the tokenizer cannot spell, and which."""
    lost = ((row.source, encoder.lost(row.conversation.messages)) for row in rows)
    return [Reject(source, ", ".join(f"U+{ord(char):04X}" for char in chars)) for source, chars in lost if chars]


def _describe(file: Path, used_for: Literal["train", "eval"]) -> DataFile:
    with file.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    return DataFile(file.name, used_for, file.stat().st_size, digest)
