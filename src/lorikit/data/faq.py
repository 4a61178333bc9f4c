"""Questions with answers in plain text or Markdown -> pairs.

    Q: How late is it?  /  **Q:** ...  /  问：...       A: Nine.  /  **A:** ...  /  答：...
    ## How do I pay?                                     the text below it is the answer
    **How do I pay?**                                    the same, on a line of its own

A text in which some lines begin with Q: and some with A: is read by these alone. Headings without text below are titles.
What stands between ``` is part of an answer, whatever it looks like.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Literal

from lorikit.data.material import Fate, Material, Pair

_MARKED = re.compile(
    r"\s*(?:[-*+]\s+|\d+[.)]\s+|#{1,6}\s+)?(?:\*\*|__)?(?P<side>Q|A|Question|Answer|问|答|問|问题|回答|提问)\s?\d{0,3}"
    r"\s*(?:[:：]|[.、](?=\s|\*))\s*(?P<text>.*)",
    re.IGNORECASE,
)
_ASKS = {"q", "question", "问", "問", "问题", "提问"}
_HEADING = re.compile(r"\s{0,3}(?P<level>#{1,6})\s+(?P<text>.*?)\s*#*\s*$")
_BOLD = re.compile(r"\s*(?:[-*+]\s+|\d+[.)]\s+)?(?P<mark>\*\*|__)(?P<text>(?:(?!\*\*|__).)+)(?P=mark)\s*$")
_RULE = re.compile(r"\s{0,3}(?:[-*_][ \t]*){3,}$")
_FENCE = re.compile(r"\s{0,3}(```|~~~)")

_Part = tuple[Literal["question", "answer", "text", "blank", "rule", "title"], str]


def read_faq(lines: Sequence[str], name: str) -> Material:
    """The pairs of a text, with the fate of each of its lines."""
    material = Material(name, "faq", "line")
    marked = is_marked(lines)
    parts = list(_parts(lines, marked=marked))
    entry: _Entry | None = None
    for number, (what, text) in enumerate(parts, 1):
        if what in ("question", "title"):
            if entry and what == "question" and entry.marked and not entry.answer:
                entry.question.append((number, text))  # a question of several lines, each with its mark
                continue
            _close(material, entry)
            entry = _Entry([(number, text)], marked=what == "question")
        elif what == "blank" and not (entry and entry.answer):
            material.fates[number] = "blank"
        elif what == "rule":
            _close(material, entry)
            entry, material.fates[number] = None, "heading"
        elif entry is None:
            material.fates[number] = "narration" if material.pairs else "before the first"
        elif what == "text" and entry.marked and not entry.answer:
            entry.question.append((number, text))
        else:
            entry.answer.append((number, text))
    _close(material, entry)
    return material


@dataclass(slots=True)
class _Entry:
    """A question and the lines below it, with their numbers. `marked`: its answer begins with a mark too."""

    question: list[tuple[int, str]]
    answer: list[tuple[int, str]] = field(default_factory=list)
    marked: bool = False


def is_marked(lines: Sequence[str]) -> bool:
    """Whether some lines begin with Q: or its like, and some with A:."""
    sides = {match["side"].casefold() in _ASKS for line in lines if (match := _MARKED.match(line))}
    return len(sides) == 2


def _parts(lines: Sequence[str], *, marked: bool) -> Iterator[_Part]:
    """What each line is, and its text."""
    fenced = False
    sections = _sections(lines)
    for number, line in enumerate(lines):
        fence = _FENCE.match(line) is not None
        if fenced or fence:
            fenced = fenced != fence
            yield "text", line.rstrip()
            continue
        yield ("rule", "") if number in sections and not marked else _part(line, marked)


def _sections(lines: Sequence[str]) -> set[int]:
    """The indices of headings over smaller headings, which are titles unless they ask something."""
    headings: list[tuple[int, int, str]] = []
    fenced = False
    for number, line in enumerate(lines):
        fenced ^= _FENCE.match(line) is not None
        if not fenced and (match := _HEADING.match(line)):
            headings.append((number, len(match["level"]), match["text"]))
    return {
        number
        for (number, level, text), (_, below, _) in pairwise(headings)
        if below > level and not text.rstrip("*_ ").endswith(("?", "？"))
    }


def _part(line: str, marked: bool) -> _Part:
    if not line.strip():
        return "blank", ""
    if _RULE.match(line):
        return "rule", ""
    if marked:
        if match := _MARKED.match(line):
            text = match["text"].strip()
            text = text.removeprefix("**").strip() if text.startswith("**") else text
            text = text.removesuffix("**").strip() if text.count("**") % 2 else text
            return ("question" if match["side"].casefold() in _ASKS else "answer"), text
        return ("rule", "") if _HEADING.match(line) else ("text", line.rstrip())
    if match := _HEADING.match(line) or _BOLD.match(line):
        return "title", match["text"].strip("*_ ")
    return "text", line.rstrip()


def _close(material: Material, entry: _Entry | None) -> None:
    """The entry as a pair, if it has both sides; its lines get their fates."""
    if entry is None:
        return
    while entry.answer and not entry.answer[-1][1].strip():
        number, _ = entry.answer.pop()
        material.fates[number] = "blank"
    question = "\n".join(text for _, text in entry.question).strip()
    answer = "\n".join(text for _, text in entry.answer).strip()
    numbers = [number for number, _ in entry.question], [number for number, _ in entry.answer]
    if question and answer:
        material.pairs.append(Pair(question, answer, numbers[0][0]))
    fates: tuple[Fate, Fate] = (
        ("question", "answer") if question and answer else ("no answer" if entry.marked else "heading", "no question")
    )
    for side, fate in zip(numbers, fates, strict=True):
        material.mark(side, fate)
