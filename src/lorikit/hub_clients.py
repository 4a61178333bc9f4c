"""The two hubs through their own libraries, behind one interface: list a revision, find a cached copy, fetch files.

What a library raises becomes `Refused`, one line that says why this hub could not help and what would; the caller may
then try the other hub. Their environment variables hold: HF_ENDPOINT, HF_HOME, HF_TOKEN, HF_HUB_OFFLINE,
MODELSCOPE_ENDPOINT, MODELSCOPE_CACHE, MODELSCOPE_API_TOKEN.
"""

from __future__ import annotations

import errno
import glob
import logging
import os
import re
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from lorikit.errors import DiskError

if TYPE_CHECKING:
    from modelscope_hub import HubApi

HubName = Literal["modelscope", "huggingface"]
Kind = Literal["model", "dataset"]
COMMIT = re.compile(r"[0-9a-f]{40}")
_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM)
_TIMEOUT = 20.0  # seconds for one answer of a hub, not for a download


class Refused(Exception):
    """Why one hub could not give what was asked, and what to do about it."""


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """A file as the hub lists it: bytes, and the sha256 in hex where the hub knows it."""

    size: int
    sha256: str | None


@dataclass(frozen=True, slots=True)
class Listing:
    """The files of a repository at a commit (or at the branch, where the hub names no commit for it)."""

    revision: str
    files: Mapping[str, RemoteFile]


class Client(Protocol):
    """What is asked of a hub. Each method raises Refused, and DiskError where the disk is the reason."""

    name: HubName
    default_revision: str

    def root(self) -> Path:
        """The library's cache folder; it may not exist yet."""
        ...

    def listing(self, kind: Kind, repo: str, revision: str | None) -> Listing:
        """What the hub holds, asked over the network."""
        ...

    def cached(self, kind: Kind, repo: str, revision: str | None) -> Path | None:
        """The folder where the library keeps this revision, whole or in part, without the network."""
        ...

    def fetch(self, kind: Kind, repo: str, listing: Listing) -> Path:
        """Download the listed files, keep those that are there, and return their folder."""
        ...


def endpoint(hub: HubName) -> str:
    """The address of the hub's server, as its own library would take it from the environment."""
    if hub == "huggingface":
        return (os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")
    named = os.environ.get("MODELSCOPE_ENDPOINT") or os.environ.get("MODELSCOPE_DOMAIN") or "modelscope.cn"
    return (named if named.startswith(("http://", "https://")) else f"https://{named}").rstrip("/")


def unreachable(hub: HubName, timeout: float = 4.0) -> str | None:
    """Why the hub's server does not answer within `timeout` seconds, or None if it does, whatever the answer."""
    offline = next((name for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE") if _is_on(name)), None)
    if offline:
        return f"{offline} is set"
    found: list[str | None] = []

    def ask() -> None:
        try:
            request = urllib.request.Request(endpoint(hub), method="HEAD")  # noqa: S310  an address that the user set
            urllib.request.urlopen(request, timeout=timeout).close()  # noqa: S310
        except urllib.error.HTTPError:
            found.append(None)
        except (OSError, ValueError) as error:
            reason = getattr(error, "reason", error)
            found.append(str(getattr(reason, "strerror", None) or reason))
        else:
            found.append(None)

    # A thread of its own, because looking up a name knows no timeout.
    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(timeout + 1)
    return found[0] if found else f"no answer within {timeout:g} s"


@contextmanager
def bars_on_terminals_only() -> Iterator[None]:
    """Let libraries draw their progress bars on a terminal; elsewhere nothing of them reaches stderr."""
    if sys.stderr.isatty() and not _is_on("HF_HUB_DISABLE_PROGRESS_BARS"):
        yield
        return
    with Path(os.devnull).open("w", encoding="utf-8") as nothing, redirect_stderr(nothing):
        yield


class HuggingFace:
    """Hugging Face, and whatever mirror HF_ENDPOINT names, through huggingface_hub."""

    name: HubName = "huggingface"
    default_revision = "main"

    def root(self) -> Path:
        """As Client."""
        from huggingface_hub import constants

        return Path(constants.HF_HUB_CACHE)

    def listing(self, kind: Kind, repo: str, revision: str | None) -> Listing:
        """As Client, in one request."""
        from huggingface_hub import HfApi

        ask = HfApi().model_info if kind == "model" else HfApi().dataset_info
        with self._reasons(kind, repo, revision):
            info = ask(repo, revision=revision, files_metadata=True, timeout=_TIMEOUT)
        files = {f.rfilename: RemoteFile(f.size or 0, f.lfs.sha256 if f.lfs else None) for f in info.siblings or []}
        return Listing(info.sha or revision or self.default_revision, files)

    def cached(self, kind: Kind, repo: str, revision: str | None) -> Path | None:
        """As Client."""
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

        try:
            return Path(snapshot_download(repo, repo_type=kind, revision=revision, local_files_only=True))
        except LocalEntryNotFoundError as error:  # newer libraries name the folder of a copy that lacks files
            part = getattr(error, "snapshot_path", None)
            return Path(part) if part else None
        except HFValidationError as error:
            raise Refused(_line(error)) from None

    def fetch(self, kind: Kind, repo: str, listing: Listing) -> Path:
        """As Client. Whole files stay when it is cut off; parts of a file only within the call, in newer libraries."""
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError

        names = [glob.escape(name) for name in listing.files]
        for again in reversed(range(3)):  # the library goes on after most cut connections, not after all
            with self._reasons(kind, repo, listing.revision), bars_on_terminals_only():
                try:
                    return Path(
                        snapshot_download(repo, repo_type=kind, revision=listing.revision, allow_patterns=names)
                    )
                except _network_error() as error:
                    if not again or isinstance(error, HfHubHTTPError):
                        raise
        raise AssertionError("the last attempt returns or raises")

    @contextmanager
    def _reasons(self, kind: Kind, repo: str, revision: str | None) -> Iterator[None]:
        from huggingface_hub import errors

        page = f"{endpoint(self.name)}/{'datasets/' if kind == 'dataset' else ''}{repo}"
        try:
            yield
        except errors.GatedRepoError:
            token = "with the account of HF_TOKEN" if os.environ.get("HF_TOKEN") else "and set HF_TOKEN to your token"
            raise Refused(f"access is granted by its owner: ask for it on {page} {token}") from None
        except errors.RepositoryNotFoundError:
            raise Refused(f"no such {kind}, or a private one, which needs HF_TOKEN") from None
        except errors.RevisionNotFoundError:
            raise Refused(f"no revision {revision}; see {page}") from None
        except errors.HfHubHTTPError as error:
            raise Refused(_status(error.response.status_code, "HF_TOKEN")) from None
        except (_network_error(), OSError, ValueError) as error:
            reason = error.__cause__ if isinstance(error, errors.LocalEntryNotFoundError) else None
            _check_disk_error(error, self.root(), "HF_HOME")
            raise Refused(f"the download was cut off or made no sense ({_line(reason or error)}); {_AGAIN}") from None


class ModelScope:
    """ModelScope through modelscope_hub, the library that the package modelscope itself downloads with."""

    name: HubName = "modelscope"
    default_revision = "master"

    def root(self) -> Path:
        """As Client; known without the library."""
        return Path(os.environ.get("MODELSCOPE_CACHE") or "~/.cache/modelscope").expanduser().resolve()

    def listing(self, kind: Kind, repo: str, revision: str | None) -> Listing:
        """As Client. A branch or tag stands for the newest commit among its files, if that lists the same files."""
        branch = revision or self.default_revision
        with self._reasons(kind, repo, revision) as api:
            entries = _entries(api, kind, repo, branch)
            files = _files(entries)
            commit = max(entries, key=lambda e: int(e.get("CommittedDate") or 0), default={}).get("Revision") or ""
            if COMMIT.fullmatch(branch) or not COMMIT.fullmatch(commit):
                return Listing(branch, files)
            same = _files(_entries(api, kind, repo, commit)) == files
        return Listing(commit if same else branch, files)

    def cached(self, kind: Kind, repo: str, revision: str | None) -> Path | None:
        """As Client."""
        with self._reasons(kind, repo, revision) as api:
            from modelscope_hub import CacheNotFound

            try:
                return Path(api.download_repo(repo, kind, revision=revision, local_files_only=True))
            except CacheNotFound:
                return None

    def fetch(self, kind: Kind, repo: str, listing: Listing) -> Path:
        """As Client; what is cut off inside a file is resumed, by the next call too."""
        entries = [{"Path": name, "Size": f.size, "Sha256": f.sha256} for name, f in listing.files.items()]
        with self._reasons(kind, repo, listing.revision) as api, bars_on_terminals_only():
            return Path(api.download_repo(repo, kind, revision=listing.revision, file_list=entries))

    @contextmanager
    def _reasons(self, kind: Kind, repo: str, revision: str | None) -> Iterator[HubApi]:
        try:
            import modelscope_hub as library
        except ImportError:
            raise Refused("needs its library: pip install 'lorikit[modelscope]'") from None
        if "MODELSCOPE_LOG_LEVEL" not in os.environ:  # whatever goes wrong is raised as well
            logging.getLogger("modelscope_hub").setLevel(logging.CRITICAL)
        try:
            yield library.HubApi()
        except (library.HubError, OSError, ValueError) as raised:
            failed = list(raised.failed_files.values()) if isinstance(raised, library.FileDownloadError) else []
            error = failed[0] if failed else raised
            _check_disk_error(error, self.root(), "MODELSCOPE_CACHE")
            if isinstance(error, library.NotExistError):
                at = f" with a revision {revision}" if revision else ""
                raise Refused(f"no such {kind}{at}, or a private one, which needs MODELSCOPE_API_TOKEN") from None
            if isinstance(error, library.AuthenticationError | library.PermissionDeniedError):
                page = f"{endpoint(self.name)}/{kind}s/{repo}"
                raise Refused(f"access needs consent or a login: see {page}, set MODELSCOPE_API_TOKEN") from None
            if isinstance(error, library.FileIntegrityError):
                raise Refused(f"it sent other bytes than it lists ({_line(error)}); {_AGAIN}") from None
            raise Refused(f"the download was cut off or made no sense ({_line(error)}); {_AGAIN}") from None


_AGAIN = "the same command goes on with what is there"


def _network_error() -> type[BaseException]:
    """The network errors of httpx or of its successor, whichever this huggingface_hub is built on."""
    from huggingface_hub.errors import HfHubHTTPError

    return HfHubHTTPError.__bases__[0]


def _entries(api: HubApi, kind: Kind, repo: str, revision: str) -> list[dict[str, Any]]:
    entries = api.legacy.list_repo_files(repo, kind, revision=revision)
    return [e for e in entries if e.get("Type") != "tree"]


def _files(entries: list[dict[str, Any]]) -> dict[str, RemoteFile]:
    return {e["Path"]: RemoteFile(int(e.get("Size") or 0), e.get("Sha256") or None) for e in entries}


def _check_disk_error(error: BaseException, root: Path, variable: str) -> None:
    if isinstance(error, OSError) and error.errno in _DISK:
        where = error.filename or root
        raise DiskError(f"{where}: {error.strerror}; free space or set {variable} to another disk") from None


def _status(code: int, token: str) -> str:
    if code in (401, 403):
        return f"access denied (HTTP {code}): check {token}"
    return f"its server answered HTTP {code}; try again later"


def _line(error: BaseException) -> str:
    """The first line that says something, short."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = lines[0] if lines else type(error).__name__
    return text if len(text) <= 160 else text[:157] + "..."


def _is_on(variable: str) -> bool:
    return os.environ.get(variable, "").strip().lower() in ("1", "true", "yes", "on")
