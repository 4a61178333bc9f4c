"""Raw rows -> Conversation: Alpaca, ShareGPT, OpenAI messages, prompt/completion, recognised by their columns.

| format              | columns                                                        | also read as                     |
|---------------------|----------------------------------------------------------------|----------------------------------|
| `messages`          | messages: [{role, content}], system                            |                                  |
| `sharegpt`          | conversations: [{from, value}], system                         | conversation                     |
| `alpaca`            | instruction, input, output, system, history: [[user, answer]]  | instruction: question, query     |
|                     |                                                                | input: context                   |
|                     |                                                                | output: response, answer         |
| `prompt_completion` | prompt, completion (text, or lists of turns), system           | prompt: input                    |
|                     |                                                                | completion: response, output,    |
|                     |                                                                | answer                           |

A row is the first format whose own columns it has, in the order of the table, then the first that fits with the names
on the right. Columns that no format knows are ignored. In CSV and Parquet a list may be written as JSON text.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

from lorikit.config import DataConfig
from lorikit.data.lines import MAX_ROW_CHARS, RowError
from lorikit.data.values import Conversation, Message, Role, answer_message
from lorikit.errors import ConfigError

_FORMATS: dict[str, dict[str, tuple[str, ...]]] = {
    "messages": {"messages": (), "system": ()},
    "sharegpt": {"conversations": ("conversation",), "system": ()},
    "alpaca": {
        "instruction": ("question", "query"),
        "input": ("context",),
        "output": ("response", "answer"),
        "system": (),
        "history": (),
    },
    "prompt_completion": {"prompt": ("input",), "completion": ("response", "output", "answer"), "system": ()},
}
_REQUIRED = {
    "messages": ("messages",),
    "sharegpt": ("conversations",),
    "alpaca": ("instruction", "output"),
    "prompt_completion": ("prompt", "completion"),
}
_ROLES: dict[str, Role] = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
}


class NoColumnsError(RowError):
    """The row has none of the sets of columns that make a conversation."""


@dataclass(frozen=True, slots=True)
class Layout:
    """How a row is laid out: its format, and what the row calls those of the format's own columns that it has."""

    format: str
    columns: dict[str, str]


class _Field(NamedTuple):
    """What a column is called in the row, for complaints, and what it holds."""

    name: str
    value: Any


def known_columns(config: DataConfig) -> frozenset[str]:
    """Every column name that could mean something with these settings. Raises ConfigError for an impossible mapping."""
    mapped = list(config.columns.values())
    if len(set(mapped)) < len(mapped):
        raise ConfigError(f"data.columns gives one column two meanings: {config.columns}")
    formats = _candidates(config)
    names = {name for form in formats for own, also in _FORMATS[form].items() for name in (own, *also)}
    return frozenset(names | set(mapped))


def converter(config: DataConfig) -> Callable[[Any, str], Conversation]:
    """The function (row, source) -> Conversation; a row without a system prompt of its own begins with `config.system`.

    It raises RowError with the reason a row cannot be used, NoColumnsError where its columns say nothing.
    """
    layout_of = lru_cache(256)(lambda columns: find_layout(columns, config))  # most rows have the columns of the last
    return lambda row, source: Conversation(_convert(row, config, layout_of), source)


def _convert(row: Any, config: DataConfig, layout_of: Callable[[tuple[str, ...]], Layout]) -> tuple[Message, ...]:
    if not isinstance(row, Mapping):
        raise RowError(f"the row is {_kind(row)} where an object with named columns belongs")
    layout = layout_of(tuple(row))
    fields = {own: _Field(layout.columns.get(own, own), None) for own in _FORMATS[layout.format]}
    fields |= {own: _Field(name, row[name]) for own, name in layout.columns.items()}
    if layout.format == "alpaca":
        messages = _alpaca(fields, config)
    elif layout.format == "prompt_completion":
        messages = _prompt_completion(fields)
    else:
        messages = _turns(_list(*fields[_REQUIRED[layout.format][0]]))
    _check_order(messages)
    system = _optional_text(*fields["system"])
    if messages[0].role != "system":
        system = system if system.strip() else config.system or ""
        messages = [Message("system", system), *messages] if system else messages
    elif system.strip():
        raise RowError(f"two system prompts: the column {fields['system'].name!r} and a system turn")
    return tuple(messages)


def find_layout(columns: Iterable[str], config: DataConfig) -> Layout:
    """The format of a row with these columns. Raises NoColumnsError that lists the columns found and those expected."""
    present = set(columns)
    formats = _candidates(config)
    for synonyms in (False, True):
        for form in formats:
            if all(_name_in(present, form, own, synonyms, config) is not None for own in _REQUIRED[form]):
                found = {own: _name_in(present, form, own, True, config) for own in _FORMATS[form]}
                return Layout(form, {own: name for own, name in found.items() if name is not None})
    shown = ", ".join(repr(name[:40]) for name in sorted(present)[:20]) or "none"
    expected = ", or ".join(" and ".join(config.columns.get(own, own) for own in _REQUIRED[form]) for form in formats)
    raise NoColumnsError(
        f"no recognised columns: found {shown}; expected {expected}; "
        f"name yours with data.columns, such as {_suggestion(present, formats)}"
    )


def _suggestion(present: set[str], formats: Iterable[str]) -> str:
    """A mapping that would do where the columns are known ones in other letters, else one to see how it is written."""
    plain = {name.strip().casefold(): name for name in sorted(present)}
    for form in formats:
        names = {own: [plain[n] for n in (own, *_FORMATS[form][own]) if n in plain] for own in _REQUIRED[form]}
        if all(names.values()):
            return "{" + ", ".join(f"{own}: {_as_yaml(found[0])}" for own, found in names.items()) + "}"
    return "{instruction: question, output: answer}"


def _as_yaml(name: str) -> str:
    return name if name.isidentifier() else json.dumps(name, ensure_ascii=False)


def _name_in(present: set[str], form: str, own: str, synonyms: bool, config: DataConfig) -> str | None:
    """What the format's own column is called among the columns present, if it is there."""
    if own in config.columns:
        names: tuple[str, ...] = (config.columns[own],)
    else:
        names = (own, *_FORMATS[form][own]) if synonyms else (own,)
        names = tuple(name for name in names if name not in config.columns.values())
    return next((name for name in names if name in present), None)


def _candidates(config: DataConfig) -> list[str]:
    formats = list(_FORMATS) if config.format == "auto" else [config.format]
    fitting = [form for form in formats if set(config.columns) <= set(_FORMATS[form])]
    if not fitting:
        known = "; ".join(f"{form}: {', '.join(_FORMATS[form])}" for form in formats)
        raise ConfigError(
            f"data.columns maps {', '.join(config.columns)}, which no format has together; the columns are {known}"
        )
    return fitting


def _alpaca(fields: Mapping[str, _Field], config: DataConfig) -> list[Message]:
    instruction, extra = checked_text(*fields["instruction"]), _optional_text(*fields["input"])
    separator = config.input_separator
    if separator is None:
        separator = "" if config.template == "tutorial" else "\n"
    prompt = instruction + separator + extra if instruction and extra else instruction + extra
    return [
        *_history(*fields["history"]),
        Message("user", _filled("the prompt", prompt)),
        _assistant(*fields["output"]),
    ]


def _history(name: str, pairs: Any) -> list[Message]:
    messages = []
    for number, pair in enumerate([] if pairs in (None, "") else _list(name, pairs), 1):
        where = f"{name} {number}"
        if not isinstance(pair, list) or len(pair) != 2:
            raise RowError(f"{where} is {_kind(pair)} where a pair [user, assistant] belongs")
        messages.append(Message("user", _filled(f"{where}, user", pair[0])))
        messages.append(_assistant(f"{where}, assistant", pair[1]))
    return messages


def _prompt_completion(fields: Mapping[str, _Field]) -> list[Message]:
    prompt, completion = fields["prompt"], fields["completion"]
    messages = _turns(prompt.value) if isinstance(prompt.value, list) else [Message("user", _filled(*prompt))]
    if isinstance(completion.value, list):
        return messages + _turns(completion.value, len(messages))
    return [*messages, _assistant(*completion)]


def _turns(turns: list[Any], before: int = 0) -> list[Message]:
    return [_turn(turn, f"turn {number}") for number, turn in enumerate(turns, before + 1)]


def _turn(turn: Any, where: str) -> Message:
    if not isinstance(turn, Mapping):
        raise RowError(f"{where} is {_kind(turn)} where an object with role and content belongs")
    spelling = _first(turn, "role", "from")
    if not isinstance(spelling, str):
        raise RowError(f"{where}: the role is {_kind(spelling)}; allowed: {', '.join(_ROLES)}")
    if spelling not in _ROLES:
        raise RowError(f"{where}: unknown role {spelling[:40]!r}; allowed: {', '.join(_ROLES)}")
    for key in ("tool_calls", "function_call"):
        if turn.get(key):
            raise RowError(f"{where}: {key} cannot be learned yet; only text can")
    if turn.get("weight") not in (None, 1):
        raise RowError(f"{where}: a weight other than 1 is not supported; see data.train_on")
    where = f"{where} ({spelling})"
    role, content = _ROLES[spelling], _first(turn, "content", "value")
    if isinstance(content, list):
        content = "".join(_part(where, part) for part in content)
    name = _optional_text(f"{where}, name", turn.get("name")) or None
    if role == "assistant":
        return _assistant(where, content, name, turn.get("reasoning_content"))
    if role == "system":  # an empty one is a choice: some chat templates put their own where there is none
        return Message(role, checked_text(where, content), name)
    return Message(role, _filled(where, content), name)


def _first(turn: Mapping[str, Any], *keys: str) -> Any:
    return next((turn[key] for key in keys if turn.get(key) is not None), None)


def _part(where: str, part: Any) -> str:
    if not isinstance(part, Mapping) or part.get("type") != "text":
        kind = part.get("type") if isinstance(part, Mapping) else _kind(part)
        raise RowError(f"{where}: only parts of type 'text' can be learned, this one is {str(kind)[:40]!r}")
    return checked_text(f"{where}, text part", part.get("text"))


def _assistant(where: str, content: Any, name: str | None = None, reasoning: Any = None) -> Message:
    """An answer. What it says between <think> and </think> at its very beginning is its reasoning."""
    text = checked_text(where, content)
    thought = None if reasoning is None else checked_text(f"{where}, reasoning_content", reasoning)
    found = answer_message(text)
    if found.reasoning is not None and thought is not None:
        raise RowError(f"{where}: the reasoning stands twice, in reasoning_content and in <think>")
    return Message("assistant", _filled(where, found.content), name, found.reasoning if thought is None else thought)


def _check_order(messages: list[Message]) -> None:
    """System first or not at all, then user and assistant turn by turn, the assistant last."""
    if not messages:
        raise RowError("the conversation has no turns")
    for number, message in enumerate(messages, 1):
        previous = messages[number - 2].role if number > 1 else None
        if message.role == "system" and number > 1:
            raise RowError(f"turn {number} is a system turn; it may only be the first")
        if message.role == "assistant" and previous in (None, "system"):
            raise RowError(
                f"turn {number}, the first after the system prompt if any, is the assistant's: begin with user"
            )
        if message.role == previous:
            raise RowError(f"turns {number - 1} and {number} are both {previous} turns: user and assistant alternate")
    if messages[-1].role != "assistant":
        raise RowError(f"the last turn is a {messages[-1].role} turn: there is no answer to learn")


def _list(where: str, value: Any) -> list[Any]:
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            raise RowError(f"{where} is text, and not a list written as JSON") from None
    if not isinstance(value, list):
        raise RowError(f"{where} is {_kind(value)} where a list belongs")
    return value


def _optional_text(where: str, value: Any) -> str:
    return "" if value is None else checked_text(where, value)


def _filled(where: str, value: Any) -> str:
    text = checked_text(where, value)
    if not text.strip():
        raise RowError(f"{where} is empty")
    return text


def checked_text(where: str, value: Any) -> str:
    """The text itself; nothing is converted, because what is not text here is a mistake somewhere."""
    if not isinstance(value, str):
        raise RowError(f"{where} is {_kind(value)} where text belongs")
    if "\0" in value:
        raise RowError(f"{where} holds a NUL character, number {value.index(chr(0)) + 1}: remove it")
    if len(value) > MAX_ROW_CHARS:
        raise RowError(f"{where} is longer than {MAX_ROW_CHARS // 2**20} Mi characters: split it")
    if not value.isascii():
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as error:
            half = ord(value[error.start])
            raise RowError(f"{where} holds half a character, \\u{half:04x}, at number {error.start + 1}") from None
    return value


def _kind(value: Any) -> str:
    if isinstance(value, float) and math.isnan(value):
        return "NaN"
    known = {type(None): "null", bool: "true or false", str: "text", list: "a list", dict: "an object"}
    known |= {int: "a number", float: "a number", bytes: "bytes"}
    return known.get(type(value), f"of type {type(value).__name__}")
