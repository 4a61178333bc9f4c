"""Scripts, chat exports, tables and FAQs -> instruction rows: which lines became answers, and what became of the others.

MIRA: Is he here?         ┐ history, with context > 0      {"instruction": "And who saw him?",
TAM: He was.              ┘ (TAM is the role)               "output": "The ferryman.",
MIRA: And who saw him?      instruction                     "history": [["Is he here?", "He was."]]}
TAM: The ferryman.          output
"""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from lorikit.data.faq import is_marked, read_faq
from lorikit.data.material import Material, MaterialKind, Said, read_text
from lorikit.data.probe import SUFFIXES, suffix_of
from lorikit.data.records import Reading, read_records
from lorikit.data.scripts import name_and_text, read_script, same_name
from lorikit.errors import ConfigError, DataError

KINDS: tuple[MaterialKind, ...] = ("script", "chat", "table", "faq")
_SHEETS = (".xlsx", ".xlsm")
_MARKDOWN = (".md", ".markdown")


@dataclass(frozen=True, slots=True)
class Speaker:
    """Who speaks how often: turns after joining, and lines or messages."""

    name: str
    turns: int
    lines: int


@dataclass(frozen=True, slots=True)
class Built:
    """Rows in the columns of the format alpaca and their source, and the files they came from."""

    rows: list[dict[str, Any]]
    materials: list[Material]
    speakers: list[Speaker]

    def to_dict(self) -> dict[str, Any]:
        """JSON values: counts, the numbers of all lines by their fate, speakers, the first rows."""
        return {
            "rows": len(self.rows),
            "files": [_described(material) for material in self.materials],
            "speakers": [{"name": one.name, "turns": one.turns, "lines": one.lines} for one in self.speakers],
            "preview": self.rows[:3],
        }


def _described(material: Material) -> dict[str, Any]:
    where: dict[str, list[int]] = {}
    for number, fate in sorted(material.fates.items()):
        where.setdefault(fate, []).append(number)
    return {
        "file": material.name,
        "kind": material.kind,
        "unit": material.unit,
        "lines": len(material.fates),
        "fates": material.counts(),
        "where": where,
        "reasons": {str(number): reason for number, reason in material.reasons.items()},
        "notes": material.notes,
    }


def read_materials(
    paths: Sequence[Path], reading: Reading, kind: str = "auto", *, spoken: bool = False
) -> list[Material]:
    """The files, each read as what it is, or as `kind` says; a folder stands for the files in it that can be read.

    `spoken` says that somebody speaks in them: plain text is then a script even if its speakers are called Q and A.
    Raises DataError and ConfigError.
    """
    if kind != "auto" and kind not in KINDS:
        raise ConfigError(f"--kind is {kind!r}: auto, {', '.join(KINDS)}")
    files = [file for path in paths for file in (_inside(path) if path.is_dir() else [path])]
    names = Counter(file.name for file in files)
    return [_read(file, file.name if names[file.name] == 1 else str(file), reading, kind, spoken) for file in files]


def _inside(folder: Path) -> list[Path]:
    known = (*SUFFIXES, *_SHEETS, *_MARKDOWN, ".txt")
    found = [file for file in sorted(folder.iterdir()) if suffix_of(file) in known and file.is_file()]
    if not found:
        raise DataError(f"{folder}: no file in it ends with {', '.join(known)}")
    return found


def _read(path: Path, name: str, reading: Reading, kind: str, spoken: bool) -> Material:
    suffix = suffix_of(path)
    records = suffix in SUFFIXES or suffix in _SHEETS
    if records or kind in ("chat", "table"):
        if kind in ("script", "faq"):
            raise ConfigError(f"{path}: --kind {kind} is for text; {suffix} files are read as chat or table")
        if not records:
            known = ", ".join([*SUFFIXES, *_SHEETS])
            raise ConfigError(f"{path}: --kind {kind} is for {known}; the suffix is {suffix!r}")
        material = read_records(path, name, reading)
        if kind not in ("auto", material.kind):
            raise ConfigError(
                f"{path}: its columns make a {material.kind}, --kind is {kind}; name the columns of a {kind}"
            )
        return material
    lines = read_text(path)
    as_faq = kind == "faq" or (kind == "auto" and _looks_like_faq(lines, suffix, spoken))
    material = read_faq(lines, name) if as_faq else read_script(lines, name)
    if not material.pairs and not material.scenes:
        form = (
            "no question with an answer (## Question?, **Question?**, Q: and A:)" if as_faq else "no line `NAME: text`"
        )
        raise DataError(
            f"{path}: {form} in its {len(lines)} lines; see docs/data.md for what can be read, or set --kind"
        )
    return material


def _looks_like_faq(lines: Sequence[str], suffix: str, spoken: bool) -> bool:
    """Markdown, unless two or more people speak in it; other text where lines begin with Q: and with A:."""
    if suffix not in _MARKDOWN:
        return not spoken and is_marked(lines)
    names = Counter(same_name(found[0]) for line in lines if (found := name_and_text(line)))
    return is_marked(lines) or sum(count > 1 for count in names.values()) < 2


def speakers(materials: Sequence[Material]) -> list[Speaker]:
    """Who speaks in these files, the most talkative first, each under the spelling used most."""
    spelled: dict[str, Counter[str]] = {}
    lines: Counter[str] = Counter()
    for said in (said for material in materials for scene in material.scenes for said in scene):
        spelled.setdefault(same_name(said.speaker), Counter())[said.speaker] += 1
        lines[same_name(said.speaker)] += len(said.lines)
    found = [Speaker(names.most_common(1)[0][0], names.total(), lines[key]) for key, names in spelled.items()]
    return sorted(found, key=lambda one: (-one.turns, -one.lines, one.name))


def build(materials: Sequence[Material], roles: Sequence[str] = (), context: int = 0) -> Built:
    """Rows from files that were read. What `roles` (one person's names) say are the answers of scripts and chats.

    `context` is how many turns before the question are kept as history. Fills in the fates of what was said. Raises
    ConfigError for a role that is missing or does not speak, DataError when no row comes of it.
    """
    who = speakers(materials)
    role = _role(roles, who) if who else frozenset()
    if roles and not who:
        raise ConfigError(f"--role {roles[0]}: nobody speaks in these files; they hold questions with answers")
    rows: list[dict[str, Any]] = []
    for material in materials:
        rows += [_row(material, pair.question, pair.answer, pair.line) for pair in material.pairs]
        for scene in material.scenes:
            rows += _rows_of_scene(material, scene, role, context)
        material.fates = dict(sorted(material.fates.items()))
    if not rows:
        reason = f"{roles[0]} never answers: nobody speaks before" if roles else "no question has an answer"
        raise DataError(f"{', '.join(material.name for material in materials)}: no row comes of it: {reason}")
    return Built(rows, list(materials), who)


def _role(roles: Sequence[str], who: Sequence[Speaker]) -> frozenset[str]:
    known = {same_name(one.name): one.name for one in who}
    listed = ", ".join(f"{one.name} ({one.turns})" for one in who[:8]) + (
        f" and {len(who) - 8} more" if len(who) > 8 else ""
    )
    if not roles:
        raise ConfigError(f"whose lines are the answers? --role NAME; the speakers are {listed}")
    for role in roles:
        if same_name(role) not in known:
            close = difflib.get_close_matches(same_name(role), list(known), n=1, cutoff=0.5)
            hint = f"; did you mean {known[close[0]]}?" if close else "."
            raise ConfigError(f"--role {role}: nobody of that name speaks{hint} The speakers are {listed}")
    if len(known) == 1:
        raise ConfigError(f"{who[0].name} is the only one who speaks, so there is no question to any answer")
    return frozenset(map(same_name, roles))


def _rows_of_scene(
    material: Material, scene: Sequence[Said], role: frozenset[str], context: int
) -> Iterator[dict[str, Any]]:
    turns = list(_joined(scene, role))
    for place, said in enumerate(turns):
        if same_name(said.speaker) not in role:
            continue
        if place == 0:
            material.mark(said.lines, "nothing before it")
            continue
        before = turns[max(0, place - 1 - context) : place]
        while same_name(before[0].speaker) in role:  # a conversation begins with a question
            before = before[1:]
        blocks = list(_blocks(before, role))
        for one in before:
            if same_name(one.speaker) not in role:
                material.mark(one.lines, "question")
        material.mark(said.lines, "answer")
        history = [list(pair) for pair in zip(blocks[:-1:2], blocks[1:-1:2], strict=True)]
        yield _row(material, blocks[-1], said.text, said.lines[0], history)


def _joined(scene: Sequence[Said], role: frozenset[str]) -> Iterator[Said]:
    """The turns of a scene; those of the role under its different names are one where they follow each other."""
    last: Said | None = None
    for said in scene:
        if last and same_name(last.speaker) in role and same_name(said.speaker) in role:
            last = Said(last.speaker, f"{last.text}\n{said.text}", (*last.lines, *said.lines))
            continue
        if last:
            yield last
        last = said
    if last:
        yield last


def _blocks(turns: Sequence[Said], role: frozenset[str]) -> Iterator[str]:
    """Texts by turns: what others say, several of them joined, then what the role says, and so on."""
    texts: list[str] = []
    for place, said in enumerate(turns):
        texts.append(said.text)
        ends = place + 1 == len(turns) or (same_name(turns[place + 1].speaker) in role) != (
            same_name(said.speaker) in role
        )
        if ends:
            yield "\n".join(texts)
            texts = []


def _row(
    material: Material, question: str, answer: str, line: int, history: Sequence[list[str]] = ()
) -> dict[str, Any]:
    row: dict[str, Any] = {"instruction": question, "input": "", "output": answer}
    if history:
        row["history"] = list(history)
    return row | {"source": f"{material.name}{':' if material.unit == 'line' else '#'}{line}"}


def run_yaml(rows: Path, model: str) -> bytes:
    """Settings that `lorikit train` accepts, in UTF-8: this file of rows, this model, a run folder named after the file."""
    text = {
        "model": {"name_or_path": model},
        "data": {"train": str(rows), "max_length": 1024},
        "lora": {"r": 8, "lora_alpha": 32, "lora_dropout": 0.1},
        "train": {
            "output_dir": f"runs/{rows.name.partition('.')[0] or 'rows'}",
            "num_train_epochs": 3,
            "learning_rate": 1e-4,
        },
        "eval": {"eval_size": 0.05},
    }
    head = "# lorikit check FILE --model MODEL shows the rows; lorikit config lists every setting.\n"
    return (head + yaml.safe_dump(text, sort_keys=False, allow_unicode=True)).encode()
