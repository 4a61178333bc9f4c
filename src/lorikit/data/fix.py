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
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from lorikit.config import DataConfig
from lorikit.data.account import DataReport
from lorikit.data.characters import repair
from lorikit.data.formats import known_columns
from lorikit.data.lines import RawRow
from lorikit.data.read import named_files
from lorikit.data.rows import raw_rows
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
    reasons = _removed(report)
    rows: list[Any] = []
    changes: list[Change] = []
    first: dict[str, str] = {}
    for source, raw in _all_rows(paths, config):
        if source in reasons:
            reason, secret = reasons[source]
            changes.append(Change(source, "removed", reason, None if secret else _writable(raw.value)))
            continue
        mended = _mended(raw.value)
        text = json.dumps(mended, ensure_ascii=False, sort_keys=True, default=repr)
        if text in first:
            changes.append(Change(source, "removed", f"equals {first[text]}", _writable(raw.value)))
            continue
        first[text] = source
        if mended != raw.value:
            reason = "invisible, misplaced or wrongly decoded characters"
            changes.append(Change(source, "changed", reason, raw.value, mended))
        rows.append(mended)
    return Fixed(rows, changes)


def _removed(report: DataReport) -> dict[str, tuple[str, bool]]:
    """Why rows go, by their source, and whether that is because they hold a secret."""
    reasons = {reject.source: (reject.reason, False) for reject in report.rejects}
    reasons |= {pair.source: (f"equals {pair.of}", False) for pair in report.duplicates}
    secret = (place for finding in report.findings if finding.kind == "secrets" for place in finding.places)
    return reasons | {source: (place.detail, True) for place in secret for source in place.rows}


def _all_rows(paths: Sequence[Path], config: DataConfig) -> Iterator[tuple[str, RawRow]]:
    wanted = known_columns(config)
    for file, name in named_files(paths):
        yield from ((f"{name}:{raw.line}", raw) for raw in raw_rows(file, wanted))


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
