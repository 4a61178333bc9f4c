"""The verbs that work on rows: check and build. What they write is whole or absent, and never over another file unasked."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from lorikit.errors import ConfigError

if TYPE_CHECKING:
    from lorikit.config import DataConfig
    from lorikit.data.account import DataReport
    from lorikit.data.build import Built
    from lorikit.data.material import Material
    from lorikit.data.records import Reading

Flags = Annotated[str, Parameter(show=False, allow_leading_hyphen=True)]
Json = Annotated[bool, Parameter(name="--json", negative="", help="One JSON document on stdout.")]
Force = Annotated[bool, Parameter(negative="", help="Replace files that exist.")]


@Parameter(name="*")
@dataclass(frozen=True)
class Columns:
    """How records are read, for build.

    Parameters
    ----------
    speaker_column
        Which column says who speaks, where that is not recognised.
    text_column
        Which column says what was said.
    time_column
        Which column says when.
    question_column
        Which column holds the question.
    answer_column
        Which column holds the answer.
    gap
        Minutes of silence that end a conversation.
    sheet
        The sheet of an .xlsx file; the first one by default.
    """

    speaker_column: str | None = None
    text_column: str | None = None
    time_column: str | None = None
    question_column: str | None = None
    answer_column: str | None = None
    gap: float = 360
    sheet: str | None = None

    def reading(self) -> Reading:
        """The same as the reader of records takes it."""
        from lorikit.data.records import Reading

        names = {
            name.removesuffix("_column"): value for name, value in asdict(self).items() if name.endswith("_column")
        }
        return Reading({name: value for name, value in names.items() if value is not None}, self.gap, self.sheet)


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

    Settings of a run may follow: --data.template tutorial, --eval.data held_out.json. Exits with 3 if rows are refused.

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
    from lorikit.api import check as check_rows
    from lorikit.config import load_config
    from lorikit.data.fix import check_suffix
    from lorikit.data.view import render
    from lorikit.hub import resolve_data

    files, flags = split_flags(arguments)
    if not files:
        raise ConfigError("check needs a file, a folder or a hub data set: lorikit check rows.json --model MODEL")
    if fix:
        check_suffix(fix)
        check_outputs([fix, _changes(fix)], force, inputs=[Path(name) for name in files])
    flags += [f"--data.max_length={max_length}"] if max_length is not None else []
    config = load_config(
        flags=flags, model={"name_or_path": model}, data={"train": files}, train={"output_dir": "none"}
    )
    checked = check_rows(config, show=show, row=row)
    result = checked.to_dict() if as_json else {}
    if not as_json:
        render(checked)
    if fix:
        paths = [resolve_data(name, hub=config.model.hub).path for name in files]
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


def build(
    files: Annotated[list[Path], Parameter(negative="")],
    /,
    *,
    output: Annotated[Path | None, Parameter(name=["--output", "-o"])] = None,
    role: Annotated[list[str] | None, Parameter(negative="")] = None,
    context: int = 0,
    list_roles: Annotated[bool, Parameter(negative="")] = False,
    kind: str = "auto",
    config: Path | None = None,
    model: str = "smollm2-135m-instruct",
    columns: Columns | None = None,
    show: int = 3,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Instruction rows from scripts, chat exports, tables of questions and FAQs; every line of them is accounted for.

    Without -o the result is only shown.

    Parameters
    ----------
    files
        Text (NAME: line), Markdown, JSON, JSON Lines, CSV, TSV or .xlsx.
    output
        Write the rows here (.json, .jsonl, .csv, .tsv).
    role
        Whose lines are the answers, in scripts and chats; more than once for one person of several names.
    context
        How many turns before the question are kept as history.
    list_roles
        Only say who speaks how often.
    kind
        script, chat, table or faq, where that is not recognised.
    config
        Also write the settings of a run on these rows, ready for lorikit train.
    model
        The model of that run.
    show
        How many rows to show.
    """
    from lorikit.data.build import build as build_rows
    from lorikit.data.build import read_materials

    if context < 0:
        raise ConfigError(f"--context is {context}: a number of turns, 0 or more")
    _check_places(output, config, force, files)
    materials = read_materials(files, (columns or Columns()).reading(), kind, spoken=list_roles or bool(role))
    if list_roles:
        _list_speakers(materials, as_json)
        return
    built = build_rows(materials, role or (), context)
    if as_json:
        print_json(built.to_dict() | {"output": output and str(output), "config": config and str(config)})
    else:
        _show(built, show)
    if output:
        _write_built(built, output, config, model)
    elif not as_json:
        say("nothing is written; add -o rows.json")


def _check_places(output: Path | None, config: Path | None, force: bool, inputs: Sequence[Path]) -> None:
    from lorikit.data.fix import check_suffix

    if config and not output:
        raise ConfigError("--config needs -o rows.json: a run is trained on the rows of a file")
    if output and output == config:
        raise ConfigError(f"-o and --config are both {output}: rows and settings are two files")
    if output:
        check_suffix(output)
        check_outputs([path for path in (output, config) if path], force, inputs)


def _list_speakers(materials: Sequence[Material], as_json: bool) -> None:
    from rich.console import Console

    from lorikit.data.build import speakers
    from lorikit.data.build_view import render_speakers

    who = speakers(materials)
    if as_json:
        print_json([asdict(one) for one in who])
    elif who:
        render_speakers(who, Console())
    else:
        say("nobody speaks in these files: they hold questions with answers")


def _show(built: Built, show: int) -> None:
    from rich.console import Console

    from lorikit.data.build_view import render_built

    render_built(built, Console(), show)


def _write_built(built: Built, output: Path, config: Path | None, model: str) -> None:
    from lorikit.data.build import run_yaml
    from lorikit.data.fix import rows_as_file

    outputs = [(output, rows_as_file(built.rows, output))]
    write_outputs(outputs + ([(config, run_yaml(output, model))] if config else []))
    say(f"{output}: {len(built.rows):,} rows" + (f"; next: lorikit train {config}" if config else ""))


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
