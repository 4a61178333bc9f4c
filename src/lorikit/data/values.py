"""The plain values that one stage of the data path hands to the next: Conversation -> Example -> Batch.

Shape suffixes: T tokens in a batch, N sequences in it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from torch import Tensor

IGNORE = -100
"""The label of a token that carries no loss, as in `torch.nn.functional.cross_entropy` and transformers."""

Role = Literal["system", "user", "assistant"]


@dataclass(frozen=True, slots=True)
class Message:
    """One turn. `name` and `reasoning` reach chat templates that know them (`reasoning` as `reasoning_content`)."""

    role: Role
    content: str
    name: str | None = None
    reasoning: str | None = None


def answer_message(text: str) -> Message:
    """An assistant turn; what it says between <think> and </think> at its very beginning is its reasoning."""
    if not text.startswith("<think>") or "</think>" not in text:
        return Message("assistant", text)
    thought, _, rest = text.removeprefix("<think>").partition("</think>")
    return Message("assistant", rest.lstrip("\r\n"), reasoning=thought.strip("\r\n"))


@dataclass(frozen=True, slots=True)
class Conversation:
    """One row of the data: an optional system turn, then user and assistant turns by turns, the assistant last.

    `source` names the row for every later complaint: "persona.json:17", where the number is the line the row starts on
    in JSON, JSONL and CSV files and the row index from 1 in Parquet files. Rows that share a line are "persona.json:1 row 2".
    """

    messages: tuple[Message, ...]
    source: str


@dataclass(frozen=True, slots=True)
class Reject:
    """A row that was not used, and why. `source` as in Conversation; printed as "file:line: reason".

    `row` is what the file holds there (its text if it could not be parsed), for rejects.jsonl.
    """

    source: str
    reason: str
    row: object = field(default=None, repr=False, compare=False)

    def __str__(self) -> str:
        return f"{self.source}: {self.reason}"


@dataclass(frozen=True, slots=True)
class Example:
    """Tokens and what to learn of them. `labels` has the length of `input_ids`, is not shifted, IGNORE for no loss."""

    input_ids: list[int]
    labels: list[int]
    source: str


@dataclass(frozen=True, slots=True)
class Batch:
    """Sequences packed end to end, without padding.

    input_ids, targets and position_ids are (T,) int64; targets are already shifted inside each sequence, the last token
    of a sequence has IGNORE; position_ids count from 0 in each sequence. cu_seqlens is (N+1,) int32, as flash attention
    takes it. num_targets counts the targets that are not IGNORE.
    """

    input_ids: Tensor
    targets: Tensor
    position_ids: Tensor
    cu_seqlens: Tensor
    max_seqlen: int
    num_targets: int

    @property
    def num_tokens(self) -> int:
        """T, the tokens of all sequences together."""
        return int(self.input_ids.shape[0])
