"""The forgetting panel: forty short questions that most instruct models can answer, before and after training.

    kept: right before and after     lost: right before only     gained: right after only

The questions are about nothing that a user trains; what is lost is what training took away. An answer is right where one
of the accepted texts stands in it as whole words, or where the whole answer matches the pattern.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from math import comb
from typing import Literal

Kind = Literal["knowledge", "instruction", "arithmetic", "language"]
Outcome = Literal["kept", "lost", "gained", "never"]

_UNSPACED = re.compile(r"[\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff]")  # writing without spaces has no whole words


@dataclass(frozen=True, slots=True)
class Question:
    """One question of the panel, with either texts to accept or a pattern for the whole answer."""

    name: str
    kind: Kind
    question: str
    accept: tuple[str, ...] = ()
    pattern: str | None = None

    def is_right(self, answer: str) -> bool:
        """Whether this answer is right; case, width and what else is said do not matter to accepted texts."""
        if self.pattern is not None:
            return re.fullmatch(self.pattern, answer, re.DOTALL) is not None
        said = unicodedata.normalize("NFKC", answer).casefold()
        return any(_stands_in(unicodedata.normalize("NFKC", text).casefold(), said) for text in self.accept)


@cache
def panel() -> tuple[Question, ...]:
    """The questions, in their order."""
    rows = json.loads(files("lorikit.report").joinpath("panel.json").read_text(encoding="utf-8"))
    return tuple(Question(**row | {"accept": tuple(row.get("accept", ()))}) for row in rows)


def outcome(before: bool, after: bool) -> Outcome:
    """What became of one question."""
    if before:
        return "kept" if after else "lost"
    return "gained" if after else "never"


def chance(outcomes: Sequence[Outcome]) -> float:
    """How likely at least so many of the changed answers would be losses if losing and gaining were a toss-up.

    The one-sided sign test on paired answers (McNemar 1947, exact): 1 where nothing changed.
    """
    lost, gained = outcomes.count("lost"), outcomes.count("gained")
    changed = lost + gained
    return float(sum(comb(changed, n) for n in range(lost, changed + 1)) / 2**changed)


def _stands_in(text: str, said: str) -> bool:
    if _UNSPACED.search(text):
        return text in said
    return re.search(rf"(?<![\w.]){re.escape(text)}(?!\w|\.\d)", said) is not None
