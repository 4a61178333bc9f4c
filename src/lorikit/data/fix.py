"""The rows of some files without what `check` found wrong and a program can mend, and what was done to each.

    removed   rows that cannot be used, later copies of a row, rows with keys or passwords
    changed   invisible, misplaced and wrongly decoded characters taken out or decoded again

Whatever needs a judgement stays as it is: several answers, nearly equal rows, short answers, personal data. Rows keep
their columns and their order.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from lorikit.config import DataConfig
from lorikit.data.account import DataReport
from lorikit.data.characters import repair
from lorikit.data.formats import converter, known_columns
from lorikit.data.lines import RowError
from lorikit.data.privacy import secrets
from lorikit.data.read import named_files
from lorikit.data.rows import named_rows
from lorikit.errors import ConfigError

WRITTEN = (".json", ".jsonl", ".csv", ".tsv")
"""Suffixes that rows can be written with."""


@dataclass(frozen=True, slots=True)
class Change:
    """What was done to one row and why. `before` and `after` as in the files; a row with a key is not repeated."""

    source: str
    action: Literal["removed", "changed"]
    reason: str
    before: Any = None
    after: Any = None

    def to_dict(self) -> dict[str, Any]:
        """JSON values; what is not known is left out."""
        line = {"source": self.source, "action": self.action, "reason": self.reason}
        return line | {k: v for k, v in (("before", self.before), ("after", self.after)) if v is not None}


@dataclass(frozen=True, slots=True)
class Fixed:
    """The rows that are left, as the files have them, and every change. num_rows = len(rows) + those removed."""

    rows: list[Any]
    changes: list[Change]

    @property
    def num_removed(self) -> int:
        """Rows that are gone."""
        return sum(change.action == "removed" for change in self.changes)

    @property
    def num_changed(self) -> int:
        """Rows that read otherwise now."""
        return len(self.changes) - self.num_removed


def fix(paths: Sequence[Path], config: DataConfig, report: DataReport) -> Fixed:
    """The rows of these files as `report`, which is about them, suggests. Raises what `read_rows` raises."""
    convert, wanted = converter(config), known_columns(config)
    refused = {
        _key(row["messages"]): one.reason for one in report.dropped["refused"] if isinstance(row := one.row, dict)
    }
    rows: list[Any] = []
    changes: list[Change] = []
    first: dict[str, str] = {}
    for source, raw in (named for file, name in named_files(paths) for named in named_rows(file, name, wanted)):
        try:
            if raw.problem:
                raise raw.problem
            mended = _mended(raw.value)
            said = [asdict(message) for message in convert(mended, source).messages]
            reason = refused.get(_key([asdict(message) for message in convert(raw.value, source).messages]))
        except RowError as error:
            changes.append(Change(source, "removed", str(error), _writable(raw.value)))
            continue
        secret = "; ".join(
            dict.fromkeys(found for turn in said for text in turn.values() for found in secrets(text or ""))
        )
        reason = secret or reason or (f"equals {first[_key(said)]}" if _key(said) in first else "")
        if reason:
            changes.append(Change(source, "removed", reason, None if secret else _writable(raw.value)))
            continue
        first[_key(said)] = source
        if mended != raw.value:
            what = "invisible, misplaced or wrongly decoded characters"
            changes.append(Change(source, "changed", what, _writable(raw.value), _writable(mended)))
        rows.append(mended)
    return Fixed(rows, changes)


def _key(messages: Any) -> str:
    """What makes two rows equal: all that their turns say, whatever else stands in their columns."""
    return json.dumps(messages, ensure_ascii=False)


def _mended(value: Any) -> Any:
    if isinstance(value, str):
        return repair(value)
    if isinstance(value, list):
        return [_mended(one) for one in value]
    return {key: _mended(one) for key, one in value.items()} if isinstance(value, dict) else value


def _writable(value: Any) -> Any:
    """The value, or its description where JSON cannot express it (NaN, dates, half characters)."""
    try:
        json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
    except (TypeError, ValueError):
        return ascii(value)
    return value


def check_suffix(path: Path) -> str:
    """The suffix that decides how rows are written. Raises ConfigError for one that says nothing."""
    if path.suffix.lower() not in WRITTEN:
        raise ConfigError(f"{path}: rows are written as {', '.join(WRITTEN)}; give a name that ends so")
    return path.suffix.lower()


def rows_as_file(rows: Sequence[Any], path: Path) -> bytes:
    """What a file of this name holds: a JSON array or JSON Lines, a row a line, or a table, in UTF-8.

    In a table, a value that is not text is written as JSON, which the reader takes. Raises what `check_suffix` raises.
    """
    suffix = check_suffix(path)
    if suffix in (".csv", ".tsv"):
        return _table(rows, "\t" if suffix == ".tsv" else ",")
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    text = "\n".join(lines) + "\n" if suffix == ".jsonl" else "[\n" + ",\n".join(lines) + "\n]\n"
    return text.encode()


def changes_as_file(changes: Sequence[Change]) -> bytes:
    """JSON Lines with source, action, reason, before and after."""
    return "".join(json.dumps(change.to_dict(), ensure_ascii=False) + "\n" for change in changes).encode()


def _table(rows: Sequence[Any], delimiter: str) -> bytes:
    columns = list(dict.fromkeys(name for row in rows if isinstance(row, Mapping) for name in row))
    stream = io.StringIO(newline="")
    writer = csv.writer(stream, delimiter=delimiter, lineterminator="\n")
    writer.writerow(columns)
    for row in rows:
        writer.writerow([_cell(row.get(name)) for name in columns])
    return stream.getvalue().encode()


def _cell(value: Any) -> str:
    return "" if value is None else value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
