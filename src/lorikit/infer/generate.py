"""Conversations -> answers: batched for a list of prompts, or one answer as a stream of readable text.

The ids that generation starts from and the text of what it gives both come from the Encoder, as in training.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from lorikit.data.values import Message
from lorikit.errors import ConfigError, DataError
from lorikit.infer.prompts import first
from lorikit.model.engine import Sampling, Token

if TYPE_CHECKING:
    from lorikit.data.encode import Encoder
    from lorikit.infer.session import Session

Finish = Literal["stop", "length"]

_BYTE_TOKEN = re.compile(r"<0x[0-9A-Fa-f]{2}>")
_REPLACEMENT = "\ufffd"


@dataclass(frozen=True, slots=True)
class Answer:
    """What the model said to `prompt`. `num_tokens` leaves out the stop token; `finish` is "length" for an answer cut
    at max_new_tokens or at the model's longest sequence."""

    prompt: tuple[Message, ...]
    text: str
    num_tokens: int
    finish: Finish


def answer(
    session: Session,
    conversations: Sequence[Sequence[Message]],
    sampling: Sampling,
    done: Callable[[int], None] | None = None,
) -> list[Answer]:
    """One Answer to each conversation, in their order; `done` hears the number of finished answers.

    Raises ConfigError for impossible sampling values and one DataError that lists every conversation which leaves no
    room for an answer.
    """
    check_sampling(sampling)
    prompts, limits = _prepare(session, conversations, sampling)
    given: list[list[int]] = [[] for _ in prompts]
    answers: dict[int, Answer] = {}
    for limit in sorted(set(limits), reverse=True):  # one, unless a prompt leaves less room than max_new_tokens
        group = [i for i, own in enumerate(limits) if own == limit]
        limited = replace(sampling, max_new_tokens=limit)
        for token in session.engine.generate([prompts[i] for i in group], limited, session.encoder.stop_ids):
            i = group[token.prompt]
            if token.finish != "stop":
                given[i].append(token.id)
            if token.finish:
                text, finish = session.encoder.decode(given[i]), _finish(token)
                answers[i] = Answer(tuple(conversations[i]), text, len(given[i]), finish)
                if done:
                    done(len(answers))
    return [answers[i] for i in range(len(prompts))]


def stream(session: Session, messages: Sequence[Message], sampling: Sampling) -> Stream:
    """The answer to one conversation, piece by piece; raises what `answer` raises, before the first piece."""
    check_sampling(sampling)
    (ids,), (limit,) = _prepare(session, [messages], sampling)
    return Stream(session, ids, replace(sampling, max_new_tokens=limit))


class Stream(Iterator[str]):
    """Pieces of text whose sum is the text of the answer; none holds half a character or a stop token.

    `text`, `num_tokens`, `seconds` and `finish` (None: not at its end) say how far it is, also after an interruption.
    `close` stops the model.
    """

    def __init__(self, session: Session, ids: Sequence[int], sampling: Sampling) -> None:
        self.text = ""
        self.num_tokens = 0
        self.seconds = 0.0
        self.finish: Finish | None = None
        self._pieces = self._run(session, ids, sampling)

    def __iter__(self) -> Stream:
        return self

    def __next__(self) -> str:
        piece = next(self._pieces)
        self.text += piece
        return piece

    def close(self) -> None:
        """Stop the model where it is."""
        self._pieces.close()

    def _run(self, session: Session, ids: Sequence[int], sampling: Sampling) -> Generator[str]:
        started = time.perf_counter()
        words = Detokenizer(session.encoder)
        for token in session.engine.generate([ids], sampling, session.encoder.stop_ids):
            piece = ""
            if token.finish != "stop":
                self.num_tokens += 1
                piece = words.add(token.id)
            if token.finish:
                self.finish = _finish(token)
            self.seconds = time.perf_counter() - started
            if piece:
                yield piece
        rest = words.end()
        if rest:
            yield rest


class Detokenizer:
    """Ids, one at a time, to pieces of text whose sum equals the text of all ids.

    A piece is given out when nothing that follows can change it: after a whole character (text that ends in U+FFFD may
    be half of one) and after the last of a run of byte tokens (<0xE4>, which are read together, right or wrong). Only
    the ids since the piece before last are decoded, so that a long answer costs no more per token than a short one.
    """

    def __init__(self, encoder: Encoder) -> None:
        self._encoder = encoder
        self._ids: list[int] = []  # those of the last piece given out, then those not given out yet
        self._num_given = 0

    def add(self, token_id: int) -> str:
        """The text that `token_id` completes, often none."""
        name = self._encoder.tokenizer.convert_ids_to_tokens(token_id)
        if not isinstance(name, str) or token_id in self._encoder.silent_ids:
            return ""  # has no text: a row of the embedding without a token, or a special token
        self._ids.append(token_id)
        if _BYTE_TOKEN.fullmatch(name):
            return ""
        piece = self.end()
        if not piece or piece.endswith(_REPLACEMENT):
            return ""
        self._ids = self._ids[self._num_given :]
        self._num_given = len(self._ids)
        return piece

    def end(self) -> str:
        """What has not been given out, half characters included (as U+FFFD)."""
        before = self._encoder.decode(self._ids[: self._num_given])
        return self._encoder.decode(self._ids)[len(before) :]


def check_sampling(sampling: Sampling) -> None:
    """Raise a ConfigError that names every value which is not possible."""
    allowed = {
        "max_new_tokens": (sampling.max_new_tokens >= 1, "at least 1"),
        "temperature": (0 <= sampling.temperature < math.inf, "0 (greedy) or more"),
        "top_p": (0 < sampling.top_p <= 1, "above 0, at most 1 (off)"),
        "top_k": (sampling.top_k >= 0, "0 (off) or more"),
        "repetition_penalty": (0 < sampling.repetition_penalty < math.inf, "above 0; 1 is off"),
        "seed": (sampling.seed is None or 0 <= sampling.seed < 2**63, "0 or more"),
    }
    wrong = [f"{name} is {getattr(sampling, name)}: {rule}" for name, (fits, rule) in allowed.items() if not fits]
    if wrong:
        raise ConfigError("; ".join(wrong))


def _prepare(
    session: Session, conversations: Sequence[Sequence[Message]], sampling: Sampling
) -> tuple[list[list[int]], list[int]]:
    """The ids of each prompt and the most tokens that its answer may have; all that is wrong in one DataError."""
    prompts: list[list[int]] = []
    wrong = []
    for number, messages in enumerate(conversations, start=1):
        name = f"prompt {number}" if len(conversations) > 1 else "the prompt"
        try:
            ids = session.encoder.prompt_ids(messages)
        except DataError as error:
            wrong.append(f"{name}: {error}")
            continue
        if len(ids) >= session.max_length:
            wrong.append(
                f"{name} has {len(ids)} tokens; {session.name} takes {session.max_length}, the answer included: shorten "
                f"it by {len(ids) + 1 - session.max_length} tokens or more"
            )
        prompts.append(ids)
    if wrong:
        raise DataError("\n".join(first(wrong)))
    return prompts, [min(session.max_length - len(ids), sampling.max_new_tokens) for ids in prompts]


def _finish(token: Token) -> Finish:
    return "stop" if token.finish == "stop" else "length"
