"""Text to token ids in one go, many texts at a time, where nothing in them stands for something else.

A tokenizer merges across the place where an answer begins, which generation cannot know. So one more control token, the
border, is put there: a tokenizer treats what stands on either side of a control token by itself. The border is taken out of
the ids again, and its places are the counts of ids before each answer.

    '<|start|>assistant\\n' BORDER 'Yes.<|eot_id|>'  ->  [start, assistant, \\n] | [Yes, ., eot]
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from tokenizers import AddedToken, Tokenizer

if TYPE_CHECKING:
    from tokenizers import Encoding

ANCHOR = "\U0010fffd"
"""The private-use character that a border or a place holder is spelled with; no row may hold it."""


@dataclass(frozen=True, slots=True)
class Rendered:
    """What a template made of a conversation: its text, the control tokens that characters in it stand for, and the places,
    in characters, that no token may span."""

    text: str
    standins: dict[str, str]
    cuts: Sequence[int] = ()


@dataclass(frozen=True, slots=True)
class Encoded:
    """Token ids, the number of ids before each cut, and for each control token its index and where its text ends."""

    ids: list[int]
    counts: list[int]
    controls: list[tuple[int, int]]


@dataclass(frozen=True, slots=True)
class Border:
    """A tokenizer that knows the border. `control` has the id of each control token by its text; `marks` is 1 at the ids of
    those and of the border, 0 at all others."""

    tokenizer: Tokenizer
    border_id: int
    control: dict[str, int]
    pattern: re.Pattern[str] | None
    marks: bytes

    @classmethod
    def of(cls, spec: dict[str, Any], control: Mapping[int, AddedToken]) -> Border | None:
        """For the tokenizer with this specification; None where one of its control tokens is more than its characters: takes
        the white space beside it along, or is found as a whole word only."""
        if any(token.single_word or token.lstrip or token.rstrip for token in control.values()):
            return None
        tokenizer = Tokenizer.from_str(json.dumps({**spec, "truncation": None, "padding": None}))
        known = tokenizer.get_vocab(with_added_tokens=True)
        tokenizer.add_special_tokens([AddedToken(ANCHOR, special=True, normalized=False)])
        border_id = tokenizer.token_to_id(ANCHOR)
        if border_id is None or border_id in known.values():
            return None
        marks = bytearray(max(border_id, *known.values()) + 1)
        for i in (border_id, *control):
            marks[i] = 1
        ids = {token.content: i for i, token in control.items()}
        return cls(tokenizer, border_id, ids, pattern(list(ids)), bytes(marks))

    def fits(self, rendered: Rendered) -> bool:
        """Whether `encode` may know what to do with this text."""
        # What stands before a border at the very start would be no start any more.
        return not rendered.standins and 0 not in rendered.cuts and ANCHOR not in rendered.text

    def encode(self, texts: Sequence[Rendered]) -> list[Encoded | None]:
        """Of each the ids and places; None where control tokens are not just where the text spells them."""
        bordered = [_with_borders(text) for text in texts]
        if len(bordered) == 1:
            # On this thread: the others are not worth waking, and a process that used them forks badly.
            encodings: list[Encoding] = [self.tokenizer.encode(bordered[0], add_special_tokens=False)]
        else:
            encodings = self.tokenizer.encode_batch_fast(bordered, add_special_tokens=False)
        return [self._without_borders(one.ids, text) for one, text in zip(encodings, texts, strict=True)]

    def _without_borders(self, ids: list[int], text: Rendered) -> Encoded | None:
        spelled = list(self.pattern.finditer(text.text)) if self.pattern else []
        counts: list[int] = []
        controls: list[tuple[int, int]] = []
        for place in self._marked(ids):
            at = place - len(counts)
            if ids[place] == self.border_id:
                counts.append(at)
                continue
            match = spelled[len(controls)] if len(controls) < len(spelled) else None
            if match is None or self.control[match[0]] != ids[place]:
                return None
            controls.append((at, match.end()))
        cuts = sorted(set(text.cuts))
        if len(controls) != len(spelled) or len(counts) != len(cuts):
            return None
        for count in counts:  # each time where the border is once those before it are gone
            del ids[count]
        known = dict(zip(cuts, counts, strict=True))
        return Encoded(ids, [known[cut] for cut in text.cuts], controls)

    def _marked(self, ids: list[int]) -> Iterator[int]:
        """Places of control tokens and borders, ascending."""
        flags = bytes([self.marks[i] for i in ids])
        place = flags.find(1)
        while place >= 0:
            yield place
            place = flags.find(1, place + 1)


def pattern(contents: list[str]) -> re.Pattern[str] | None:
    """Any of these texts, the longest first as the tokenizer matches them."""
    contents = sorted((c for c in contents if c), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, contents))) if contents else None


def _with_borders(rendered: Rendered) -> str:
    edges = [0, *sorted(set(rendered.cuts)), len(rendered.text)]
    return ANCHOR.join(rendered.text[left:right] for left, right in pairwise(edges))
