"""What rows are built from: lines that someone said, or questions with their answers, and what became of each line.

A `Material` is one file. Every line of a text, every record of a table, has exactly one fate in it.
"""

from __future__ import annotations

import codecs
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from lorikit.data.lines import undecodable
from lorikit.data.probe import check_regular, is_binary, mark_of
from lorikit.errors import DataError

MaterialKind = Literal["script", "chat", "table", "faq"]
_MARKS = re.compile("^\ufeff+", re.MULTILINE)
Fate = Literal[
    "answer",
    "question",
    "other speaker",
    "nothing before it",
    "heading",
    "direction",
    "narration",
    "before the first",
    "no speaker",
    "no text",
    "no question",
    "no answer",
    "cannot be read",
    "blank",
]
"""What became of a line. `question` is also an earlier turn that is kept as history."""


@dataclass(frozen=True, slots=True)
class Said:
    """What one person said without a break. `lines` are the numbers of the lines or records it stands in."""

    speaker: str
    text: str
    lines: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Pair:
    """A question with its answer, and the line it starts on."""

    question: str
    answer: str
    line: int


@dataclass(slots=True)
class Material:
    """One file, read. `scenes` are lists of turns that belong together: no answer reaches over the end of one.

    `fates` has every line by its number from 1; those of what was said are only known once a role is chosen.
    """

    name: str
    kind: MaterialKind
    unit: Literal["line", "record"]
    fates: dict[int, Fate] = field(default_factory=dict)
    scenes: list[list[Said]] = field(default_factory=list)
    pairs: list[Pair] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    reasons: dict[int, str] = field(default_factory=dict)

    def mark(self, lines: Iterable[int], fate: Fate) -> None:
        """Say what became of these lines."""
        self.fates |= dict.fromkeys(lines, fate)

    def counts(self) -> dict[Fate, int]:
        """How many lines had each fate, the most common first."""
        return dict(Counter(self.fates.values()).most_common())


def read_text(path: Path) -> list[str]:
    """The lines of a text file in UTF-8, or in UTF-16 or 32 with a byte order mark, without their ends.

    Raises DataError for a file that is missing, empty, not text or in another encoding, and says where.
    """
    try:
        check_regular(path)
        data = path.read_bytes()
    except FileNotFoundError:
        raise DataError(f"{path}: no such file") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from None
    mark, encoding = mark_of(data)
    if not mark and is_binary(data[: 2**16]):
        raise DataError(f"{path}: binary data, or UTF-16 without a byte order mark; save it as text in UTF-8")
    if encoding.startswith("utf-8"):
        text = data.removeprefix(codecs.BOM_UTF8).decode("utf-8", "surrogateescape")
        if problem := undecodable(text, len(mark)):
            raise DataError(f"{path}: {problem}")
    else:
        try:
            text = data.decode(encoding)
        except UnicodeDecodeError as error:
            raise DataError(f"{path}: damaged {encoding} text ({error.reason}); save it as UTF-8") from None
    if not text.strip():
        raise DataError(f"{path}: the file is empty")
    if "\0" in text:
        line = text[: text.index("\0")].count("\n") + 1
        raise DataError(f"{path}:{line}: holds a NUL character: remove it")
    text = _MARKS.sub("", text)  # files that were joined
    lines = text.replace("\r\n", "\n").replace("\r", "\n").split("\n")
    return lines[:-1] if not lines[-1] else lines
