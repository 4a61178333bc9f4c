"""The account of a data set: what became of every row, how long the rows are, what is learnt of them."""

from __future__ import annotations

from bisect import bisect_right, insort
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from lorikit.data.values import IGNORE, Example, Reject

Kind = Literal["unreadable", "refused", "too_long", "cut_off"]
KINDS: dict[Kind, str] = {
    "unreadable": "cannot be read",
    "refused": "cannot be trained as written",
    "too_long": "longer than max_length",
    "cut_off": "no answer left after the cut",
}
"""Why rows are dropped, in the words of the report."""

_MAX_BINS = 16


@dataclass(frozen=True, slots=True)
class DataFile:
    """A file that rows came from, so that a report can be checked against it. `size` in bytes."""

    name: str
    used_for: Literal["train", "eval"]
    size: int
    sha256: str


@dataclass(frozen=True, slots=True)
class SameAs:
    """A row that says what an earlier one says: a removed copy, or a row of eval.data whose prompt is trained."""

    source: str
    of: str


Severity = Literal["error", "warning", "note"]


@dataclass(frozen=True, slots=True)
class Place:
    """Rows of one finding that belong together, by their sources, and what is the matter with them."""

    rows: tuple[str, ...]
    detail: str = ""

    def __str__(self) -> str:
        where = self.rows[0] + (f" and {len(self.rows) - 1:,} more" if len(self.rows) > 1 else "")
        return f"{where}: {self.detail}" if self.detail else where


@dataclass(frozen=True, slots=True)
class Finding:
    """Something that a reader of the data should know: what, in which rows, how bad, and what to do about it."""

    kind: str
    severity: Severity
    title: str
    places: list[Place]
    advice: str

    @property
    def num_rows(self) -> int:
        """Rows that it concerns."""
        return sum(len(place.rows) for place in self.places)

    @property
    def headline(self) -> str:
        """The finding in one line, with its number of rows."""
        groups = (
            f" in {len(self.places):,} group{'s' if len(self.places) > 1 else ''}"
            if self.num_rows > len(self.places)
            else ""
        )
        return f"{self.title} ({self.num_rows:,}{groups})"

    def to_dict(self) -> dict[str, Any]:
        """JSON values; `rows` counts them."""
        head = {"kind": self.kind, "severity": self.severity, "title": self.title, "advice": self.advice}
        places = [{"rows": list(place.rows), "detail": place.detail} for place in self.places]
        return head | {"rows": self.num_rows, "places": places}


@dataclass(frozen=True, slots=True)
class Tokens:
    """Sizes of a set of Examples. `labelled` counts the targets; a label at position 0 is none, nothing precedes it."""

    examples: int
    tokens: int
    labelled: int

    @property
    def share_labelled(self) -> float:
        """Labelled tokens of all tokens, 0 to 1."""
        return self.labelled / self.tokens if self.tokens else 0.0

    def to_dict(self) -> dict[str, float]:
        """The counts and the share, rounded, as JSON values."""
        return asdict(self) | {"share_labelled": round(self.share_labelled, 4)}


@dataclass(frozen=True, slots=True)
class Bin:
    """Rows of `low` to `high` tokens, both included."""

    low: int
    high: int
    rows: int


@dataclass(frozen=True, slots=True)
class Lengths:
    """Tokens a row, before any cut. Percentiles are nearest ranks; max_length is never inside a bin of the histogram."""

    min: int
    median: int
    mean: float
    p90: int
    p99: int
    max: int
    histogram: list[Bin]


@dataclass(frozen=True, slots=True)
class DataReport:
    """The account of one data set; every row is in exactly one of the counts, and every list is complete.

    `lengths` has all rows that could be encoded, those over max_length too. `leaks` are rows of eval.data whose prompt
    is also trained. `control_text` names rows that spell a control token, which stays text,
    `lost_text` rows with characters that the tokenizer has no tokens for. `findings` has these and all else that was
    noticed, the worst first; `scripts` counts the kept rows by the writing system of their last answer. `refusals` says why
    training would stop at this data, and is empty if it would not. `fingerprint` is a sha256 over all ids and labels.
    """

    files: list[DataFile]
    num_rows: int
    num_trained: int
    held_out: list[str]
    dropped: dict[Kind, list[Reject]]
    duplicates: list[SameAs]
    truncated: list[Reject]
    leaks: list[SameAs]
    control_text: list[str]
    lost_text: list[Reject]
    train_tokens: Tokens
    held_out_tokens: Tokens
    lengths: Lengths | None
    max_length: int
    on_long_row: str
    on_bad_row: str
    notes: list[str]
    refusals: list[str]
    fingerprint: str
    findings: list[Finding] = field(default_factory=list)
    scripts: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        assert self.num_rows == self.num_trained + len(self.held_out) + self.num_dropped + len(self.duplicates)

    @property
    def num_dropped(self) -> int:
        """Rows dropped, for whatever reason."""
        return sum(map(len, self.dropped.values()))

    @property
    def refused(self) -> bool:
        """Whether training would stop at this data."""
        return bool(self.refusals)

    @property
    def rejects(self) -> list[Reject]:
        """The bad rows, for rejects.jsonl."""
        return [*self.dropped["unreadable"], *self.dropped["refused"]]

    def to_dict(self) -> dict[str, Any]:
        """JSON values, for data_report.json and --json."""
        return {
            "rows": {
                "read": self.num_rows,
                "trained": self.num_trained,
                "held_out": len(self.held_out),
                "dropped": self.num_dropped,
                "duplicates": len(self.duplicates),
            },
            "refusals": self.refusals,
            "findings": [finding.to_dict() for finding in self.findings],
            "scripts": self.scripts,
            "notes": self.notes,
            "train": self.train_tokens.to_dict(),
            "held_out": self.held_out_tokens.to_dict(),
            "max_length": self.max_length,
            "on_long_row": self.on_long_row,
            "on_bad_row": self.on_bad_row,
            "lengths": asdict(self.lengths) if self.lengths else None,
            "files": [asdict(file) for file in self.files],
            "fingerprint": self.fingerprint,
            "dropped": {kind: _plain(rows) for kind, rows in self.dropped.items()},
            "truncated": _plain(self.truncated),
            "duplicates": [asdict(pair) for pair in self.duplicates],
            "leaks": [asdict(pair) for pair in self.leaks],
            "control_text": self.control_text,
            "lost_text": _plain(self.lost_text),
            "held_out_rows": self.held_out,
        }


def _plain(rows: Sequence[Reject]) -> list[dict[str, str]]:
    return [{"source": row.source, "reason": row.reason} for row in rows]


def num_labelled(labels: list[int]) -> int:
    """Labels that are a target: not IGNORE and not at position 0."""
    return len(labels) - labels.count(IGNORE) - (labels[:1] not in ([], [IGNORE]))


def count_tokens(examples: Iterable[Example]) -> Tokens:
    """How much there is to read and to learn in these Examples."""
    pairs = [(len(example.input_ids), num_labelled(example.labels)) for example in examples]
    return Tokens(len(pairs), sum(tokens for tokens, _ in pairs), sum(labelled for _, labelled in pairs))


def measure(num_tokens: Iterable[int], max_length: int) -> Lengths | None:
    """Lengths of rows in tokens; None for no rows."""
    ordered = sorted(num_tokens)
    if not ordered:
        return None

    def rank(percent: int) -> int:
        return ordered[(len(ordered) * percent + 99) // 100 - 1]

    return Lengths(
        min=ordered[0],
        median=rank(50),
        mean=round(sum(ordered) / len(ordered), 1),
        p90=rank(90),
        p99=rank(99),
        max=ordered[-1],
        histogram=_histogram(ordered, rank(99), max_length),
    )


def _histogram(ordered: list[int], p99: int, max_length: int) -> list[Bin]:
    """Bins of a round width up to the 99th percentile, one for the longer rest, and an edge at max_length."""
    spread = p99 - ordered[0] + 1
    width = next(w for zeros in range(12) for w in (10**zeros, 2 * 10**zeros, 5 * 10**zeros) if spread <= _MAX_BINS * w)
    edges = list(range((ordered[0] - 1) // width * width, p99 + width, width))
    if edges[-1] < ordered[-1]:
        edges.append(ordered[-1])
    if edges[0] < max_length < edges[-1] and max_length not in edges:
        insort(edges, max_length)
    below = [bisect_right(ordered, edge) for edge in edges]
    return [Bin(edges[i] + 1, edges[i + 1], below[i + 1] - below[i]) for i in range(len(edges) - 1)]
