"""Blind votes: which of two answers was better, kept in the run folder that the vote is about.

A vote names the models only in the file; who votes sees A and B, in an order drawn anew for each question.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path

FILE = "votes.jsonl"


@dataclass(frozen=True, slots=True)
class Vote:
    """One vote. `winner` is one of `models`, or empty for a tie; `answers` in the order of `models`; `time` in seconds
    since 1970."""

    prompt: str
    models: tuple[str, str]
    answers: tuple[str, str]
    winner: str
    time: float


def new(prompt: str, models: tuple[str, str], answers: tuple[str, str], winner: str) -> Vote:
    """A vote given now."""
    return Vote(prompt, models, answers, winner, round(time.time(), 3))


def keep(run: Path, vote: Vote) -> None:
    """Append it to the run's votes.jsonl. OSError as open and write raise it."""
    with (run / FILE).open("ab") as file:
        file.write(json.dumps(asdict(vote), ensure_ascii=False).encode() + b"\n")


def tally(run: Path) -> Counter[str]:
    """Votes for each model, "" for ties; lines that are no votes are passed over."""
    counts: Counter[str] = Counter()
    try:
        text = (run / FILE).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return counts
    for line in text.splitlines():
        try:
            counts[str(json.loads(line)["winner"])] += 1
        except (ValueError, KeyError, TypeError):
            continue
    return counts
