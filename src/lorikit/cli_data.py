"""The verbs that work on rows: check and build. What they write is whole or absent, and never over another file unasked."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from lorikit.errors import ConfigError

if TYPE_CHECKING:
    from lorikit.config import DataConfig
    from lorikit.data.account import DataReport

Flags = Annotated[str, Parameter(show=False, allow_leading_hyphen=True)]
Json = Annotated[bool, Parameter(name="--json", negative="", help="One JSON document on stdout.")]
Force = Annotated[bool, Parameter(negative="", help="Replace files that exist.")]


def check(
    *arguments: Flags,
    model: str,
    max_length: int | None = None,
    show: int = 3,
    row: str | None = None,
    fix: Path | None = None,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """What becomes of every row of FILE..., what is wrong with the data, token lengths, and what is trained in a few rows.

    Settings of the group data may follow, as in a run: --data.template tutorial --data.on_long_row truncate.
    Exits with 3 if rows are refused.

    Parameters
    ----------
    arguments
        Files, folders or hub data sets.
    model
        The model whose tokenizer and chat template turn rows into tokens.
    max_length
        Longest row in tokens; the same as --data.max_length.
    show
        How many rows to show with their trained tokens marked.
    row
        Show this row, as file:line, instead of the first ones.
    fix
        Write the mended rows here (.json, .jsonl, .csv, .tsv), and to FIX.changes.jsonl what was done to others and why.
    """
    from lorikit.config import load_config
    from lorikit.data.encode import Encoder
    from lorikit.data.fix import check_suffix
    from lorikit.data.view import check as check_rows
    from lorikit.data.view import render
    from lorikit.hub import resolve_data, resolve_model
    from lorikit.model.load import load_tokenizer, stop_ids

    files, flags = split_flags(arguments)
    if not files:
        raise ConfigError("check needs a file, a folder or a hub data set: lorikit check rows.json --model MODEL")
    if fix:
        check_suffix(fix)
        check_outputs([fix, _changes(fix)], force, inputs=[Path(name) for name in files])
    data: dict[str, Any] = {"train": files} | ({"max_length": max_length} if max_length is not None else {})
    config = load_config(flags=flags, model={"name_or_path": model}, data=data, train={"output_dir": "none"})
    base = resolve_model(config.model.name_or_path, revision=config.model.revision, hub=config.model.hub)
    tokenizer = load_tokenizer(base.path, trust_remote_code=config.model.trust_remote_code)
    encoder = Encoder(tokenizer, config.data, stop_ids(base.path))
    paths = [resolve_data(name, hub=config.model.hub).path for name in files]
    checked = check_rows(paths, config, encoder, show=show, row=row)
    if not as_json:
        render(checked)
    result = checked.to_dict() if as_json else {}
    if fix:
        result["fix"] = _fix(paths, config.data, checked.report, fix)
    if as_json:
        print_json(result)
    if checked.refused:
        raise SystemExit(3)


def _changes(out: Path) -> Path:
    return out.with_name(out.name + ".changes.jsonl")


def _fix(paths: Sequence[Path], config: DataConfig, report: DataReport, out: Path) -> dict[str, Any]:
    """Write the mended rows and the changes; their numbers for --json."""
    from lorikit.data.fix import changes_as_file, fix, rows_as_file

    fixed = fix(paths, config, report)
    write_outputs([(out, rows_as_file(fixed.rows, out)), (_changes(out), changes_as_file(fixed.changes))])
    numbers = {"rows": len(fixed.rows), "removed": fixed.num_removed, "changed": fixed.num_changed}
    say(
        f"{out}: {len(fixed.rows):,} rows, {fixed.num_removed:,} removed and {fixed.num_changed:,} changed; "
        f"which and why: {_changes(out)}"
    )
    return numbers | {"file": str(out), "changes": str(_changes(out))}


def check_outputs(paths: Sequence[Path], force: bool, inputs: Sequence[Path]) -> None:
    """ConfigError for a place that cannot be written to, is read from, or is taken and `force` is not given."""
    taken = {path.resolve() for path in inputs}
    for path in paths:
        if path.resolve() in taken:
            raise ConfigError(f"{path} is read from: write to another file")
        if path.is_dir():
            raise ConfigError(f"{path} is a folder; name a file")
        if not path.parent.is_dir():
            raise ConfigError(f"{path}: there is no folder {path.parent}; make it first")
        if path.exists() and not force:
            raise ConfigError(f"{path} exists; name another file, or add --force to replace it")


def write_outputs(files: Sequence[tuple[Path, bytes]]) -> None:
    """Each (path, bytes), whole or not at all. Raises DiskError."""
    from lorikit.train.storage import write_file

    for path, content in files:
        write_file(path, content)


def say(text: str) -> None:
    """A line for the person, not for the pipe."""
    print(text, file=sys.stderr)


def print_json(value: Any) -> None:
    """One document on stdout."""
    print(json.dumps(value, ensure_ascii=False, indent=2))


def split_flags(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Leading file names, and the settings that follow."""
    first = next((i for i, text in enumerate(arguments) if text.startswith("--")), len(arguments))
    return list(arguments[:first]), list(arguments[first:])
