"""What a reader of the data should know beside the counts: each finding with its rows, how bad it is and what to do.

An error is something that must not be trained or cannot be, a warning something that makes the model worse or its
evaluation untrue, a note something to know. Findings stop nothing; what stops a run is in `DataReport.refusals`.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from lorikit.data.account import KINDS, DataReport, Finding, Kind, Place, SameAs, Severity
from lorikit.data.characters import suspicious
from lorikit.data.near import near_groups
from lorikit.data.privacy import personal, secrets
from lorikit.data.split import prompt_key
from lorikit.data.values import Conversation, Reject
from lorikit.data.writing import script

SHORT_ANSWER = 3
"""Characters up to which an answer is called short."""

_ORDER: dict[Severity, int] = {"error": 0, "warning": 1, "note": 2}
_DROPPED: dict[Kind, tuple[Severity, str]] = {
    "unreadable": ("error", "mend them in the file; data.on_bad_row: skip trains on the others"),
    "refused": ("error", "mend them in the file; data.on_bad_row: skip trains on the others"),
    "too_long": ("warning", "raise data.max_length, or split the rows"),
    "cut_off": ("warning", "raise data.max_length: the prompt alone fills it"),
}
_QUOTED = 40


@dataclass(frozen=True, slots=True)
class Kept:
    """A row that is trained or held out, and the key of its prompt group."""

    row: Conversation
    group: bytes
    held_out: bool


def find(
    report: DataReport, rows: Sequence[Conversation], kept: Sequence[Kept]
) -> tuple[dict[str, int], list[Finding]]:
    """Kept rows by the writing system of their last answer, and all findings, the worst first.

    `rows` are all that could be read, `kept` those of them that are used.
    """
    scripts = [script(_answer(one.row)) for one in kept]
    counts = Counter(name or "none" for name in scripts)
    found = [
        *_dropped(report),
        *_of_texts(rows),
        *_leaks(report, kept),
        *_several_answers(rows),
        *_near_duplicates(kept),
        *_short([one.row for one in kept]),
        *_said_before(report),
        *_languages([one.row for one in kept], scripts, counts),
    ]
    return dict(counts.most_common()), sorted(found, key=lambda one: _ORDER[one.severity])


def _finding(kind: str, severity: Severity, title: str, places: list[Place], advice: str) -> Iterator[Finding]:
    if places:
        yield Finding(kind, severity, title, places, advice)


def _dropped(report: DataReport) -> Iterator[Finding]:
    """Rows that are not trained, or not whole."""
    for kind, rejects in report.dropped.items():
        severity, advice = _DROPPED[kind]
        how = report.on_long_row if kind in ("too_long", "cut_off") else report.on_bad_row
        title = f"{'refused' if how == 'error' else 'dropped'}, {KINDS[kind]}"
        yield from _finding(kind, severity, title, _rejected(rejects), advice)
    advice = "the model learns answers without an end; raise data.max_length or set data.on_long_row: drop"
    yield from _finding("truncated", "warning", "truncated", _rejected(report.truncated), advice)
    title = "rows with characters the tokenizer has no tokens for: they are lost"
    yield from _finding("lost_text", "warning", title, _rejected(report.lost_text), "replace these characters")


def _rejected(rejects: Sequence[Reject]) -> list[Place]:
    return [Place((row.source,), row.reason) for row in rejects]


def _of_texts(rows: Sequence[Conversation]) -> Iterator[Finding]:
    """What can be seen in a text alone."""
    hidden = "take them out and make them invalid where they came from; lorikit check --fix OUT drops these rows"
    yield from _finding("secrets", "error", "keys or passwords, which a model can repeat", _seen(rows, secrets), hidden)
    advice = "replace them by made-up ones, unless they are meant to be public"
    yield from _finding("personal_data", "warning", "personal data", _seen(rows, personal), advice)
    title = "invisible, misplaced or wrongly decoded characters"
    advice = "lorikit check --fix OUT writes a file without them"
    yield from _finding("characters", "warning", title, _seen(rows, suspicious), advice)


def _seen(rows: Sequence[Conversation], look: Callable[[str], list[str]]) -> list[Place]:
    """The rows in whose texts `look` sees something. Equal texts, such as one system prompt for all, are looked at once."""
    known: dict[str, list[str]] = {}
    places = []
    for row in rows:
        seen: list[str] = []
        for turn in row.messages:
            for text in (turn.content, turn.reasoning, turn.name):
                if not text:
                    continue
                if turn.role != "system":
                    seen += look(text)
                    continue
                if text not in known:
                    known[text] = look(text)
                seen += known[text]
        if seen:
            places.append(Place((row.source,), "; ".join(dict.fromkeys(seen))))
    return places


def _leaks(report: DataReport, kept: Sequence[Kept]) -> Iterator[Finding]:
    """Held-out rows whose prompt is trained too. Rows held out of the training files cannot be: groups are kept whole."""
    title = "held-out rows whose prompt is also trained, so that their loss says little"
    advice = "take these rows out of eval.data, or out of the training files"
    exact = [Place((pair.source,), f"asks what {pair.of} asks") for pair in report.leaks]
    yield from _finding("leaks", "warning", title, exact, advice)
    trained: dict[bytes, str] = {}
    prompts = {prompt_key(one.row) for one in kept if not one.held_out}
    for one in kept:
        if not one.held_out:
            trained.setdefault(one.group, one.row.source)
    near = [
        Place((one.row.source,), f"asks nearly what {trained[one.group]} asks")
        for one in kept
        if one.held_out and one.group in trained and prompt_key(one.row) not in prompts
    ]
    yield from _finding("near_leaks", "warning", "held-out rows whose prompt is trained in other words", near, advice)


def _several_answers(rows: Sequence[Conversation]) -> Iterator[Finding]:
    """Prompts with more than one answer, the most asked first; later copies of a row count."""
    asked: defaultdict[bytes, list[Conversation]] = defaultdict(list)
    for row in rows:
        asked[prompt_key(row)].append(row)
    places = []
    for same in asked.values():
        answers = len({(row.messages[-1].content, row.messages[-1].reasoning) for row in same})
        if answers > 1:
            detail = f"{answers:,} answers to {_quote(_question(same[0]))}"
            places.append(Place(tuple(row.source for row in same), detail))
    places.sort(key=lambda place: -len(place.rows))
    advice = "keep the answer you want, unless the variety is meant: the model learns a mixture"
    yield from _finding("several_answers", "warning", "rows whose prompt has several answers", places, advice)


def _near_duplicates(kept: Sequence[Kept]) -> Iterator[Finding]:
    """Rows of one prompt group whose answers are nearly equal."""
    roots = near_groups([_answer(one.row) for one in kept], [one.group for one in kept])
    places = [
        Place((one.row.source,), f"says nearly what {kept[root].row.source} says: {_quote(_question(one.row))}")
        for number, (one, root) in enumerate(zip(kept, roots, strict=True))
        if root != number
    ]
    advice = "keep one of each: copies weigh as much as all the other rows"
    yield from _finding("near_duplicates", "warning", "nearly equal rows", places, advice)


def _short(kept: Sequence[Conversation]) -> Iterator[Finding]:
    """Answers of a few characters; a note where they are the rule, as in a data set of labels."""
    answers = ((row.source, _answer(row).strip()) for row in kept)
    places = [Place((source,), _quote(answer)) for source, answer in answers if len(answer) <= SHORT_ANSWER]
    labels = 2 * len(places) > len(kept)
    title = f"answers of at most {SHORT_ANSWER} characters"
    advice = (
        "as it is with labels"
        if labels
        else "they teach to answer shortly and little else; write them out or leave them out"
    )
    yield from _finding("short_answers", "note" if labels else "warning", title, places, advice)


def _said_before(report: DataReport) -> Iterator[Finding]:
    copies = _equal(report.duplicates)
    yield from _finding("duplicates", "note", "duplicates", copies, "nothing: only the first of equal rows is trained")
    spelled = [Place((source,)) for source in report.control_text]
    title = "rows that spell a control token, kept as plain text"
    yield from _finding("control_text", "note", title, spelled, "nothing, unless the token came from another template")


def _equal(pairs: Sequence[SameAs]) -> list[Place]:
    return [Place((pair.source,), f"equals {pair.of}") for pair in pairs]


def _languages(
    kept: Sequence[Conversation], scripts: Sequence[str | None], counts: Mapping[str, int]
) -> Iterator[Finding]:
    """Answers in another writing system than most."""
    named = {name: count for name, count in counts.items() if name != "none"}
    if len(named) < 2:
        return
    main = max(named, key=lambda name: named[name])
    share = 100 * named[main] / sum(named.values())
    places = [
        Place((row.source,), f"{name}: {_quote(_answer(row))}")
        for row, name in zip(kept, scripts, strict=True)
        if name not in (None, main)
    ]
    title = f"answers in another writing system than most, which are {main} ({share:.0f} %)"
    yield from _finding("languages", "note", title, places, "nothing, if you mean the model to answer in both")


def _answer(row: Conversation) -> str:
    return row.messages[-1].content


def _question(row: Conversation) -> str:
    return row.messages[-2].content if len(row.messages) > 1 else ""


def _quote(text: str) -> str:
    """The beginning of a text for a report; nothing of one that holds what a report should not spread."""
    line = " ".join(text.split())
    if secrets(line) or personal(line):
        return "(not shown: it holds a key or personal data)"
    return f"“{line[:_QUOTED]}…”" if len(line) > _QUOTED else f"“{line}”"
