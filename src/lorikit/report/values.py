"""What a comparison is made of: plain numbers and texts, as they stand in compare.json."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from math import exp
from typing import Any, Literal

from lorikit.report.panel import Outcome

Word = Literal["learned", "overfitted", "overfitted later", "not learned", "forgets", "unproven"]
Tone = Literal["good", "bad", "plain"]


@dataclass(frozen=True, slots=True)
class RowLoss:
    """One row: cross entropy summed over its labelled tokens, of the base and of the tuned model, in nats."""

    source: str
    base: float
    tuned: float
    tokens: int


@dataclass(frozen=True, slots=True)
class Losses:
    """Losses of base and tuned model on the same rows. `num_rows` of `of_rows` were looked at.

    `base` and `tuned` are nats a labelled token. `gain` is their difference and `error` its standard error over rows,
    None for a single row.
    """

    num_rows: int
    of_rows: int
    tokens: int
    base: float
    tuned: float
    gain: float
    error: float | None
    rows_better: int

    @property
    def is_better(self) -> bool:
        """Lower than the base's by more than two standard errors, and by more than a hundredth of it."""
        return self.error is not None and self.gain > max(2 * self.error, 0.01 * self.base)

    @property
    def is_worse(self) -> bool:
        """Higher than the base's by more than two standard errors, and by more than a hundredth of it."""
        return self.error is not None and -self.gain > max(2 * self.error, 0.01 * self.base)

    @property
    def perplexities(self) -> tuple[float, float]:
        """exp of both losses, base first; capped where a float would overflow."""
        return exp(min(self.base, 700.0)), exp(min(self.tuned, 700.0))


@dataclass(frozen=True, slots=True)
class Fit:
    """Whether answers follow from their questions: how much likelier an answer is after its own question than after another
    row's, in nats a token, with the standard error over rows. `num_rows` rows, each against one or two other questions."""

    num_rows: int
    base: float
    base_error: float
    tuned: float
    tuned_error: float


@dataclass(frozen=True, slots=True)
class Said:
    """One greedy answer. `stopped`: the model ended it by itself, before the longest answer allowed."""

    text: str
    stopped: bool
    tokens: int


@dataclass(frozen=True, slots=True)
class Asked:
    """A held-out row: its last question, the answer that stands in the data, and both models' answers."""

    source: str
    question: str
    reference: str
    base: Said
    tuned: Said


@dataclass(frozen=True, slots=True)
class Panelled:
    """A question of the forgetting panel with both answers and what became of it."""

    name: str
    kind: str
    question: str
    base: Said
    tuned: Said
    outcome: Outcome


@dataclass(frozen=True, slots=True)
class NearCopy:
    """A tuned answer that nearly repeats the answer of a training row which asks something else. `alike` is Jaccard's index."""

    question: str
    answer: str
    source: str
    alike: float


@dataclass(frozen=True, slots=True)
class Side:
    """What one model did with the held-out questions. `chrf` is sacrebleu's, 0 to 100, None where that is not installed."""

    exact: int
    chrf: float | None
    stopped: int


@dataclass(frozen=True, slots=True)
class Curve:
    """What metrics.jsonl says of the held-out loss: where it was lowest, where it ended, which step was saved, of how many."""

    lowest: float
    lowest_step: int
    last: float
    last_step: int
    saved_step: int
    saved: float
    num_steps: int
    epoch_of_lowest: float


@dataclass(frozen=True, slots=True)
class Reason:
    """One finding in a sentence, and whether it speaks for the run or against it."""

    text: str
    tone: Tone


@dataclass(frozen=True, slots=True)
class Verdict:
    """What became of the run, the gravest word first, with a sentence, the reasons, what cannot be known, and what to do."""

    words: tuple[Word, ...]
    sentence: str
    reasons: tuple[Reason, ...]
    unknown: tuple[str, ...] = ()
    advice: tuple[str, ...] = ()

    @property
    def title(self) -> str:
        """As in "learned, but forgets"."""
        first, *rest = self.words
        joint = ", but " if first == "learned" else " and "
        return joint.join([first, *rest])


@dataclass(frozen=True, slots=True)
class Comparison:
    """Everything that `lorikit compare` found out about one run.

    `rows_sha256` names the held-out rows that were looked at by what they say, `tokens_sha256` by their tokens: figures of two
    runs compare where these are equal. `unknown` says in plain words what could not be looked at and why.
    """

    run: str
    base_name: str
    adapter_sha256: str | None
    held_out: Losses | None
    trained: Losses | None
    fit: Fit | None
    answers: Sequence[Asked]
    base_side: Side | None
    tuned_side: Side | None
    panel: Sequence[Panelled]
    near_copies: Sequence[NearCopy]
    worst: Sequence[RowLoss]
    curve: Curve | None
    max_new_tokens: int
    rows_sha256: str | None
    tokens_sha256: str | None
    seconds: float
    device: str
    unknown: Sequence[str] = field(default_factory=tuple)

    def outcomes(self) -> list[Outcome]:
        """What became of each question of the panel."""
        return [one.outcome for one in self.panel]

    def to_dict(self) -> dict[str, Any]:
        """JSON values, without the verdict."""
        values = asdict(self)
        for name in ("held_out", "trained"):
            losses: Losses | None = getattr(self, name)
            if losses:
                base, tuned = losses.perplexities
                values[name] |= {"base_perplexity": base, "tuned_perplexity": tuned}
        return values
