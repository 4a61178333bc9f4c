"""Text from the data, made so that it can neither steer a terminal or a page nor pass for our own marks."""

from __future__ import annotations

import unicodedata

MARKS = "⟦⟧▐▌↵✂"
"""What our views put between the characters of the data."""

_UNSEEN = {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}


def visible(text: str, keep: str = "") -> str:
    """`text` with escapes for what is invisible, moves the cursor or turns the direction, and for our own marks."""

    def shown(char: str) -> str:
        if char in keep:
            return char
        # Joiners are part of emoji and of Persian words, and harmless.
        if char in MARKS or (unicodedata.category(char) in _UNSEEN and char not in "\u200c\u200d"):
            return char.encode("unicode_escape").decode()
        return char

    return "".join(map(shown, text))
