"""A model or data name becomes a local folder: a path, a bundled model, ModelScope or Hugging Face.

    ms:ID  ModelScope        hf:ID  Hugging Face        ID  what this machine can reach        anything else  a path

What a hub gave is verified (size, and sha256 where the hub lists one) and noted in our cache under its commit. A later
call takes it from there: a commit without asking the hub again, a branch without the network; contents are read again
only if a file was touched since.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from urllib.parse import quote

from lorikit.bundled import BUNDLED, bundled_folder, cache_dir, unpack_bundled
from lorikit.errors import DataError, DiskError, ModelError
from lorikit.hub_clients import (
    COMMIT,
    Client,
    HubName,
    HuggingFace,
    Kind,
    Listing,
    ModelScope,
    Refused,
    RemoteFile,
    endpoint,
    unreachable,
)
from lorikit.model_files import check_model_folder, needed_data, needed_files

Say = Callable[[str], None]
_PREFIXES: dict[str, HubName] = {"ms": "modelscope", "hf": "huggingface"}
_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")
_SPARE = 2**28  # bytes left free beside a download, for the cache's own files


@dataclass(frozen=True, slots=True)
class Resolved:
    """Where a model or data set lies. `name` is without prefix; `revision` the commit it stood for, None for a path."""

    path: Path
    name: str
    hub: Literal["path", "bundled", "modelscope", "huggingface"]
    revision: str | None


def resolve_model(name: str, revision: str | None = None, hub: str = "auto", report: Say | None = None) -> Resolved:
    """The local folder of a model, downloaded or unpacked if needed, and checked to be whole.

    `hub` (auto, modelscope, huggingface) says where a bare ID is looked for; `report` takes lines for the user, by
    default they go to stderr. Raises ModelError that says what was tried where and what to do, DiskError when it does
    not fit on the disk.
    """
    say = report or _to_stderr
    if _is_bundled(name):
        return _bundled(name, revision, unpack_bundled(name, say))
    local = _local(name)
    if local is None:
        return _from_hubs(name, "model", revision, hub, say)
    if not local.is_dir():
        raise ModelError(f"{name}: a model is a folder with config.json, safetensors and a tokenizer, not a file")
    _no_revision(name, revision)
    check_model_folder(local)
    return Resolved(local, name, "path", None)


def resolve_data(name: str, revision: str | None = None, hub: str = "auto", report: Say | None = None) -> Resolved:
    """The local file or folder of a data set, downloaded if needed; `ID/train.json` takes one file or folder of it.

    Arguments as `resolve_model`. Raises ModelError for what a hub refuses, DataError for a path that is not there or a
    data set without data files, DiskError.
    """
    local = _local(name)
    if local is None:
        return _from_hubs(name, "dataset", revision, hub, report or _to_stderr)
    _no_revision(name, revision)
    return Resolved(local, name, "path", None)


def find_model(name: str, revision: str | None = None, hub: str = "auto") -> Resolved | None:
    """The model if it is on this machine already, whole as far as can be seen; no hub is asked, nothing is unpacked.

    Arguments as `resolve_model`. Raises ModelError for a name that can be no model.
    """
    if _is_bundled(name):
        found = _bundled(name, revision, bundled_folder(name))
        return found if found.path.is_dir() else None
    if _local(name) is not None:
        return resolve_model(name, revision, hub)
    repo, clients = _parse(name, "model", hub)
    for client in clients:
        try:
            return _without_network(_Note(client, "model", repo), revision, "it was not asked", lambda line: None)
        except Refused:
            continue
    return None


def _to_stderr(line: str) -> None:
    sys.stderr.write(f"lorikit: {line}\n")


def _is_bundled(name: str) -> bool:
    return name in BUNDLED and not Path(name).exists()


def _bundled(name: str, revision: str | None, found: tuple[Path, str]) -> Resolved:
    folder, own = found
    if revision not in (None, own):
        raise ModelError(f"{name} is installed as {own}, not {revision}; install that version of its package")
    return Resolved(folder, name, "bundled", own)


def _no_revision(name: str, revision: str | None) -> None:
    if revision is not None:
        raise ModelError(f"{name} is a path, and a revision ({revision}) is for a hub; set only one of the two")


def _local(name: str) -> Path | None:
    """The path that `name` is, or None if a hub is to be asked; an error for what can be neither."""
    if re.match(r"(ms|hf):", name):
        return None
    path = Path(os.path.expanduser(name))  # noqa: PTH111  Path's own raises for an unknown ~user
    try:
        if name and path.exists():
            return path
    except (OSError, ValueError) as error:  # too long, not allowed, a zero byte
        raise ModelError(f"{name[:80]!r} is no usable path: {error}") from None
    looks_like_path = name.startswith(("/", "./", "../", "~")) or "\\" in name or name.endswith("/")
    data_file = path.suffix.lower() in (".json", ".jsonl", ".csv", ".tsv", ".parquet", ".txt", ".gz", ".yaml")
    if not _ID.match(name) or looks_like_path or (data_file and name.count("/") < 2):
        kind = DataError if data_file else ModelError
        raise kind(
            f"{name}: no such file or folder, and no ID of a hub, which looks like owner/name; "
            f"bundled: {', '.join(BUNDLED)}"
        )
    return None


def _parse(name: str, kind: Kind, hub: str) -> tuple[str, list[Client]]:
    """ID without prefix, and the hubs to ask for it, in that order."""
    prefix, colon, repo = name.partition(":")
    bare = not (colon and prefix in _PREFIXES)
    repo = name if bare else repo
    parts = repo.split("/")  # of a data set's ID there may follow a path in it; a few old models have no owner
    if not all(re.fullmatch(r"\w[\w.-]*", part) for part in parts[:2]) or (kind == "model" and len(parts) > 2):
        raise ModelError(
            f"{name}: {'no such folder, and ' if bare else ''}no ID of a {kind}, which looks like owner/name"
        )
    return repo, _clients(hub if bare else _PREFIXES[prefix])


def _from_hubs(name: str, kind: Kind, revision: str | None, hub: str, say: Say) -> Resolved:
    """The first hub that has it; with a commit, first any copy that is here already."""
    repo, clients = _parse(name, kind, hub)
    if revision and COMMIT.fullmatch(revision):
        for client in clients:
            if known := _Note(client, kind, repo).whole(revision, say):
                return known
    refusals = []
    for client in clients:
        try:
            found = _from_hub(client, kind, repo, revision, say)
        except Refused as reason:
            refusals.append(f"{client.name} ({endpoint(client.name)}): {reason}")
            continue
        for refusal in refusals:
            say(f"{repo} is from {found.hub}, not from {refusal}")
        return found
    here = f"; no file or folder {name} here either" if repo == name else ""
    raise ModelError(f"{repo} cannot be had. " + "; ".join(refusals) + here)


def _clients(hub: str) -> list[Client]:
    """In the order they are asked."""
    both: dict[str, Client] = {"huggingface": HuggingFace(), "modelscope": ModelScope()}
    if hub in both:
        return [both[hub]]
    if hub != "auto":
        raise ModelError(f"hub is {hub!r}: auto, modelscope or huggingface")
    first = "modelscope" if os.environ.get("MODELSCOPE_CACHE") else "huggingface"
    return sorted(both.values(), key=lambda client: client.name != first)


def _from_hub(client: Client, kind: Kind, repo: str, revision: str | None, say: Say) -> Resolved:
    """From one hub: noted and whole, else cached and right, else downloaded; then verified and noted."""
    note = _Note(client, kind, repo)
    if away := unreachable(client.name):
        return _without_network(note, revision, away, say)
    listing = client.listing(kind, note.repo, revision)
    names = _needed(kind, list(listing.files), repo, note.inside)
    listing = Listing(listing.revision, {name: listing.files[name] for name in names})
    if known := note.whole(listing.revision, say, names=names):
        note.keep(listing, known.path, (revision or client.default_revision,))
        return known
    folder = client.cached(kind, note.repo, listing.revision)
    other = client.cached(kind, note.repo, revision) if folder is None else None  # a branch's folder, by another tool
    if other is not None and not _damage(other, listing.files):
        folder = other
    else:
        _make_room(client, folder, listing, say, repo)
        folder = client.fetch(kind, note.repo, listing)
        if damage := _damage(folder, listing.files):
            _remove(folder, damage)
            raise Refused(f"it sent other bytes than it lists: {_told(damage)}; removed, try again")
    if kind == "model":
        check_model_folder(folder)
    note.keep(listing, folder, (listing.revision, revision or client.default_revision))
    return Resolved(_inside(folder, names, note.inside), repo, client.name, listing.revision)


def _without_network(note: _Note, revision: str | None, away: str, say: Say) -> Resolved:
    """What is here: noted by us, or put there by the hub's own tools and whole as far as can be seen."""
    if known := note.whole(revision or note.client.default_revision, say, away):
        return known
    # Of data sets a copy by another tool may lack files, and nothing in it would show that.
    folder = note.client.cached("model", note.repo, revision) if note.kind == "model" else None
    if folder is None:
        raise Refused(f"cannot be reached ({away}), and no copy is in {note.client.root()}")
    check_model_folder(folder)
    commit = folder.name if COMMIT.fullmatch(folder.name) else revision
    return Resolved(folder, note.name, note.client.name, commit)


def _needed(kind: Kind, names: list[str], what: str, inside: str) -> list[str]:
    return needed_files(names, what) if kind == "model" else needed_data(names, inside, what)


def _inside(folder: Path, names: list[str], inside: str) -> Path:
    """The one file, or the folder, that was asked for."""
    if inside:
        return folder / inside
    return folder / names[0] if len(names) == 1 else folder


def _make_room(client: Client, folder: Path | None, listing: Listing, say: Say, what: str) -> None:
    """Remove damaged copies, which some libraries would keep, and check that the rest fits on the disk."""
    damage = _damage(folder, listing.files) if folder else dict.fromkeys(listing.files, "missing")
    if folder and (wrong := {name: why for name, why in damage.items() if why != "missing"}):
        say(f"{folder}: {_told(wrong)}; downloading again")
        _remove(folder, wrong)
    partial = [folder / f"{name}.incomplete" for name in damage] if folder else []
    needed = sum(listing.files[name].size for name in damage) - sum(p.stat().st_size for p in partial if p.exists())
    root = next(place for place in (client.root(), *client.root().parents) if place.exists())
    free = shutil.disk_usage(root).free
    if damage and needed + _SPARE > free:
        variable = "HF_HOME" if client.name == "huggingface" else "MODELSCOPE_CACHE"
        raise DiskError(
            f"{what} needs {needed / 2**30:.1f} GiB in {client.root()}, {free / 2**30:.1f} GiB are free; "
            f"free space or set {variable} to another disk"
        )
    if damage:
        say(f"downloading {what} from {client.name}: {len(damage)} files, {needed / 2**30:.2f} GiB")


def _damage(folder: Path, files: Mapping[str, RemoteFile], seen: Mapping[str, int] | None = None) -> dict[str, str]:
    """What is missing or not as listed; contents are not read where `seen` has the file's time of change, in ns."""
    problems = {}
    for name, file in files.items():
        path = folder / name
        if not path.is_file():
            problems[name] = "missing"
            continue
        found = path.stat()
        if found.st_size != file.size:
            problems[name] = f"has {found.st_size} bytes instead of {file.size}"
        elif file.sha256 and (seen or {}).get(name) != found.st_mtime_ns:
            with path.open("rb") as opened:
                if hashlib.file_digest(opened, "sha256").hexdigest() != file.sha256:
                    problems[name] = "has another sha256"
    return problems


def _told(damage: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {what}" for name, what in damage.items())


def _remove(folder: Path, names: Mapping[str, str]) -> None:
    for name in names:
        (folder / name).resolve().unlink(missing_ok=True)  # what the link in the cache points to
        (folder / name).unlink(missing_ok=True)


@dataclass(frozen=True, slots=True)
class _Note:
    """What we know of one name at one hub: a small file for each revision that was asked for, and for its commit."""

    client: Client
    kind: Kind
    name: str

    @property
    def repo(self) -> str:
        return "/".join(self.name.split("/")[:2]) if self.kind == "dataset" else self.name

    @property
    def inside(self) -> str:
        return "/".join(self.name.split("/")[2:]) if self.kind == "dataset" else ""

    def whole(self, revision: str, say: Say, away: str | None = None, names: Sequence[str] = ()) -> Resolved | None:
        """The noted copy, if it has all `names` and is as it was listed; Refused if not and no new one can be had."""
        try:
            note = json.loads(self._file(revision).read_bytes())
            folder, commit = Path(note["folder"]), str(note["revision"])
            files = {str(k): RemoteFile(int(v[0]), v[1]) for k, v in note["files"].items()}
            seen = {str(k): int(v[2]) for k, v in note["files"].items()}
            if note["root"] != str(self.client.root()) or not set(names) <= set(files):
                return None  # the library's cache was moved, or another version took fewer files
        except (OSError, ValueError, KeyError, TypeError, IndexError, AttributeError):
            return None  # never noted, or by another version
        if damage := _damage(folder, files, seen):
            told = f"the copy in {folder} is not whole: {_told(damage)}"
            if away:
                raise Refused(f"{told}; the hub cannot be reached ({away}) for another one")
            say(told)
            return None
        return Resolved(_inside(folder, list(files), self.inside), self.name, self.client.name, commit)

    def keep(self, listing: Listing, folder: Path, revisions: tuple[str, ...]) -> None:
        """Note that `folder` holds the listing, which was just verified."""
        files = {n: (f.size, f.sha256, (folder / n).stat().st_mtime_ns) for n, f in listing.files.items()}
        note = {"revision": listing.revision, "root": str(self.client.root()), "folder": str(folder), "files": files}
        for revision in set(revisions):
            path = self._file(revision)
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                staged = path.with_name(f"{path.name}.{os.getpid()}")
                staged.write_text(json.dumps(note), encoding="utf-8")
                staged.replace(path)
            except OSError as error:
                raise DiskError(f"{path}: {error.strerror}; set LORIKIT_CACHE to a disk with room") from None

    def _file(self, revision: str) -> Path:
        place = cache_dir() / "hub" / self.client.name / f"{self.kind}s" / quote(self.name, safe="")
        return place / f"{quote(revision, safe='')}.json"
