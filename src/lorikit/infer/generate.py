"""Conversations -> answers: batched for a list of prompts, or one answer as a stream of readable text.

The ids that generation starts from and the text of what it gives both come from the Encoder, as in training.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
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
    stop: Sequence[str] = (),
) -> list[Answer]:
    """One Answer to each conversation, in their order; `done` hears the number of finished answers. An answer ends before
    the first of the texts in `stop`.

    Raises ConfigError for impossible sampling values and one DataError that lists every conversation which leaves no
    room for an answer.
    """
    check_sampling(sampling, stop)
    prompts, limits = _prepare(session, conversations, sampling)
    given = [_Given(session.encoder, stop) for _ in prompts]
    answers: dict[int, Answer] = {}
    for limit in sorted(set(limits), reverse=True):  # one, unless a prompt leaves less room than max_new_tokens
        group = [i for i, own in enumerate(limits) if own == limit]
        limited = replace(sampling, max_new_tokens=limit)
        tokens = session.engine.generate([prompts[i] for i in group], limited, session.encoder.stop_ids)
        with closing(tokens):
            while any(i not in answers for i in group):
                token = next(tokens)
                i = group[token.prompt]
                finish = None if i in answers else given[i].add(token)  # its stop text may have been there already
                if finish:
                    answers[i] = Answer(tuple(conversations[i]), given[i].text, given[i].num_tokens, finish)
                    if done:
                        done(len(answers))
    return [answers[i] for i in range(len(prompts))]


def stream(session: Session, messages: Sequence[Message], sampling: Sampling, stop: Sequence[str] = ()) -> Stream:
    """The answer to one conversation, piece by piece; raises what `answer` raises, before the first piece."""
    check_sampling(sampling, stop)
    (ids,), (limit,) = _prepare(session, [messages], sampling)
    return Stream(session, ids, replace(sampling, max_new_tokens=limit), stop)


class Stream(Iterator[str]):
    """Pieces of text whose sum is the text of the answer; none holds half a character, a stop token or a stop text's start.

    `text`, `num_tokens`, `seconds` and `finish` (None: not at its end) say how far it is, also after an interruption.
    `close` stops the model.
    """

    def __init__(self, session: Session, ids: Sequence[int], sampling: Sampling, stop: Sequence[str] = ()) -> None:
        self.text = ""
        self.num_tokens = 0
        self.seconds = 0.0
        self.finish: Finish | None = None
        self._pieces = self._run(session, ids, sampling, stop)

    def __iter__(self) -> Stream:
        return self

    def __next__(self) -> str:
        piece = next(self._pieces)
        self.text += piece
        return piece

    def close(self) -> None:
        """Stop the model where it is."""
        self._pieces.close()

    def _run(self, session: Session, ids: Sequence[int], sampling: Sampling, stop: Sequence[str]) -> Generator[str]:
        started = time.perf_counter()
        given = _Given(session.encoder, stop)
        with closing(session.engine.generate([ids], sampling, session.encoder.stop_ids)) as tokens:
            for token in tokens:
                shown = len(given.text)
                self.finish = given.add(token)
                self.num_tokens, self.seconds = given.num_tokens, time.perf_counter() - started
                if len(given.text) > shown:
                    yield given.text[shown:]
                if self.finish:
                    return


class _Given:
    """What has come of an answer: `text`, which can no longer change, and `num_tokens`, stop tokens left out."""

    def __init__(self, encoder: Encoder, stop: Sequence[str]) -> None:
        self.text, self.num_tokens = "", 0
        self._words, self._stops = Detokenizer(encoder), StopTexts(stop)

    def add(self, token: Token) -> Finish | None:
        """How the answer ends, if it does with this token."""
        piece = ""
        if token.finish != "stop":
            self.num_tokens += 1
            piece = self._words.add(token.id)
        if token.finish:
            piece += self._words.end()
        self.text += self._stops.add(piece)
        if self._stops.found:
            return "stop"
        if token.finish:
            self.text += self._stops.end()
            return _finish(token)
        return None


class StopTexts:
    """Text, piece by piece, up to the first of some texts: `found` once it was there.

    The end of a piece is held back while it may be the beginning of one of them. Where several are found at once the one that
    begins first counts.
    """

    def __init__(self, stop: Sequence[str]) -> None:
        self.found: str | None = None
        self._stop = tuple(stop)
        self._held = ""

    def add(self, piece: str) -> str:
        """What can be shown now."""
        if self.found is not None:
            return ""
        text, self._held = self._held + piece, ""
        places = [(text.find(s), -len(s), s) for s in self._stop if s in text]
        if places:
            at, _, self.found = min(places)
            return text[:at]
        longest = max((len(s) for s in self._stop), default=0)
        for size in range(min(longest - 1, len(text)), 0, -1):
            if any(s.startswith(text[-size:]) for s in self._stop):
                self._held = text[-size:]
                return text[:-size]
        return text

    def end(self) -> str:
        """What was held back and is no beginning after all."""
        rest, self._held = self._held, ""
        return rest


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


def check_sampling(sampling: Sampling, stop: Sequence[str] = ()) -> None:
    """Raise a ConfigError that names every value which is not possible."""
    allowed = {
        "max_new_tokens": (sampling.max_new_tokens >= 1, "at least 1"),
        "temperature": (0 <= sampling.temperature < math.inf, "0 (greedy) or more"),
        "top_p": (0 < sampling.top_p <= 1, "above 0, at most 1 (off)"),
        "top_k": (sampling.top_k >= 0, "0 (off) or more"),
        "min_p": (0 <= sampling.min_p <= 1, "0 (off) to 1"),
        "repetition_penalty": (0 < sampling.repetition_penalty < math.inf, "above 0; 1 is off"),
        "seed": (sampling.seed is None or 0 <= sampling.seed < 2**63, "0 or more"),
    }
    wrong = [f"{name} is {getattr(sampling, name)}: {rule}" for name, (fits, rule) in allowed.items() if not fits]
    if "" in stop:
        wrong.append("stop holds an empty text: every answer would end at once")
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
