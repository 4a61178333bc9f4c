"""What kind of file holds the rows, from its first bytes and its suffix."""

from __future__ import annotations

import codecs
import gzip
import json
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from lorikit.errors import DataError

LINES = (".jsonl", ".ndjson")
TABLES = (".csv", ".tsv")
SUFFIXES = (".json", *LINES, *TABLES, ".parquet")
"""Suffixes of data files, each also with .gz after it except .parquet."""

_HEAD_BYTES = 2**16
_MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),  # before UTF-16, whose mark it begins with
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
_ALLOWED = "save the rows as JSON, JSON Lines or CSV in UTF-8, or as Parquet"


@dataclass(frozen=True, slots=True)
class Probe:
    """How to read a file: `bom` is the length of its byte order mark, `delimiter` is for CSV."""

    kind: Literal["document", "lines", "csv", "parquet"]
    encoding: str = "utf-8"
    bom: int = 0
    gzipped: bool = False
    delimiter: str = ","


def suffix_of(path: Path) -> str:
    """The suffix in lower case, without .gz."""
    name = path.name.lower().removesuffix(".gz")
    return Path(name).suffix


def probe(path: Path) -> Probe:
    """Content decides, the suffix only where content leaves it open. Raises DataError for what holds no rows, OSError."""
    check_regular(path)
    with path.open("rb") as file:
        head = file.read(_HEAD_BYTES)
    if head.startswith(b"PAR1"):
        return Probe("parquet")
    gzipped = head.startswith(b"\x1f\x8b")
    if gzipped:
        with gzip.open(path) as unpacked:
            head = unpacked.read(_HEAD_BYTES)
    mark, encoding = mark_of(head)
    if not mark and is_binary(head):
        raise DataError(f"{path}: binary data, or UTF-16 without a byte order mark; {_ALLOWED}")
    text = head.decode(encoding, "replace").lstrip(" \t\r\n")
    if not text:
        raise DataError(f"{path}: the file is empty")
    suffix = suffix_of(path)
    if text[0] in "[{" or suffix in (".json", *LINES):
        return Probe(_json_kind(text, suffix, len(head) == _HEAD_BYTES), encoding, len(mark), gzipped)
    if suffix not in TABLES:
        what = "not a Parquet file" if suffix == ".parquet" else f"the suffix {suffix!r} is not known"
        raise DataError(f"{path}: {what} and the content is not JSON; {_ALLOWED} ({', '.join(SUFFIXES)})")
    header = text.splitlines()[0]
    delimiter = "\t" if suffix == ".tsv" else max(",;\t|", key=header.count)
    return Probe("csv", encoding, len(mark), gzipped, delimiter)


def check_regular(path: Path) -> None:
    """DataError for a pipe, a socket or a device: it can be read once at most, and may wait for ever. OSError as `stat`."""
    if not stat.S_ISREG(path.stat().st_mode):
        raise DataError(f"{path}: not a file but a pipe, a device or a folder; save what it gives as a file first")


def mark_of(head: bytes) -> tuple[bytes, str]:
    """The byte order mark that a file begins with, if any, and its encoding."""
    return next(((mark, encoding) for mark, encoding in _MARKS if head.startswith(mark)), (b"", "utf-8"))


def is_binary(head: bytes) -> bool:
    """Whether a file without a byte order mark that begins with these bytes is no text."""
    try:
        codecs.getincrementaldecoder("utf-8")().decode(head)  # incremental: the head may end inside a character
    except UnicodeDecodeError:
        return b"\0" in head
    return head.count(0) * 4 > len(head)


def _json_kind(text: str, suffix: str, more: bool) -> Literal["document", "lines"]:
    """Lines if the first line is a whole value and others follow. `more`: the file goes on after `text`."""
    first, newline, rest = text.partition("\n")
    if not newline and more:
        return "lines" if suffix in LINES and text[0] == "{" else "document"
    try:
        json.loads(first)
    except (ValueError, RecursionError):
        closed = first.rstrip().endswith("}")
        return "lines" if suffix in LINES and closed else "document"
    return "lines" if rest.strip() or more else "document"
