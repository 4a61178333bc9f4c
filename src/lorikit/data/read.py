"""Files -> Conversation: every row becomes one, or a Reject that says why not as `file:line: reason`."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath

from lorikit.config import DataConfig
from lorikit.data.formats import NoColumnsError, converter, known_columns
from lorikit.data.lines import RowError, UndecodableError
from lorikit.data.probe import SUFFIXES, suffix_of
from lorikit.data.rows import named_rows
from lorikit.data.values import Conversation, Reject
from lorikit.errors import DataError


@dataclass(frozen=True, slots=True)
class Rows:
    """All rows of the data, in the order of the files: num_rows = len(conversations) + len(rejects)."""

    conversations: list[Conversation]
    rejects: list[Reject]
    num_rows: int


def read_rows(paths: Sequence[Path], config: DataConfig) -> Rows:
    """The rows of these files; a folder stands for its data files, of its train split where it names splits.

    A bad row is a Reject whatever `config.on_bad_row` says. Raises DataError for a file that is missing, empty, not
    text, in another encoding throughout or without recognised columns in any row, and for a folder without data files;
    ConfigError for a `config.columns` that fits no format.
    """
    wanted, convert = known_columns(config), converter(config)
    files = named_files(paths)
    if not files:
        raise DataError("no data files are given: set data.train")
    conversations: list[Conversation] = []
    rejects: list[Reject] = []
    for file, name in files:
        rows_before = len(conversations), len(rejects)
        errors: list[RowError] = []
        for source, raw in named_rows(file, name, wanted):
            try:
                if raw.problem:
                    raise raw.problem
                conversations.append(convert(raw.value, source))
            except RowError as error:
                rejects.append(Reject(source, str(error), raw.value))
                errors.append(error)
        if (len(conversations), len(rejects)) == rows_before:
            raise DataError(f"{file}: there are no rows in it")
        for whole_file in (NoColumnsError, UndecodableError):
            if len(conversations) == rows_before[0] and all(isinstance(error, whole_file) for error in errors):
                raise DataError(f"{rejects[rows_before[1]]} (no row of {file} can be used)")
    return Rows(conversations, rejects, len(conversations) + len(rejects))


def named_files(paths: Sequence[Path]) -> list[tuple[Path, str]]:
    """The data files behind these paths, each with what its rows' sources call it. Raises as `data_files`."""
    files = [file for path in paths for file in data_files(path)]
    names = Counter(file.name for file in files)
    # The name alone where it is enough: sources end up in reports, which should not hold paths of one machine.
    return [(file, file.name if names[file.name] == 1 else str(file)) for file in files]


def rejects_jsonl(rejects: Iterable[Reject]) -> bytes:
    """What rejects.jsonl holds: one JSON object a line with source, reason and the row as it was read.

    A row that could not be parsed is its text, one that JSON cannot express (NaN, dates) what Python calls it.
    """
    # A lone surrogate, also one that stands for a byte that is not UTF-8, becomes the JSON escape for it.
    return "".join(_reject_line(reject) + "\n" for reject in rejects).encode("utf-8", "backslashreplace")


def _reject_line(reject: Reject) -> str:
    line = {"source": reject.source, "reason": reject.reason}
    try:
        try:
            row = {} if reject.row is None else {"row": reject.row}
            return json.dumps(line | row, ensure_ascii=False, allow_nan=False)
        except (TypeError, ValueError):
            return json.dumps(line | {"row": repr(reject.row)}, ensure_ascii=False)
    except RecursionError:  # reading takes a little deeper nesting than writing
        return json.dumps(line, ensure_ascii=False)


_TRAIN = re.compile(r"(?<![a-z])train(ing)?(?![a-z])", re.IGNORECASE)
_HELD_OUT = re.compile(r"(?<![a-z])(test(ing)?|valid(ation)?|val|dev|eval(uation)?)(?![a-z])", re.IGNORECASE)
_DESCRIPTIONS = {"config.json", "configuration.json", "dataset_info.json", "dataset_infos.json", "dataset_dict.json"}


def data_files(path: Path) -> list[Path]:
    """The file itself, or of a folder the data files, sorted: those named train if there are any, never those named
    test, validation, dev or eval. Raises DataError when nothing is left."""
    if not path.is_dir():
        return [path]
    inside = sorted(
        file
        for file in path.rglob("*")
        if suffix_of(file) in SUFFIXES
        and file.name.lower() not in _DESCRIPTIONS
        and not any(part.startswith(".") for part in file.relative_to(path).parts)
        and file.is_file()
    )
    splits = {file: _split(file.relative_to(path)) for file in inside}
    chosen = [file for file in inside if splits[file] == "train"] or [file for file in inside if not splits[file]]
    if not chosen:
        found = f"only {', '.join(file.name for file in inside[:5])}; name the file" if inside else "none"
        raise DataError(f"{path}: a folder without training data; looked for {', '.join(SUFFIXES)}, found {found}")
    return chosen


def _split(file: PurePath) -> str:
    """train, held out or "": by the file's name, else by the folder nearest to it."""
    for part in reversed(file.parts):
        if _TRAIN.search(part):
            return "train"
        if _HELD_OUT.search(part):
            return "held out"
    return ""
