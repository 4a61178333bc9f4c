"""A file of prompts -> the conversations to answer: read and checked as rows of training data are, but without answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorikit.config import DataConfig
from lorikit.data.formats import converter
from lorikit.data.lines import RowError
from lorikit.data.rows import raw_rows
from lorikit.data.values import Message
from lorikit.errors import DataError

if TYPE_CHECKING:
    from lorikit.infer.generate import Answer

MAX_LINES_SHOWN = 20
_FORMATS = {
    "prompt": converter(DataConfig(train="prompts", format="prompt_completion")),
    "messages": converter(DataConfig(train="prompts", format="messages")),
}
_ANSWER = {"role": "assistant", "content": "answer"}  # makes a prompt a whole row for the time of the checks


@dataclass(frozen=True, slots=True)
class Prompt:
    """A question: its messages, the last one of the user, and the row of JSON it came from."""

    messages: tuple[Message, ...]
    row: dict[str, Any]


def read_prompts(path: str | Path) -> list[Prompt]:
    """The prompts of a JSONL file, one {"prompt": text} or {"messages": [{"role", "content"}, ...]} a line.

    A row may have a "system" text; keys without a meaning are left alone, and empty lines passed over. Raises one
    DataError with `file:line: reason` for each bad line.
    """
    prompts, wrong = [], []
    for raw in raw_rows(Path(path), {*_FORMATS, "system"}):
        try:
            if raw.problem:
                raise raw.problem
            prompts.append(_prompt(raw.value))
        except RowError as error:
            wrong.append(f"{path}:{raw.line}: {error}")
    if wrong:
        raise DataError("\n".join(first(wrong)))
    if not prompts:
        raise DataError(f'{path}: holds no prompt; give one {{"prompt": "..."}} or {{"messages": [...]}} a line')
    return prompts


def prompt_of(text: str) -> Prompt:
    """One question of a user; DataError if it is empty or not text."""
    try:
        return _prompt({"prompt": text})
    except RowError as error:
        raise DataError(str(error)) from None


def conversation_of(prompt: str | Sequence[Message | Mapping[str, Any]]) -> tuple[Message, ...]:
    """The messages of a text or of a list of turns; DataError for what is neither, or ends in an answer."""
    if isinstance(prompt, str):
        return prompt_of(prompt).messages
    turns = [asdict(turn) if isinstance(turn, Message) else turn for turn in prompt]
    turns = [{key: value for key, value in turn.items() if value is not None} for turn in turns]
    try:
        return _prompt({"messages": turns}).messages
    except RowError as error:
        raise DataError(f"the prompt: {error}") from None


def answer_rows(prompts: Sequence[Prompt], answers: Sequence[Answer]) -> list[dict[str, Any]]:
    """What `generate --json` prints: {"prompt" or "messages", "answer", "finish", "tokens"} in the order of prompts."""
    rows = []
    for prompt, given in zip(prompts, answers, strict=True):
        asked = {key: prompt.row[key] for key in _FORMATS if key in prompt.row}
        rows.append({**asked, "answer": given.text, "finish": given.finish, "tokens": given.num_tokens})
    return rows


def first(complaints: Sequence[str]) -> list[str]:
    """As many complaints as fit a screen, and how many more there are."""
    more = len(complaints) - MAX_LINES_SHOWN
    return [*complaints[:MAX_LINES_SHOWN], f"and {more} more"] if more > 0 else list(complaints)


def _prompt(row: Any) -> Prompt:
    keys = [key for key in _FORMATS if isinstance(row, Mapping) and key in row]
    if len(keys) != 1:
        found = ", ".join(str(key)[:40] for key in row) if isinstance(row, Mapping) else "something else"
        raise RowError(f'give an object with either "prompt" or "messages"; found {found or "nothing"}')
    (key,) = keys
    turns = row[key]
    if key == "messages" and not (isinstance(turns, list) and turns):
        raise RowError("messages is not a list of turns, each with role and content")
    if isinstance(turns, list) and turns and isinstance(turns[-1], Mapping) and turns[-1].get("role") == "assistant":
        raise RowError("the last turn is an assistant turn: there is nothing to answer")
    answered = {"messages": [*turns, _ANSWER]} if key == "messages" else {"completion": _ANSWER["content"]}
    conversation = _FORMATS[key]({**row, **answered}, "")
    return Prompt(conversation.messages[:-1], dict(row))
