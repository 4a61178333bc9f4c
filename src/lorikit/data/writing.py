"""In which writing system a text is, by the Unicode blocks of its letters: not a language model and no dictionary.

It tells Chinese from English and Russian from Arabic. English, French and Vietnamese are all Latin to it.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from functools import lru_cache

# First and last code point of the letters of a writing system, ascending.
_BLOCKS: list[tuple[int, int, str]] = [
    (0x41, 0x5A, "Latin"), (0x61, 0x7A, "Latin"), (0xC0, 0x24F, "Latin"), (0x370, 0x3FF, "Greek"),
    (0x400, 0x52F, "Cyrillic"), (0x531, 0x58F, "Armenian"), (0x5D0, 0x5F2, "Hebrew"), (0x620, 0x77F, "Arabic"),
    (0x900, 0x97F, "Devanagari"), (0x980, 0x9FF, "Bengali"), (0xA00, 0xA7F, "Gurmukhi"), (0xA80, 0xAFF, "Gujarati"),
    (0xB00, 0xB7F, "Odia"), (0xB80, 0xBFF, "Tamil"), (0xC00, 0xC7F, "Telugu"), (0xC80, 0xCFF, "Kannada"),
    (0xD00, 0xD7F, "Malayalam"), (0xD80, 0xDFF, "Sinhala"), (0xE00, 0xE7F, "Thai"), (0xE80, 0xEFF, "Lao"),
    (0xF00, 0xFFF, "Tibetan"), (0x1000, 0x109F, "Myanmar"), (0x10A0, 0x10FF, "Georgian"), (0x1100, 0x11FF, "Hangul"),
    (0x1200, 0x137F, "Ethiopic"), (0x1780, 0x17FF, "Khmer"), (0x1800, 0x18AF, "Mongolian"), (0x1E00, 0x1EFF, "Latin"),
    (0x1F00, 0x1FFF, "Greek"), (0x3041, 0x30FF, "Kana"), (0x3400, 0x9FFF, "Han"), (0xAC00, 0xD7AF, "Hangul"),
    (0xF900, 0xFAFF, "Han"), (0xFF21, 0xFF5A, "Latin"), (0xFF66, 0xFF9F, "Kana"), (0x20000, 0x3FFFF, "Han"),
]  # fmt: skip
_STARTS = [first for first, _, _ in _BLOCKS]
_WEIGHT = {"Han": 3, "Kana": 2, "Hangul": 3}  # a sign says as much as some letters of an alphabet


def script(text: str) -> str | None:
    """The writing system with the most letters; None where there are none. Kana among Han is Kana: Japanese has both."""
    if text.isascii():
        return "Latin" if any(map(str.isalpha, text)) else None
    counts: Counter[str] = Counter()
    for char, times in Counter(text).items():
        if name := _script_of(char):
            counts[name] += times * _WEIGHT.get(name, 1)
    if counts["Kana"] * 10 >= counts["Han"]:
        counts["Kana"] += counts.pop("Han", 0) if counts["Kana"] else 0
    return max(counts, key=lambda name: (counts[name], name)) if counts.total() else None


@lru_cache(2**16)
def _script_of(char: str) -> str | None:
    first, last, name = _BLOCKS[max(0, bisect_right(_STARTS, ord(char)) - 1)]
    return name if first <= ord(char) <= last else None
