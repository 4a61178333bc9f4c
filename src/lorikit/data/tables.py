"""CSV and Parquet -> raw rows: mappings from column name to value."""

from __future__ import annotations

import csv
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from io import TextIOWrapper
from pathlib import Path

from lorikit.data.lines import MAX_ROW_CHARS, Line, RawRow, RowError, lines, too_long
from lorikit.data.probe import Probe
from lorikit.errors import DataError


class _Feed:
    """Lines for csv.reader that remembers those of the row being read, so that they can be read again."""

    def __init__(self, lines: Iterator[Line]) -> None:
        self._lines = lines
        self._again: list[Line] = []
        self._num_chars = 0
        self.taken: list[Line] = []

    def __iter__(self) -> _Feed:
        return self

    def __next__(self) -> str:
        line = self._again.pop() if self._again else next(self._lines)
        self.taken.append(line)
        self._num_chars += len(line.text)
        if self._num_chars > MAX_ROW_CHARS:
            raise too_long()
        return line.text

    def next_row(self) -> None:
        self.taken, self._num_chars = [], 0

    def put_back_all_but_the_first(self) -> None:
        self._again += reversed(self.taken[1:])
        del self.taken[1:]


@contextmanager
def _long_fields() -> Iterator[None]:
    """csv's limit on a field, 128 KiB, is a setting of the whole process: put back afterwards."""
    before = csv.field_size_limit(MAX_ROW_CHARS + 1)
    try:
        yield
    finally:
        csv.field_size_limit(before)


def csv_rows(stream: TextIOWrapper, path: Path, found: Probe) -> Iterator[RawRow]:
    """Rows as mappings from the header's names to text. A quote that is never closed costs the line it opens on."""
    feed = _Feed(lines(stream, found.bom))
    header: list[str] | None = None
    with _long_fields():
        while True:
            feed.next_row()
            fields: list[str] = []
            problem: RowError | None = None
            try:
                fields = next(csv.reader(feed, delimiter=found.delimiter, strict=True))
            except StopIteration:
                return
            except RowError as error:
                problem = error
            except csv.Error as error:
                unclosed = "unexpected end" in str(error)
                problem = RowError(f"broken CSV: {'a quote is not closed' if unclosed else error}")
            if problem:
                feed.put_back_all_but_the_first()
            first = feed.taken[0]
            problem = next((line.problem for line in feed.taken if line.problem), problem)
            if not fields and not problem:
                continue  # an empty line
            if header is None:
                if problem:
                    raise DataError(f"{path}:{first.number}: the header cannot be read: {problem}")
                header = _distinct([name.strip() for name in fields], path)
                continue
            if not problem and len(fields) != len(header):
                problem = RowError(f"{len(fields)} fields where the header has {len(header)}: is a quote missing?")
            if problem:
                yield RawRow(first.number, "".join(line.text for line in feed.taken).rstrip("\r\n") or None, problem)
            else:
                yield RawRow(first.number, dict(zip(header, fields, strict=True)))


def _distinct(names: Sequence[str], path: Path) -> list[str]:
    repeated = next((name for name in names if name and names.count(name) > 1), None)
    if repeated is not None:
        raise DataError(f"{path}: the column {repeated[:80]!r} stands twice: rename one")
    return list(names)


def parquet_rows(path: Path, wanted: Collection[str]) -> Iterator[RawRow]:
    """Rows group by group, with the `wanted` columns and None in the others; a damaged group is one raw row."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    unreadable = (pa.ArrowException, OSError, ValueError, ArithmeticError)
    try:
        file = pq.ParquetFile(path, page_checksum_verification=True)
        names = file.schema_arrow.names
        sizes = [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]
    except unreadable as error:
        raise DataError(f"{path}: a damaged Parquet file ({_first_line(error)})") from None
    columns = [name for name in _distinct(names, path) if name in wanted]
    if not columns:
        yield RawRow(1, dict.fromkeys(names))  # enough to say which columns there are
        return
    end = 0
    for group, size in enumerate(sizes):
        number, end = end, end + size
        try:
            for batch in file.iter_batches(batch_size=1024, row_groups=[group], columns=columns):
                for values in batch.to_pylist():
                    number += 1
                    yield RawRow(number, dict.fromkeys(names) | values)
        except unreadable as error:
            yield RawRow(number + 1, None, RowError(f"rows up to {end} cannot be read ({_first_line(error)})"))


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
