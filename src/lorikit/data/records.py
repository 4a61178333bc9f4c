"""Tables and chat exports -> what was said, or questions with answers: JSON, JSON Lines, CSV, TSV, and .xlsx.

A record is a chat message if it has columns for who and what, a question with its answer if it has columns for both; the
names of the columns are recognised in several languages, or given. Values may be nested as exports nest them: a speaker
{"name": ...}, a text in parts. Of a chat, a silence longer than `gap` ends a conversation.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import pairwise
from math import isfinite
from pathlib import Path
from typing import Any

from lorikit.data.formats import checked_text
from lorikit.data.lines import RawRow, RowError
from lorikit.data.material import Material, MaterialKind, Pair, Said
from lorikit.data.rows import raw_rows
from lorikit.data.scripts import same_name
from lorikit.errors import ConfigError, DataError, LorikitError

COLUMNS: dict[str, tuple[str, ...]] = {
    "speaker": ("speaker", "from", "sender", "author", "name", "user", "username", "nickname", "role", "sender_name",
                "发送者", "发送人", "昵称", "说话人", "发言人", "姓名"),
    "text": ("text", "message", "content", "body", "msg", "line", "内容", "消息", "消息内容", "文本"),
    "time": ("time", "timestamp", "date", "datetime", "sent_at", "created_at", "ts", "timestamp_ms",
             "时间", "日期", "发送时间"),
    "question": ("question", "q", "query", "frage", "pregunta", "instruction", "prompt", "问题", "问", "提问", "問題"),
    "answer": ("answer", "a", "response", "reply", "antwort", "respuesta", "output", "completion",
               "答案", "回答", "答", "回复"),
}  # fmt: skip
"""What columns may be called, in any case."""

_FORMATS = (
    "%Y-%m-%d %H:%M:%S",
    "%Y-%m-%d %H:%M",
    "%Y/%m/%d %H:%M:%S",
    "%Y/%m/%d %H:%M",
    "%d.%m.%Y %H:%M",
    "%d.%m.%Y, %H:%M",
)
_NUMBER = re.compile(r"\d{9,13}(?:\.\d+)?")


@dataclass(frozen=True, slots=True)
class Reading:
    """How records are read: `columns` names those that are not recognised, `gap` is in minutes, `sheet` is for .xlsx."""

    columns: Mapping[str, str]
    gap: float = 360
    sheet: str | None = None


def read_records(path: Path, name: str, reading: Reading) -> Material:
    """What the records of a file say. Raises DataError, also where no columns are recognised, and ConfigError."""
    wanted = {alias for names in COLUMNS.values() for alias in names} | set(reading.columns.values())
    excel = path.suffix.lower() in (".xlsx", ".xlsm")
    raw = _unwrapped(list(_excel_rows(path, reading.sheet) if excel else raw_rows(path, wanted)))
    names = dict.fromkeys(
        column for row in raw if not row.problem and isinstance(row.value, Mapping) for column in row.value
    )
    kind, columns = _columns(path, list(names), reading.columns)
    material = Material(name, kind, "record")
    for number, row in enumerate(raw, 1):
        if reason := _reason(row, columns.values()):
            material.fates[number] = "cannot be read"
            material.reasons[number] = reason
    good = [(number, row.value) for number, row in enumerate(raw, 1) if number not in material.fates]
    if not good:
        reason = next(iter(material.reasons.values()), "there are no records in it")
        raise DataError(f"{path}: no record can be used: {reason}")
    if kind == "chat":
        _chat(material, good, columns, reading.gap)
    else:
        _table(material, good, columns)
    return material


def _reason(row: RawRow, columns: Iterable[str]) -> str | None:
    """Why a record cannot be used, if so: also for bytes, half characters and NULs in its columns, which no file can hold."""
    if row.problem or not row.value or not isinstance(row.value, Mapping):
        return str(row.problem or "not an object with named columns")
    try:
        for column in columns:
            _check(column, row.value.get(column))
    except RowError as error:
        return str(error)
    return None


def _check(column: str, value: Any) -> None:
    inside = value.values() if isinstance(value, Mapping) else value if isinstance(value, list) else ()
    for one in inside:
        _check(column, one)
    if isinstance(value, str | bytes):
        checked_text(column, value)


def _unwrapped(raw: list[RawRow]) -> list[RawRow]:
    """The records inside the one object that some exports are, {"name": ..., "messages": [...]}; else what was given."""
    if len(raw) != 1 or not isinstance(raw[0].value, Mapping):
        return raw
    inside = [
        value
        for value in raw[0].value.values()
        if isinstance(value, list) and any(isinstance(v, Mapping) for v in value)
    ]
    return [RawRow(number, value) for number, value in enumerate(inside[0], 1)] if len(inside) == 1 else raw


def _columns(path: Path, names: Sequence[str], given: Mapping[str, str]) -> tuple[MaterialKind, dict[str, str]]:
    """Whether the records are a table or a chat, and what their columns are called there."""
    lacking = [f"{meaning} {column!r}" for meaning, column in given.items() if column not in names]
    if lacking and names:
        raise ConfigError(f"{path}: no column for {', '.join(lacking)}; the columns are {_shown(names)}")
    by_name = {same_name(name): name for name in reversed(names)}
    found = dict(given)
    for meaning, aliases in COLUMNS.items():
        hit = next(
            (by_name[alias] for alias in aliases if alias in by_name and by_name[alias] not in found.values()), None
        )
        if meaning not in found and hit is not None:
            found[meaning] = hit
    asked = {"question", "answer"} <= set(given) or not {"speaker", "text"} <= set(given)
    if {"question", "answer"} <= set(found) and asked:
        return "table", found
    if {"speaker", "text"} <= set(found):
        return "chat", found
    if not names:
        return "table", found
    raise DataError(
        f"{path}: no columns for a question and its answer, nor for who said what; found {_shown(names)}; "
        "name yours: --question-column and --answer-column, or --speaker-column and --text-column"
    )


def _shown(names: Sequence[str]) -> str:
    more = f" and {len(names) - 12} more" if len(names) > 12 else ""
    return ", ".join(repr(name[:40]) for name in names[:12]) + more


def _table(material: Material, records: Sequence[tuple[int, Mapping[str, Any]]], columns: Mapping[str, str]) -> None:
    for number, record in records:
        question, answer = (as_text(record.get(columns[side])).strip() for side in ("question", "answer"))
        if question and answer:
            material.pairs.append(Pair(question, answer, number))
            material.fates[number] = "answer"
        else:
            material.fates[number] = "no answer" if question else "no question" if answer else "blank"


def _chat(
    material: Material, records: Sequence[tuple[int, Mapping[str, Any]]], columns: Mapping[str, str], gap: float
) -> None:
    """Messages as turns; the ones of a chat that runs from the newest to the oldest are read backwards."""
    times = {
        n: parse_time(record[columns["time"]])
        for n, record in records
        if "time" in columns and columns["time"] in record
    }
    known = [(n, time) for n, time in times.items() if time is not None]
    unknown = len(times) - len(known)
    if unknown:
        material.notes.append(f"{unknown} times cannot be read; no conversation ends there")
    falling = sum(b < a for (_, a), (_, b) in pairwise(known))
    if len(known) > 1 and 2 * falling > len(known) - 1:
        records = records[::-1]
        material.notes.append("the newest messages stand first; they are read from the last one on")
    scene: list[Said] = []
    before: float | None = None
    for number, record in records:
        speaker, text = as_text(record.get(columns["speaker"])).strip(), as_text(record.get(columns["text"])).strip()
        if not speaker or not text:
            material.fates[number] = "no text" if speaker or not text else "no speaker"
            continue
        time = times.get(number)
        if scene and time is not None and before is not None and time - before > 60 * gap:
            material.scenes.append(scene)
            scene = []
        before = time if time is not None else before
        material.fates[number] = "other speaker"
        if scene and same_name(scene[-1].speaker) == same_name(speaker):
            last = scene.pop()
            scene.append(Said(last.speaker, f"{last.text}\n{text}", (*last.lines, number)))
        else:
            scene.append(Said(speaker, text, (number,)))
    if scene:
        material.scenes.append(scene)


def as_text(value: Any) -> str:
    """The text of a value: a number or date as it is written, {"name": ...} by its name, a list of parts joined."""
    if isinstance(value, Mapping):
        keys = ("text", "content", "display_name", "global_name", "name", "username", "nickname")
        return next((as_text(value[key]) for key in keys if value.get(key)), "")
    if isinstance(value, list):
        return "".join(map(as_text, value))
    if isinstance(value, datetime):
        return value.isoformat(" ")
    if isinstance(value, float):  # NaN is how tables write that there is nothing
        return str(int(value)) if value.is_integer() else str(value) if isfinite(value) else ""
    return "" if value is None else str(value)


def parse_time(value: Any) -> float | None:
    """Seconds since 1970 of ISO 8601, of Unix seconds or milliseconds and of common written forms; None for others."""
    if isinstance(value, datetime):
        return _seconds(value)
    text = as_text(value).strip()
    if _NUMBER.fullmatch(text):
        number = float(text)
        return number / 1000 if number > 1e11 else number
    try:
        return _seconds(datetime.fromisoformat(text))
    except ValueError:
        pass
    for form in _FORMATS:
        try:
            return _seconds(datetime.strptime(text, form))
        except ValueError:
            continue
    return None


def _seconds(time: datetime) -> float:
    return (time if time.tzinfo else time.replace(tzinfo=UTC)).timestamp()


def _excel_rows(path: Path, sheet: str | None) -> Iterator[RawRow]:
    """Rows of a sheet, the first one by default, under the names in its first row that is not empty."""
    try:
        from openpyxl import load_workbook
    except ImportError:
        raise ConfigError(
            f"{path}: .xlsx needs openpyxl: pip install 'lorikit[tables]', or save the sheet as CSV"
        ) from None
    if not path.is_file():
        raise DataError(f"{path}: no such file")
    try:
        book = load_workbook(path, read_only=True, data_only=True)
    except Exception as error:  # a damaged archive fails in many ways, each with its own class
        raise DataError(
            f"{path}: not a workbook that can be read ({type(error).__name__}: {str(error)[:80]})"
        ) from None
    try:
        if sheet is not None and sheet not in book.sheetnames:
            raise ConfigError(f"{path}: no sheet {sheet!r}; there are {_shown(book.sheetnames)}")
        if not book.worksheets:
            raise DataError(f"{path}: holds no sheet with cells")
        yield from _sheet_rows(path, book[sheet] if sheet else book.worksheets[0])
    except LorikitError:
        raise
    except Exception as error:
        raise DataError(
            f"{path}: its sheet cannot be read to the end ({type(error).__name__}: {str(error)[:80]})"
        ) from None
    finally:
        book.close()


def _sheet_rows(path: Path, cells_of: Any) -> Iterator[RawRow]:
    cells_of.reset_dimensions()  # what a writer noted of the sheet's size may be wrong, and rows would be left out
    header: list[str] | None = None
    for number, cells in enumerate(cells_of.iter_rows(values_only=True), 1):
        if all(cell is None for cell in cells):
            continue
        if header is None:
            header = [as_text(cell).strip() or f"column {place}" for place, cell in enumerate(cells, 1)]
            if repeated := next((name for name in header if header.count(name) > 1), None):
                raise DataError(f"{path}: the column {repeated[:80]!r} stands twice: rename one")
            continue
        yield RawRow(number, dict(zip(header, cells, strict=False)), None)
