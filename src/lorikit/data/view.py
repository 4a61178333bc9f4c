"""What `lorikit check` shows: the account of rows, their lengths with the cut, and rows with what is learnt of them.

Text from the data is shown so that it can neither steer the terminal nor pass for our own marks: whatever is invisible,
moves the cursor or is one of the marks is written as an escape (`visible`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from lorikit.config import RunConfig
from lorikit.data.account import KINDS, DataReport, Lengths, Tokens
from lorikit.data.audit import DataSet, Progress, audit, read
from lorikit.data.suggest import suggest
from lorikit.data.values import IGNORE, Example
from lorikit.data.view_html import check_html
from lorikit.data.visible import visible as visible  # noqa: PLC0414  part of this module's interface
from lorikit.errors import ConfigError, DataError

if TYPE_CHECKING:
    from lorikit.data.encode import Encoder

Use = Literal["learnt", "read", "cut"]
"""What training does with a token: it carries loss, it is only context, or it lies behind max_length."""

_STYLES: dict[tuple[Use, bool], str] = {
    ("learnt", False): "bold green",
    ("learnt", True): "black on green",
    ("read", False): "dim",
    ("read", True): "cyan",
    ("cut", False): "strike red",
    ("cut", True): "strike red",
}
_SEVERITIES = {"error": "bold red", "warning": "bold yellow", "note": "bold"}
_BLOCKS = " ▏▎▍▌▋▊▉█"
_SHOWN = 5
_LONG_SPAN = 600


@dataclass(frozen=True, slots=True)
class Span:
    """Tokens in a row that are used alike. `text` is as in the data; of control tokens, their names joined."""

    text: str
    use: Use
    control: bool


@dataclass(frozen=True, slots=True)
class Sample:
    """One Example as it is trained, or, without spans, a row that gives none. `fate` says what became of its row."""

    source: str
    fate: str
    num_tokens: int
    num_learnt: int
    spans: list[Span]


@dataclass(frozen=True, slots=True)
class Check:
    """What `check` found."""

    report: DataReport
    samples: list[Sample]

    @property
    def refused(self) -> bool:
        """Whether training would stop at this data."""
        return self.report.refused

    def to_dict(self) -> dict[str, Any]:
        """The report's JSON values, the samples, and the settings suggested."""
        more = {
            "samples": [asdict(one) for one in self.samples],
            "suggestions": [asdict(one) for one in suggest(self.report)],
        }
        return self.report.to_dict() | more

    def _repr_html_(self) -> str:
        """How a notebook shows it."""
        return check_html(self.report, self.samples)


def check(
    paths: Sequence[Path],
    config: RunConfig,
    encoder: Encoder,
    *,
    eval_paths: Sequence[Path] | None = None,
    show: int = 3,
    row: str | None = None,
    progress: Progress | None = None,
) -> Check:
    """The account of these files by `config.data` and `config.eval`, and the first `show` rows that are trained, or `row`.

    `row` is a file:line, any line of the row, or the line alone where there is one file. What training would refuse is in
    the report. Raises DataError for files without rows, ConfigError for a `row` that is not there and an `eval_size` of
    every row.
    """
    data = read(paths, eval_paths, config.data)
    prepared = audit(data, config.data, config.eval, encoder, progress=progress)
    trained = dict.fromkeys(example.source for example in prepared.train)
    sources = [_find(data, row)] if row is not None else list(trained)[: max(show, 0)]
    return Check(
        prepared.report, [one for source in sources for one in _samples(source, data, prepared.report, encoder)]
    )


def sample(example: Example, encoder: Encoder, fate: str, max_length: int | None = None) -> Sample:
    """An Example in spans; tokens from `max_length` on are marked as cut."""
    ids = example.input_ids
    cut = len(ids) if max_length is None else max_length

    def use(at: int) -> tuple[Use, bool]:
        kind: Use = "cut" if at >= cut else "read" if at == 0 or example.labels[at] == IGNORE else "learnt"
        return kind, ids[at] in encoder.control_ids

    spans = []
    for (kind, control), group in groupby(range(len(ids)), key=use):
        places = list(group)
        start, end = places[0], places[-1] + 1
        names = [str(name) for name in encoder.tokenizer.convert_ids_to_tokens(ids[start:end])] if control else []
        spans += [Span(text, kind, control) for text in names or [_text(encoder, ids, start, end)]]
    return Sample(example.source, fate, len(ids), sum(use(at)[0] == "learnt" for at in range(len(ids))), spans)


def render(checked: Check, console: Console | None = None) -> None:
    """Print all of it. Where there is no colour, what is learnt stands between ⟦ and ⟧."""
    console = console or Console()
    colour = console.color_system is not None and not console.no_color
    report, samples = checked.report, checked.samples
    blocks: list[RenderableType] = [_account(report), *_findings(report)]
    if report.lengths:
        blocks.append(_histogram(report.lengths, report, console.width))
    if advice := suggest(report):
        blocks.append(
            Group(
                *(
                    Text.assemble((f"suggested: {one.setting}: {one.value:g}", "bold"), f"  {one.reason}")
                    for one in advice
                )
            )
        )
    if any(one.spans for one in samples):
        blocks.append(_legend(samples, colour))
    whole = len({one.source for one in samples}) == 1
    blocks += [_row(one, colour, whole=whole) for one in samples]
    blocks += [Text(f"note: {visible(note)}") for note in report.notes]
    blocks += [Text.assemble(("refused: ", "bold red"), visible(line, keep="\n")) for line in report.refusals]
    for number, block in enumerate(blocks):
        if number:
            console.print()
        console.print(block, highlight=False)


def _text(encoder: Encoder, ids: list[int], start: int, end: int) -> str:
    """The text of ids[start:end]: what it adds to the text before it.

    A piece alone may decode differently (SentencePiece drops the first space), and a character in several tokens belongs
    to the last of them.
    """

    def up_to(at: int) -> str:
        text = str(encoder.tokenizer.decode(ids[:at], skip_special_tokens=False, clean_up_tokenization_spaces=False))
        complete = at == len(ids) or ids[at] in encoder.control_ids
        return text if complete else text.rstrip("\ufffd")

    before, after = up_to(start), up_to(end)
    if after.startswith(before):
        return after[len(before) :]
    return encoder.decode(ids[start:end])


def _find(data: DataSet, where: str) -> str:
    """The source of the row that begins at this file:line or has this line in it, or that is named whole."""
    alone = len(data.files) == 1
    whole = next((s for s in _sources(data) if where == s or (alone and where == s.rpartition(":")[2])), None)
    if whole:
        return whole
    file, _, line = where.rpartition(":")
    if not line.isdecimal() or (not file and len(data.files) > 1):
        raise ConfigError(f"row {where!r}: give file:line, as in {next(_sources(data))}")
    starts = []
    for number, source in enumerate(_sources(data)):
        name, _, start = source.rpartition(":")
        if not file or name == file or file.endswith(f"/{name}") or name.endswith(f"/{file}"):
            starts.append((int(start.partition(" ")[0]), -number, source))
    if not starts:
        names = sorted({source.rpartition(":")[0] for source in _sources(data)})
        raise ConfigError(f"row {where!r}: the rows are from {', '.join(names)}")
    before = [found for found in starts if found[0] <= int(line)]
    if not before:
        raise ConfigError(f"row {where!r}: the first row is {min(starts)[2]}")
    return max(before)[2]


def _sources(data: DataSet) -> Iterator[str]:
    for rows in (data.train, data.eval):
        if rows:
            yield from (row.source for row in rows.conversations)
            yield from (reject.source for reject in rows.rejects)


def _samples(source: str, data: DataSet, report: DataReport, encoder: Encoder) -> list[Sample]:
    """The row as it is encoded, its tokens after max_length marked, and what became of it."""
    rows = [row for side in (data.train, data.eval) if side for row in side.conversations if row.source == source]
    fate = _fate(source, report)
    try:
        examples = encoder.encode(rows[0]) if rows else []
    except DataError:
        examples = []
    if not examples:
        return [Sample(source, fate, 0, 0, [])]
    parts = [f" ({number} of {len(examples)})" for number in range(1, len(examples) + 1)] if len(examples) > 1 else [""]
    return [sample(e, encoder, fate + part, report.max_length) for e, part in zip(examples, parts, strict=True)]


def _fate(source: str, report: DataReport) -> str:
    for kind, rejects in report.dropped.items():
        for reject in rejects:
            if reject.source == source:
                return f"{_verb(report, kind)}: {reject.reason}"
    for pair in report.duplicates:
        if pair.source == source:
            return f"removed, equal to {pair.of}"
    kept = "held out" if source in report.held_out else "trained"
    return f"{kept}, cut to {report.max_length}" if any(row.source == source for row in report.truncated) else kept


def _verb(report: DataReport, kind: str) -> str:
    how = report.on_long_row if kind in ("too_long", "cut_off") else report.on_bad_row
    return "refused" if how == "error" else "dropped"


def _account(report: DataReport) -> Group:
    """A sum that the reader can check."""
    names = [visible(file.name) for file in report.files]
    title = ", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")
    table = Table(box=None, padding=(0, 2, 0, 0), show_header=False)
    table.add_column()
    table.add_column(justify="right")
    table.add_column(style="dim")
    table.add_row("trained", f"{report.num_trained:,}", _size(report.train_tokens))
    table.add_row("held out", f"{len(report.held_out):,}", _size(report.held_out_tokens))
    for kind, rows in report.dropped.items():
        if rows:
            table.add_row(f"{_verb(report, kind)}: {KINDS[kind]}", f"{len(rows):,}")
    table.add_row("duplicates removed", f"{len(report.duplicates):,}")
    table.add_row("= rows read", f"{report.num_rows:,}", style="bold")
    return Group(Text(title, "bold"), table)


def _size(tokens: Tokens) -> str:
    return f"{tokens.tokens:,} tokens, {100 * tokens.share_labelled:.0f} % learnt" if tokens.tokens else ""


def _findings(report: DataReport) -> Iterator[Text | Group]:
    """How many of each kind, then each with its first rows; those that stop training are in the refusals."""
    found = [one for one in report.findings if not (one.kind in KINDS and _verb(report, one.kind) == "refused")]
    counts = Counter(one.severity for one in found)
    words = [f"{count} {name}{'s' if count > 1 else ''}" for name, count in counts.items()]
    yield Text(f"findings: {', '.join(words) or 'none'}", "bold")
    for one in found:
        lines = [Text(visible(str(place))) for place in one.places[:_SHOWN]]
        more = [Text(f"and {len(one.places) - _SHOWN:,} more")] if len(one.places) > _SHOWN else []
        head = Text.assemble((one.severity, _SEVERITIES[one.severity]), (f": {one.headline}", "bold"))
        body = Group(*lines, *more, Text(f"→ {one.advice}", "dim"))
        yield Group(head, Padding(body, (0, 0, 0, 2), expand=False))


def _histogram(lengths: Lengths, report: DataReport, width: int) -> Group:
    """One bar for each bin, the cut between two of them, or below all."""
    head = Text(
        f"tokens a row: {lengths.min} to {lengths.max}, mean {lengths.mean}, median {lengths.median}, "
        f"90 % up to {lengths.p90}, 99 % up to {lengths.p99}"
    )
    most = max(one.rows for one in lengths.histogram)
    digits, figures = len(str(lengths.histogram[-1].high)), len(f"{most:,}")
    room = min(60, max(10, width - 2 * digits - figures - 8))
    over = sum(one.rows for one in lengths.histogram if one.low > report.max_length)
    words = {"drop": "dropped", "truncate": "cut", "error": "refused"}
    rest = f"{over:,} longer rows {words[report.on_long_row]}" if over else "no row is longer"
    cut = Rule(Text(f"max_length {report.max_length:,}: {rest}"), align="left", characters="┄", style="red")
    lines: list[Text | Rule] = []
    for one in lengths.histogram:
        if one.low > report.max_length and cut not in lines:
            lines.append(cut)
        bar = _bar(one.rows / most * room)
        style = "red" if one.low > report.max_length else "green"
        lines.append(Text.assemble(f"{one.low:>{digits}} - {one.high:>{digits}} {one.rows:>{figures},} ", (bar, style)))
    return Group(head, *lines, *([] if over else [cut]))


def _bar(eighths: float) -> str:
    """A bar of so many columns, in steps of an eighth; never empty where there is something."""
    whole, rest = divmod(max(round(eighths * 8), int(eighths > 0)), 8)
    return "█" * whole + _BLOCKS[rest].strip()


def _legend(samples: Sequence[Sample], colour: bool) -> Text:
    learnt = ("learnt", _STYLES["learnt", False]) if colour else "⟦learnt⟧"
    legend = Text.assemble(learnt, "  ", ("read only", _STYLES["read", False]), "  ▐control token▌  ↵ line break")
    if any(span.use == "cut" for one in samples for span in one.spans):
        legend.append("  ✂ end of max_length")
    return legend


def _row(one: Sample, colour: bool, *, whole: bool) -> Group:
    head = Text.assemble((visible(one.source), "bold"), f"  {visible(one.fate)}")
    if one.spans:
        head.append(f"  {one.num_tokens:,} tokens, {one.num_learnt:,} learnt", "dim")
    body = Text()
    learnt = False
    for span in one.spans:
        if not colour and learnt != (span.use == "learnt"):
            body.append("⟧" if learnt else "⟦")
        if span.use == "cut" and "✂" not in body.plain:
            body.append("✂")
        learnt = span.use == "learnt"
        body.append(_shown(span, whole), _STYLES[span.use, span.control])
    if learnt and not colour:
        body.append("⟧")
    if body.plain.endswith("\n"):
        body.right_crop(1)
    return Group(head, Padding(body, (0, 0, 0, 2), expand=False))


def _shown(span: Span, whole: bool) -> str:
    if span.control:
        return f"▐{visible(span.text)}▌"
    text = span.text
    if not whole and len(text) > _LONG_SPAN:
        half = _LONG_SPAN // 2
        return f"{_shown_text(text[:half])} … {len(text) - 2 * half:,} more characters … {_shown_text(text[-half:])}"
    return _shown_text(text)


def _shown_text(text: str) -> str:
    return visible(text, keep="\n").replace("\n", "↵\n")
