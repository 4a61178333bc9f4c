"""The working folder of the page: which files and runs are in it, and how an uploaded file gets there.

Nothing is read or written outside of it: names from a browser lose their folders and their odd characters, and a path that
leaves the folder, by .. or by a link, is no file of it.
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections.abc import Iterator
from pathlib import Path

from lorikit.errors import ConfigError, DataError

DATA_SUFFIXES = (".json", ".jsonl", ".csv", ".tsv", ".parquet")
UPLOADS, RUNS = "uploads", "runs"
_DEPTH = 3  # folders below the working folder that are looked into
_MOST = 500  # files in the list; a folder with more is not meant to be picked from
_SKIPPED = {RUNS, "node_modules", "__pycache__"}


def data_files(folder: Path) -> list[str]:
    """Paths below `folder` of files that may hold rows, sorted; run folders and hidden ones are left out."""
    found = sorted(str(path.relative_to(folder)) for path in _walk(folder, _DEPTH))
    return found[:_MOST]


def _walk(folder: Path, depth: int) -> Iterator[Path]:
    try:
        entries = sorted(folder.iterdir())
    except OSError:  # not ours to read
        return
    for entry in entries:
        if entry.name.startswith(".") or entry.is_symlink():
            continue
        if entry.is_file() and entry.suffix.lower() in DATA_SUFFIXES:
            yield entry
        elif entry.is_dir() and depth and entry.name not in _SKIPPED and not (entry / "config.yaml").exists():
            yield from _walk(entry, depth - 1)


def save_upload(folder: Path, name: str, content: bytes) -> str:
    """Write an uploaded file below `folder`; its path there. The same content under the same name is written once, other
    content gets another name. Raises DataError for a file that is empty or of a kind that is not read, DiskError."""
    from lorikit.train.storage import disk_errors

    safe = safe_name(name)
    if Path(safe).suffix.lower() not in DATA_SUFFIXES:
        raise DataError(f"{safe}: rows are read from {', '.join(DATA_SUFFIXES)}")
    if not content:
        raise DataError(f"{safe}: the file is empty")
    place = folder / UPLOADS
    with disk_errors(place):
        place.mkdir(exist_ok=True)
        for path in _names(place / safe):
            if path.is_symlink():
                continue
            if path.exists() and _digest(path.read_bytes()) != _digest(content):
                continue
            if not path.exists():
                path.write_bytes(content)
            return str(path.relative_to(folder))
    raise AssertionError("there is always another number")


def safe_name(name: str) -> str:
    """A file name without folders, control characters, spaces at its ends or a leading dot, at most 100 characters long."""
    base = unicodedata.normalize("NFC", name.replace("\\", "/").rsplit("/", 1)[-1])
    base = re.sub(r"[^\w.()+ -]+", "_", base).strip(" .")
    stem, suffix = Path(base or "file").stem, Path(base).suffix
    return stem.encode()[:100].decode(errors="ignore") + suffix[:12]


def run_name(name: str) -> str:
    """`name` if it can be a run's: letters, digits, - _ and . inside. ConfigError says what is allowed."""
    if not re.fullmatch(r"\w[\w.-]{0,79}", name) or name.endswith("."):
        raise ConfigError(f"the run's name is {name!r}: letters, digits, - and _ are allowed, 80 at most")
    return name


def inside(folder: Path, name: str) -> Path:
    """The file `name` below `folder`; ConfigError if it is not there or lies elsewhere."""
    path = (folder / name).resolve()
    if not path.is_relative_to(folder.resolve()) or not path.exists():
        raise ConfigError(f"{name}: no such file in {folder}")
    return path


def _names(path: Path) -> Iterator[Path]:
    """rows.json, rows-2.json, rows-3.json, ..."""
    yield path
    number = 2
    while True:
        yield path.with_name(f"{path.stem}-{number}{path.suffix}")
        number += 1


def _digest(content: bytes) -> bytes:
    return hashlib.sha256(content).digest()
