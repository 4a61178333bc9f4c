"""Characters that nobody means to teach: invisible ones, those that turn the direction, and text decoded wrongly.

Some are harmless where they belong: joiners inside emoji and in Arabic or Indic words, direction marks beside right-to-left
letters, tags in the flags of Scotland and its like. Those are left alone.
"""

from __future__ import annotations

import re
import unicodedata

_SUSPECT = re.compile(
    "[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\xad\u061c\u180e\u200b-\u200f\u202a-\u202e\u2060-\u2069\ufeff\ufff9-\ufffb\ufffd"
    "\U000e0000-\U000e007f]"
)
_RIGHT_TO_LEFT = re.compile("[\u0590-\u08ff\ufb1d-\ufdff\ufe70-\ufeff]")
_JOINED = re.compile("[\u0600-\u08ff\u0900-\u0dff\u1000-\u109f\u1780-\u18af\U0001f000-\U0001faff\u2190-\u2bff\ufe0f]")
_FLAG = re.compile("\U0001f3f4[\U000e0020-\U000e007e]+\U000e007f")

# Bytes 0x80 to 0xBF as Latin-1 and as Windows-1252 show them: what follows the first byte of a UTF-8 character.
_NEXT = "[\x80-\xbf€‚ƒ„…†‡ˆ‰Š‹ŒŽ‘’“”•–—˜™š›œžŸ]"
_WRONGLY_DECODED = re.compile(
    f"[ÂÃ]{_NEXT}|â[\x80€]{_NEXT}|ð[\x9fŸ]{_NEXT}{{2}}|(?:[ÄÅÎÏÐÑ×ØÙ]{_NEXT}){{2,}}|(?:[à-ï]{_NEXT}{{2}}){{2,}}"
)


def suspicious(text: str) -> list[str]:
    """What is wrong with the characters of `text`, each kind once: "zero-width character U+200B", "mojibake 'Ã©'"."""
    found = dict.fromkeys(name for match in _suspects(text) for name in [_name(match[0])])
    if not text.isascii():
        found |= dict.fromkeys(f"mojibake {run!r}, should be {mended!r}" for run, mended in _mojibake(text))
    return list(found)


def repair(text: str) -> str:
    """`text` without them: mojibake is decoded again, the others go, U+FFFD stays, since what it stood for is lost."""
    while (
        mended := _repaired(text)
    ) != text:  # what was decoded wrongly twice needs it twice; each time it gets shorter
        text = mended
    return text


def _repaired(text: str) -> str:
    if not text.isascii():
        for run, mended in dict(_mojibake(text)).items():
            text = text.replace(run, mended)
    places = [match.start() for match in _suspects(text) if match[0] != "\ufffd"]
    for place in reversed(places):
        text = text[:place] + text[place + 1 :]
    return text


def _suspects(text: str) -> list[re.Match[str]]:
    """The matches of characters that do not belong where they are."""
    matches = list(_SUSPECT.finditer(text))
    if not matches:
        return []
    flags = [match.span() for match in _FLAG.finditer(text)]
    to_left = _RIGHT_TO_LEFT.search(text) is not None
    return [match for match in matches if not _belongs(text, match.start(), to_left, flags)]


def _belongs(text: str, place: int, to_left: bool, flags: list[tuple[int, int]]) -> bool:
    char = text[place]
    if char in "\u200c\u200d":
        return bool(place and _JOINED.match(text[place - 1]) and _JOINED.match(text[place + 1 : place + 2] or " "))
    if char in "\u061c\u200e\u200f":
        return to_left
    return any(start <= place < end for start, end in flags)


def _name(char: str) -> str:
    code = f"U+{ord(char):04X}"
    if char == "\ufffd":
        return f"replacement character {code}: something was lost in decoding"
    if "\U000e0000" <= char <= "\U000e007f":
        return f"hidden tag character {code}"
    if unicodedata.category(char) == "Cc":
        return f"control character {code}"
    if char in "\u061c\u200e\u200f" or "\u202a" <= char <= "\u202e" or "\u2066" <= char <= "\u2069":
        return f"character that turns the direction of text {code}"
    return f"zero-width character {code}"


def _mojibake(text: str) -> list[tuple[str, str]]:
    """Runs that are UTF-8 read as Latin-1 or Windows-1252, and what they were."""
    found = []
    for match in _WRONGLY_DECODED.finditer(text):
        run = match[0]
        if run.endswith("»") and "«" in text[: match.start()]:
            continue  # a capital before a closing quotation mark
        try:
            mended = b"".join(_byte(char) for char in run).decode("utf-8")
        except UnicodeDecodeError:
            continue
        if all(unicodedata.category(char)[0] != "C" for char in mended):
            found.append((run, mended))
    return found


def _byte(char: str) -> bytes:
    """The byte that was shown as this character."""
    return char.encode("latin-1") if ord(char) < 256 else char.encode("cp1252")
