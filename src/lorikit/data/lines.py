"""What every row reader shares: the raw row, why one cannot be used, and text lines with their numbers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from io import TextIOWrapper
from typing import Any

MAX_ROW_CHARS = 8 * 2**20
"""Longest row, in characters: far above what a model can take, far below what a machine can hold. Without a limit one
missing quote would make the rest of a file into a single row."""


class RowError(ValueError):
    """Why one row cannot be used, in one line."""


class UndecodableError(RowError):
    """The row holds bytes that are not UTF-8."""


@dataclass(frozen=True, slots=True)
class RawRow:
    """A row as the file has it. `line` is where it starts (in Parquet the row's number), both from 1.

    With a `problem`, `value` is the row's text where there is one.
    """

    line: int
    value: Any
    problem: RowError | None = None


def num_bytes(text: str) -> int:
    """The length of the text in the UTF-8 file that it comes from."""
    return len(text) if text.isascii() else len(text.encode("utf-8", "surrogateescape"))


def undecodable(text: str, offset: int) -> UndecodableError | None:
    """What is wrong with the encoding of text that starts at byte `offset` of its file."""
    if text.isascii():
        return None
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        byte, at = ord(text[error.start]) - 0xDC00, offset + num_bytes(text[: error.start])
        return UndecodableError(
            f"not UTF-8: byte 0x{byte:02x} at offset {at} of the file; "
            "convert the file, for Chinese text with: iconv -f GBK -t UTF-8"
        )
    return None


def too_long() -> RowError:
    """The complaint about a row over MAX_ROW_CHARS."""
    return RowError(
        f"the row is longer than {MAX_ROW_CHARS // 2**20} Mi characters: split it, or is a quote not closed?"
    )


@dataclass(frozen=True, slots=True)
class Line:
    """A line with its end, its number from 1, and why it cannot be used."""

    number: int
    text: str
    problem: RowError | None


def lines(stream: TextIOWrapper, offset: int) -> Iterator[Line]:
    """Lines with their numbers from 1; an overlong one is skipped over, never held."""
    number = 0
    while text := stream.readline(MAX_ROW_CHARS + 1):
        number += 1
        size = num_bytes(text)
        if len(text) > MAX_ROW_CHARS:
            while not text.endswith("\n") and (text := stream.readline(MAX_ROW_CHARS)):
                size += num_bytes(text)
            yield Line(number, "", too_long())
        else:
            yield Line(number, text, undecodable(text, offset))
        offset += size
