"""JSON text -> raw rows: JSON Lines, arrays, an object around an array, objects one after another.

A document is parsed element by element, so that a broken element costs itself and not its neighbours.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator
from io import TextIOWrapper
from typing import Any

from lorikit.data.lines import MAX_ROW_CHARS, RawRow, RowError, lines, num_bytes, too_long, undecodable


def _no_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) != len(pairs):
        names = [name for name, _ in pairs]
        repeated = next(name for name in names if names.count(name) > 1)
        raise RowError(f"the key {repeated[:80]!r} stands twice in one object: keep one")
    return row


def _integer(digits: str) -> int | float:
    # Python refuses to parse integers of over 4,300 digits; no column takes a number, so its value is of no interest.
    return int(digits) if len(digits) <= 300 else float(digits)


_STRICT = json.JSONDecoder(object_pairs_hook=_no_repeats, parse_int=_integer)
_LENIENT = json.JSONDecoder(parse_int=_integer)


def _decode(text: str, at: int) -> tuple[Any, int, RowError | json.JSONDecodeError | None]:
    """The JSON value at text[at], where it ends, and what is wrong with it; a broken one ends where it starts.

    Parses windows of the text that grow while the value seems cut off: an error in a long document would otherwise cost
    a scan of all of it, because JSONDecodeError counts the lines before it.
    """
    size = 2**14
    while True:
        window = text[at : at + size]
        whole = at + size >= len(text)
        problem: RowError | None = None
        try:
            try:
                value, end = _STRICT.raw_decode(window)
            except RowError as repeated:
                value, end = _LENIENT.raw_decode(window)
                problem = repeated
            if whole or end < len(window):
                return value, at + end, problem
        except json.JSONDecodeError as error:
            # "Unterminated string" names the start of the string; other complaints about a cut stand close to it.
            cut = error.msg.startswith("Unterminated") or error.pos > len(window) - 16
            if whole or not cut:
                return None, at, error
        except RecursionError:
            return None, at, RowError("nested too deeply to be a row")
        size *= 4


def _broken(error: RowError | json.JSONDecodeError, line: int, column: int) -> RowError:
    """`line` and `column` (from 1) are where the decoded value starts in the file; the error has its text."""
    if isinstance(error, RowError):
        return error
    column = error.colno + column - 1 if error.lineno == 1 else error.colno
    message = error.msg.removesuffix(" at").removesuffix(" starting")
    found = error.doc[error.pos : error.pos + 2]
    if found.startswith("\ufeff"):
        message = "a byte order mark stands here, as between files that were joined: remove it"
    elif found in ("//", "/*") or found.startswith("#"):
        message = "a comment stands here, which JSON does not have"
    return RowError(f"broken JSON: {message} (line {line + error.lineno - 1}, column {column})")


def json_lines(stream: TextIOWrapper, offset: int) -> Iterator[RawRow]:
    """One value a line, empty lines aside. `offset` is the byte the text starts at."""
    for line in lines(stream, offset):
        text = line.text.strip(" \t\r\n")
        if line.problem:
            yield RawRow(line.number, text or None, line.problem)
        elif text:
            column = len(line.text) - len(line.text.lstrip(" \t\r\n")) + 1
            value, end, error = _decode(text, 0)
            if error:
                yield RawRow(line.number, text, _broken(error, line.number, column))
            elif end < len(text):
                where = f"(line {line.number}, column {column + end})"
                ends = ": do its lines end in CR alone? Save them with LF" if text[end] == "\r" else ""
                yield RawRow(line.number, text, RowError(f"broken JSON: text after the end of the row {where}{ends}"))
            else:
                yield RawRow(line.number, value)


_PLAIN = r'(?:"[^"\\]*"|[-+.\w]+)'
_WRAPPER = re.compile(
    rf'\s*\{{\s*(?P<before>(?:"[^"\\]*"\s*:\s*{_PLAIN}\s*,\s*)*)"(?P<key>[^"\\]*)"\s*:\s*\[\s*(?=\{{)'
)
_WRAPPER_END = re.compile(rf'\s*(?:,\s*"[^"\\]*"\s*:\s*{_PLAIN}\s*)*\}}\s*')
_COMMENT = r"//[^\n]*|/\*(?s:.*?)\*/"
# Commas are not counted, and comments, which JSON does not have but people write, say nothing about rows.
_BETWEEN = re.compile(rf"(?:[ \t\r\n,]+|{_COMMENT})*")
_AFTER = re.compile(rf"(?:\s|{_COMMENT})*")  # one character each: "\s+" would be tried in every way that it can be cut
_OPENING = re.compile(r'\{\s*"[^"\\]*"')


class _Cursor:
    """A place in a text, with the line, column and byte it is at; moves forward only."""

    def __init__(self, text: str, offset: int) -> None:
        self.text, self.offset = text, offset
        self.at, self.line, self.line_start = 0, 1, 0

    def move(self, to: int) -> None:
        passed = self.text[self.at : to]
        self.offset += num_bytes(passed)
        self.line += passed.count("\n")
        if "\n" in passed:
            self.line_start = self.at + passed.rindex("\n") + 1
        self.at = to


def document_rows(text: str, offset: int, wanted: Collection[str]) -> Iterator[RawRow]:
    """The elements of an array, of the array inside an object, or objects one after another; offset as above.

    `wanted` tells a row that holds a list from an object around the list of rows.
    """
    cursor = _Cursor(text, offset)
    array, ending = _enter(text, cursor, wanted)
    while True:
        match = _BETWEEN.match(text, cursor.at)
        cursor.move(match.end() if match else cursor.at)
        start = cursor.at
        if start == len(text):
            if array:
                yield RawRow(cursor.line, None, RowError("the array is not closed here: the file may be cut off"))
            return
        if array and text[start] == "]":
            if not ending.fullmatch(text, start + 1):
                yield RawRow(cursor.line, None, RowError("text after the array of rows is not read: one array a file"))
            return
        value, end, error = _decode(text, start)
        problem = _broken(error, cursor.line, start - cursor.line_start + 1) if error else None
        lost = False
        if end == start:
            end = _next_row(text, cursor)
            lost = end == len(text)
        if end - start > MAX_ROW_CHARS and not lost:
            problem = too_long()
        row_text = text[start : min(end, start + MAX_ROW_CHARS)]
        problem = undecodable(row_text, cursor.offset) or problem
        if lost and problem:
            problem = type(problem)(f"{problem}; no row was found after it")
        yield RawRow(cursor.line, row_text.rstrip(" \t\r\n,") if problem else value, problem)
        cursor.move(end)
        if lost:
            return


def _enter(text: str, cursor: _Cursor, wanted: Collection[str]) -> tuple[bool, re.Pattern[str]]:
    """Move to the first row; whether rows are in an array, and what may follow that array."""
    before = _AFTER.match(text)
    start = before.end() if before else 0
    wrapper = _WRAPPER.match(text, start)
    if wrapper and not {wrapper["key"], *re.findall(r'"([^"]*)"\s*:', wrapper["before"])} & set(wanted):
        cursor.move(wrapper.end())
        return True, _WRAPPER_END
    array = text.startswith("[", start)
    cursor.move(start + array)
    return array, _AFTER


def _next_row(text: str, cursor: _Cursor) -> int:
    """Where reading goes on after a broken row: the next line that opens an object as far from the margin as this row,
    or the next object that begins with the same key. The end of the text when there is neither."""
    margin = text[cursor.line_start : cursor.at]
    if not margin.strip(" \t"):
        found = text.find(f"\n{margin}{{", cursor.at)
        if found >= 0:
            return found + 1 + len(margin)
    opening = _OPENING.match(text, cursor.at)
    found = text.find(opening[0], cursor.at + 1) if opening else -1
    if found < 0 and margin.strip():
        line = re.compile(r"\n[ \t]*\{").search(text, cursor.at)
        found = line.end() - 1 if line else -1
    return found if found >= 0 else len(text)
