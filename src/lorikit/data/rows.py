"""Files -> raw rows, each with the line it starts on; a row that cannot be read is handed on with its reason.

JSON Lines and CSV are streamed by line and Parquet by row group; a JSON document is held as text.
"""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from io import TextIOWrapper
from itertools import chain
from pathlib import Path

from lorikit.data.documents import document_rows, json_lines
from lorikit.data.lines import RawRow
from lorikit.data.probe import Probe, probe
from lorikit.data.tables import csv_rows, parquet_rows
from lorikit.errors import DataError


def raw_rows(path: Path, wanted: Collection[str]) -> Iterator[RawRow]:
    """The rows of one file, recognised by its content first and its suffix second; .gz is unpacked on the way.

    `wanted` are the columns that mean something: of Parquet files only these are read, the others come as None.
    Raises DataError for a file that cannot be read at all.
    """
    try:
        found = probe(path)
        if found.kind == "parquet":
            yield from parquet_rows(path, wanted)
            return
        with _open_text(path, found) as stream:
            if found.kind == "lines":
                yield from json_lines(stream, found.bom)
            elif found.kind == "document":
                yield from document_rows(stream.read(), found.bom, wanted)
            else:
                yield from csv_rows(stream, path, found)
    except FileNotFoundError:
        raise DataError(f"{path}: no such file") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: damaged {error.encoding} text ({error.reason}); save it as UTF-8") from None
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error})") from None


def named_rows(path: Path, name: str, wanted: Collection[str]) -> Iterator[tuple[str, RawRow]]:
    """`raw_rows`, each with what it is called: "rows.jsonl:17" by its line, or "rows.json:1 row 17" where it shares that
    line with others. Raises as `raw_rows`."""
    waiting: RawRow | None = None
    place = 1  # of the waiting row among those of its line
    for row in chain(raw_rows(path, wanted), [None]):
        if waiting:
            shared = row is not None and row.line == waiting.line
            yield f"{name}:{waiting.line}" + (f" row {place}" if shared or place > 1 else ""), waiting
            place = place + 1 if shared else 1
        waiting = row


@contextmanager
def _open_text(path: Path, found: Probe) -> Iterator[TextIOWrapper]:
    """The file as text. Bytes that are not UTF-8 become lone surrogates, so that only their own rows are refused."""
    errors = "surrogateescape" if found.encoding.startswith("utf-8") else "strict"
    newline = "" if found.kind == "csv" else "\n"
    with (
        gzip.open(path) if found.gzipped else path.open("rb") as binary,
        TextIOWrapper(binary, encoding=found.encoding, errors=errors, newline=newline) as stream,
    ):
        yield stream
