"""Text to token ids such that text which came from the data can never become a control token.

A chat template mixes its own control tokens (<|eot_id|>) with text from the data. A tokenizer cannot tell them apart:
whoever types <|eot_id|> ends the turn. So every control token that stands in the data is replaced by one private-use
character before the template runs (`protect`); what the tokenizer then finds was written by the template; and the text
between two control tokens that holds such a character, or in which an answer begins, is encoded again by a tokenizer
that knows no control tokens at all (`encode`).

    data      'say <|eot_id|>'  ->  'say \\U000F0000'                  protect
    template  '<|start|>user\\n say \\U000F0000<|eot_id|>'             rendered
    ids       [start] + plain('user\\n say <|eot_id|>') + [eot]        encode

Text without such a character, which is nearly all, is encoded in one go and many at a time by `border`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from tokenizers import Tokenizer

from lorikit.data.border import ANCHOR, Border, Encoded, Rendered, pattern
from lorikit.errors import DataError, ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Private-use code points that stand for control tokens of the data.
_FIRST_STANDIN = 0xF0000
_LAST_STANDIN = 0xFFFFD


class SafeTokenizer:
    """A fast tokenizer of transformers, and its twin that knows no control tokens.

    `control_ids` are all special and added tokens but the unknown word and added white space (which is ordinary text in some
    vocabularies). `silent_ids` are those of them that are not shown in an answer.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if not isinstance(backend, Tokenizer):
            raise ModelError(
                f"{tokenizer.name_or_path}: needs a fast tokenizer (a tokenizer.json, or one transformers can convert); "
                f"this one is {type(tokenizer).__name__}"
            )
        spec = json.loads(backend.to_str())
        self._full = Tokenizer.from_str(json.dumps({**spec, "truncation": None, "padding": None}))
        added = tokenizer.added_tokens_decoder
        vocabulary: dict[str, int] = self._full.get_vocab(with_added_tokens=False)
        kept = [t for t in spec["added_tokens"] if _is_text(t, vocabulary)]
        kept_ids = {t["id"] for t in kept}
        self._unknown = tokenizer.unk_token_id
        # What a tokenizer gives for a character it does not know is no control token, though its name may be typed too.
        self.control_ids = frozenset(i for i in added if i not in kept_ids) - {self._unknown}
        self._plain = _without_control_tokens(spec, kept)
        self._control = pattern([t.content for i, t in added.items() if i not in kept_ids])
        # Tokens matched after normalisation (lower case, full width) cannot be found by looking at the raw text.
        normalized = [t for i, t in added.items() if i in self.control_ids and t.normalized]
        self._look_deeper = bool(normalized) and self._full.normalizer is not None
        self.silent_ids = frozenset(i for i in self.control_ids if added[i].special)
        self._border = None if self._look_deeper else Border.of(spec, {i: added[i] for i in self.control_ids})
        self._spelled: set[str] = set()
        self._lost: set[str] = set()
        self._cache: dict[str, list[int]] = {}
        largest = max([*added, *vocabulary.values()])
        self._ints = list(range(largest + 1))

    def protect(self, text: str, standins: dict[str, str], avoid: str) -> str:
        """`text` with each control token in it replaced by a character that is not in `avoid`; fills `standins`.

        Characters that stand for an equal token are shared. Raises DataError when the text uses up the private-use area.
        """
        if not text:
            return text
        if ANCHOR in text:
            raise DataError("holds the character U+10FFFD, which has no meaning in any text; remove it")

        def replace(found: str) -> str:
            for char, token in standins.items():
                if token == found:
                    return char
            start = max([ord(c) for c in standins] or [_FIRST_STANDIN - 1]) + 1
            for point in range(start, _LAST_STANDIN + 1):
                if chr(point) not in avoid:
                    standins[chr(point)] = found
                    return chr(point)
            raise DataError("uses the whole private-use plane U+F0000 to U+FFFFD; remove these characters")

        if self._control is not None:
            text = self._control.sub(lambda match: replace(match[0]), text)
        while self._look_deeper:
            encoding = self._full.encode(text, add_special_tokens=False)
            hits = [
                o for i, o in zip(encoding.ids, encoding.offsets, strict=True) if i in self.control_ids and o[0] < o[1]
            ]
            if not hits:
                break
            for start, end in reversed(hits):
                text = text[:start] + replace(text[start:end]) + text[end:]
        return text

    def lost(self, text: str) -> str:
        """The characters of `text` that the tokenizer cannot spell: they would be gone, or unknown, in its tokens."""
        chars = set(text)
        if chars <= self._spelled:
            return ""
        for char in chars - self._spelled - self._lost:
            ids = self._plain.encode(char, add_special_tokens=False).ids
            shown = self._plain.decode(ids, skip_special_tokens=False)
            readable = bool(shown.strip()) and "\ufffd" not in shown
            spelled = not char.strip() or char == "\ufffd" or (readable and self._unknown not in ids)
            (self._spelled if spelled else self._lost).add(char)
        return "".join(char for char in dict.fromkeys(text) if char in self._lost)

    def encode(self, rendered: str, standins: dict[str, str], cuts: Sequence[int] = ()) -> Encoded:
        """Token ids of a rendered template, and how many of them lie before each cut (a character position in it).

        No token spans a cut: what stands before it is encoded as if nothing followed, which is what generation sees.
        Without stand-ins and cuts the ids are those of the tokenizer itself.
        """
        return self.encode_all([Rendered(rendered, standins, cuts)])[0]

    def encode_all(self, texts: Sequence[Rendered]) -> list[Encoded]:
        """`encode` of each; of more than one text, on all processors."""
        quick = [text for text in texts if self._border and self._border.fits(text)]
        found = iter(self._border.encode(quick) if self._border else [])
        taken = {id(text): encoded for text, encoded in zip(quick, found, strict=True) if encoded}
        every = (taken.get(id(text)) or self._encode_by_runs(text.text, text.standins, text.cuts) for text in texts)
        # One object for equal ids of all rows: a fresh one each takes more memory than the list that holds it.
        return [replace(one, ids=[self._ints[i] for i in one.ids]) for one in every]

    def _encode_by_runs(self, rendered: str, standins: dict[str, str], cuts: Sequence[int]) -> Encoded:
        """`encode` for every text and tokenizer: whatever holds a stand-in or a cut is encoded again, run by run."""
        encoding = self._full.encode(rendered, add_special_tokens=False)
        ids: list[int] = []
        counts: dict[int, int] = {}
        controls: list[tuple[int, int]] = []
        run_ids: list[int] = []
        run_start = 0

        def close_run(end: int) -> None:
            """Add the text between two control tokens, rendered[run_start:end], to `ids`."""
            text = rendered[run_start:end]
            inside = sorted({cut for cut in cuts if run_start <= cut <= end})
            if not inside and not any(char in text for char in standins):
                ids.extend(run_ids)
                return
            edges = [run_start, *inside, end]
            for left, right in pairwise(edges):
                if left in inside:
                    counts[left] = len(ids)
                piece = rendered[left:right]
                if standins:
                    piece = "".join(standins.get(char, char) for char in piece)
                ids.extend(self._encode_plain(piece, first=left == 0))
            if end in inside:
                counts[end] = len(ids)

        for token_id, (start, end) in zip(encoding.ids, encoding.offsets, strict=True):
            if token_id in self.control_ids:
                close_run(start)
                controls.append((len(ids), end))
                ids.append(token_id)
                run_ids, run_start = [], end
            else:
                run_ids.append(token_id)
        close_run(len(rendered))
        return Encoded(ids, [counts[cut] for cut in cuts], controls)

    def _encode_plain(self, text: str, *, first: bool) -> list[int]:
        """`text` as ordinary words, in the state of the tokenizer at the start of the input or after a control token."""
        key = f"{int(first)}{text}"
        if key in self._cache:
            return self._cache[key]
        encoding = self._plain.encode(text if first else ANCHOR + text, add_special_tokens=False)
        ids = encoding.ids if first else encoding.ids[1:]
        if not self.control_ids.isdisjoint(ids):
            # A vocabulary that holds the control token as an ordinary piece: no piece can span the middle of its text.
            at = next(k for k, i in enumerate(encoding.ids) if i in self.control_ids)
            start, end = encoding.offsets[at]
            middle = start + max(1, (end - start) // 2) - (0 if first else len(ANCHOR))
            ids = self._encode_plain(text[:middle], first=first) + self._encode_plain(text[middle:], first=False)
        if len(self._cache) < 512 and len(text) < 64:  # the few texts that every row repeats: "assistant\n"
            self._cache[key] = ids
        return ids


def _is_text(token: dict[str, Any], vocabulary: dict[str, int]) -> bool:
    """Added white space, which Gemma-like vocabularies use for ordinary text."""
    return not token["special"] and not token["content"].strip() and vocabulary.get(token["content"]) == token["id"]


def _without_control_tokens(spec: dict[str, Any], kept: list[dict[str, Any]]) -> Tokenizer:
    anchor = {
        "id": max([t["id"] for t in spec["added_tokens"]] or [0]) + 1,
        "content": ANCHOR, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True,
    }  # fmt: skip
    plain = {**spec, "added_tokens": [*kept, anchor], "truncation": None, "padding": None, "post_processor": None}
    return Tokenizer.from_str(json.dumps(plain))
