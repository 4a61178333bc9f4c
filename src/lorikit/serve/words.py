"""Tokens of one answer -> text that may be shown, cut before a stop string, with the logprobs of its tokens.

Text that could be the beginning of a stop string is held back until it is known not to be one, so that what was sent
never has to be taken back.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

from lorikit.infer.generate import Detokenizer

if TYPE_CHECKING:
    from lorikit.data.encode import Encoder
    from lorikit.model.engine import Token

LEAST_LOGPROB = -9999.0  # stands for minus infinity, which JSON has not


@dataclass(frozen=True, slots=True)
class Piece:
    """Text to show now, often none, and the logprob entries of the tokens since the last piece."""

    text: str
    logprobs: tuple[dict[str, Any], ...]
    finish: str | None


class Words:
    """One answer as it comes. `num_tokens` counts what was generated, a stop token included, as OpenAI bills it."""

    def __init__(self, encoder: Encoder, stop: Sequence[str]) -> None:
        self._encoder, self._stop = encoder, [text for text in stop if text]
        self._detokenizer = Detokenizer(encoder)
        self._held = ""
        self.num_tokens = 0
        self.text = ""

    def add(self, token: Token) -> Piece:
        """What this token completes. `finish` is "stop" also where a stop string was found: then cancel the rest."""
        self.num_tokens += 1
        new = "" if token.finish == "stop" else self._detokenizer.add(token.id)
        if token.finish is not None:
            new += self._detokenizer.end()
        self._held += new
        found = min((at for text in self._stop if (at := self._held.find(text)) >= 0), default=-1)
        finish = "stop" if found >= 0 else token.finish
        if found >= 0:
            shown = self._held[:found]
        else:
            shown = self._held if finish else self._held[: len(self._held) - self._could_begin()]
        self._held = self._held[len(shown) :]
        self.text += shown
        entries = () if token.logprob is None or token.finish == "stop" else (_entry(self._encoder, token),)
        return Piece(shown, entries, finish)

    def _could_begin(self) -> int:
        """How many characters at the end of the held text could be the beginning of a stop string."""
        longest = max((len(text) for text in self._stop), default=1) - 1
        for size in range(min(longest, len(self._held)), 0, -1):
            if any(text.startswith(self._held[-size:]) for text in self._stop):
                return size
        return 0


def _entry(encoder: Encoder, token: Token) -> dict[str, Any]:
    """A token's logprob as /v1/chat/completions gives it."""

    def one(token_id: int, logprob: float) -> dict[str, Any]:
        raw = token_bytes(encoder, token_id)
        return {"token": raw.decode("utf-8", "replace"), "logprob": max(logprob, LEAST_LOGPROB), "bytes": list(raw)}

    assert token.logprob is not None
    return {**one(token.id, token.logprob), "top_logprobs": [one(*pair) for pair in token.top]}


def token_bytes(encoder: Encoder, token_id: int) -> bytes:
    """The bytes of one token, which may be part of a character; a control token gives its name."""
    name = encoder.tokenizer.convert_ids_to_tokens(token_id)
    if not isinstance(name, str):
        return b""
    if token_id in encoder.silent_ids:
        return name.encode()
    if len(name) == 6 and name.startswith("<0x") and name.endswith(">"):
        return bytes([int(name[3:5], 16)])
    text = encoder.decode([token_id])
    if "\ufffd" not in text:
        return text.encode()
    alphabet = _byte_alphabet()
    return bytes(alphabet[char] for char in name) if all(char in alphabet for char in name) else text.encode()


@cache
def _byte_alphabet() -> dict[str, int]:
    """The characters that byte-level tokenizers write bytes as (GPT-2's table): printable ones stand for themselves, the
    others, in order, for U+0100 and on."""
    own = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in own]
    return {chr(b): b for b in own} | {chr(0x100 + n): b for n, b in enumerate(others)}
