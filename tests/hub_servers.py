"""Two hubs in small: a loopback server that speaks as much of both protocols as the real client libraries ask for.

One server answers for Hugging Face (/api/models, /resolve) and for ModelScope (/api/v1); a test decides which of them a
client is pointed at. Faults are switched on by attributes of `Hub`.
"""

from __future__ import annotations

import hashlib
import json
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

LFS_SUFFIXES = (".safetensors", ".bin", ".parquet")


@dataclass
class Repo:
    """A repository: what its branches and tags point to, and the files of each commit."""

    commits: dict[str, dict[str, bytes]]
    refs: dict[str, str]

    def files(self, revision: str) -> tuple[str, dict[str, bytes]] | None:
        commit = self.refs.get(revision, revision)
        return (commit, self.commits[commit]) if commit in self.commits else None


@dataclass
class Hub:
    """A running server; use as a context manager. `log` holds (method, path of the URL, range) of every request."""

    repos: dict[str, Repo] = field(default_factory=dict)  # "owner/name", data sets as "datasets/owner/name"
    log: list[tuple[str, str, str]] = field(default_factory=list)
    cut_after: dict[str, int] = field(default_factory=dict)  # file -> bytes after which the connection breaks, once
    stall_after: dict[str, int] = field(default_factory=dict)  # file -> bytes after which nothing more comes, once
    stalled: threading.Event = field(default_factory=threading.Event)
    altered: dict[str, bytes] = field(default_factory=dict)  # file -> what is sent instead of what is listed
    listed_size: dict[str, int] = field(default_factory=dict)  # file -> size in the listing
    needs_token: str | None = None  # files only with this token, as of a gated model
    status: int | None = None  # every answer

    def __enter__(self) -> Hub:
        handler = type("Handler", (_Handler,), {"hub": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def add(self, name: str, files: dict[str, bytes], branch: str = "main") -> str:
        """A new commit on `branch`; returns its id."""
        repo = self.repos.setdefault(name, Repo({}, {}))
        parts = [f"{path}{hashlib.sha1(content).hexdigest()}" for path, content in sorted(files.items())]
        commit = hashlib.sha1("".join([*parts, *repo.commits]).encode()).hexdigest()
        repo.commits[commit] = files
        repo.refs[branch] = commit
        return commit

    def asked(self, file: str, method: str = "GET") -> list[str]:
        """The ranges of the requests for a file, "" for the whole of it."""
        return [byte_range for verb, path, byte_range in self.log if verb == method and path.endswith(file)]


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: object) -> None:
        return

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        url = urlsplit(self.path)
        path, query = unquote(url.path), {k: v[0] for k, v in parse_qs(url.query).items()}
        file = query.get("FilePath", path)
        self.hub.log.append((self.command, file if "FilePath" in query else path, self.headers.get("Range", "")))
        if self.hub.status is not None:
            self._json({"error": "switched off"}, self.hub.status)
        elif path.startswith("/api/v1/"):
            self._modelscope(path.removeprefix("/api/v1/"), query)
        elif path.startswith("/api/"):
            self._hugging_face_api(path.removeprefix("/api/"))
        elif "/resolve/" in path:
            repo, _, rest = path.lstrip("/").partition("/resolve/")
            revision, _, name = rest.partition("/")
            self._hugging_face_file(repo, revision, name)
        else:
            self._json({}, 200)

    # Hugging Face

    def _hugging_face_api(self, path: str) -> None:
        if path.count("/") < 2:
            self._json({"error": "not found"}, 404)
            return
        kind, owner, name, *rest = path.split("/")
        repo = self.hub.repos.get(f"{owner}/{name}" if kind == "models" else f"{kind}/{owner}/{name}")
        if repo is None:  # without a token the real one says 401, so that private names do not show
            self._json({"error": "Invalid username or password."}, 401, {"X-Error-Code": "RepoNotFound"})
            return
        found = repo.files(rest[1] if len(rest) > 1 else "main")
        if found is None:
            self._json({"error": f"Invalid rev id: {rest[1]}"}, 404, {"X-Error-Code": "RevisionNotFound"})
            return
        commit, files = found
        if rest and rest[0] == "tree":
            tree = [
                {"type": "file", "path": p, "oid": _git_id(c), "size": len(c)} | _lfs(p, c) for p, c in files.items()
            ]
            self._json(tree)
            return
        siblings = []
        for file, content in files.items():
            lfs = _lfs(file, content)
            if lfs:
                lfs = {"lfs": {"sha256": lfs["lfs"]["oid"], "size": len(content), "pointerSize": 134}}
            size = self.hub.listed_size.get(file, len(content))
            siblings.append({"rfilename": file, "size": size, "blobId": _git_id(content)} | lfs)
        self._json({"id": f"{owner}/{name}", "sha": commit, "siblings": siblings, "private": False, "gated": False})

    def _hugging_face_file(self, repo: str, revision: str, name: str) -> None:
        found = self.hub.repos[repo].files(revision)
        assert found is not None
        commit, files = found
        if self.hub.needs_token and self.headers.get("Authorization") != f"Bearer {self.hub.needs_token}":
            self._json({"error": "restricted"}, 401, {"X-Error-Code": "GatedRepo", "X-Repo-Commit": commit})
            return
        content = files[name]
        etag = hashlib.sha256(content).hexdigest() if name.endswith(LFS_SUFFIXES) else _git_id(content)
        self._send(name, content, {"ETag": f'"{etag}"', "X-Repo-Commit": commit})

    # ModelScope

    def _modelscope(self, path: str, query: dict[str, str]) -> None:
        kind, *parts = path.split("/")
        name = "/".join(parts[:2]) if kind == "models" else f"{kind}/{'/'.join(parts[:2])}"
        repo = self.hub.repos.get(name)
        found = (
            repo.files({"main": "master"}.get(query.get("Revision", ""), query.get("Revision", ""))) if repo else None
        )
        if repo is None or found is None:
            self._json({"Code": 10010205001, "Success": False, "Message": "record not found"}, 404)
            return
        commit, files = found
        if len(parts) > 2 and parts[2:] in (["repo", "files"], ["repo", "tree"]):
            self._json({"Code": 200, "Success": True, "Data": {"Files": self._modelscope_files(repo, commit, files)}})
        elif self.hub.needs_token and self.headers.get("Authorization") != f"Bearer {self.hub.needs_token}":
            self._json({"Code": 10010103004, "Success": False, "Message": "no permission"}, 403)
        else:
            self._send(query["FilePath"], files[query["FilePath"]], {})

    def _modelscope_files(self, repo: Repo, commit: str, files: dict[str, bytes]) -> list[dict[str, object]]:
        """As of git: the newest commit on the way to `commit` that changed the file."""
        history = list(repo.commits)[: list(repo.commits).index(commit) + 1]
        listed = []
        for name, content in files.items():
            changed = next(
                i for i, c in enumerate(history) if all(repo.commits[d].get(name) == content for d in history[i:])
            )
            listed.append(
                {
                    "Name": name.rpartition("/")[2],
                    "Path": name,
                    "Type": "blob",
                    "Size": self.hub.listed_size.get(name, len(content)),
                    "Sha256": hashlib.sha256(content).hexdigest(),
                    "Revision": history[changed],
                    "CommittedDate": 1_700_000_000 + changed,
                }
            )
        return [*listed, {"Name": "folder", "Path": "folder", "Type": "tree", "Size": 0}]

    # Both

    def _send(self, name: str, content: bytes, headers: dict[str, str]) -> None:
        content = self.hub.altered.get(name, content)
        start, status = 0, 200
        wanted = self.headers.get("Range", "")
        if wanted.startswith("bytes=") and self.command == "GET":
            start, status = int(wanted.removeprefix("bytes=").split("-")[0]), 206
            headers = headers | {"Content-Range": f"bytes {start}-{len(content) - 1}/{len(content)}"}
        self.send_response(status)
        for key, value in (headers | {"Accept-Ranges": "bytes", "Content-Length": str(len(content) - start)}).items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        stop = self.hub.cut_after.pop(name, None)
        stall = self.hub.stall_after.pop(name, None)
        end = stop if stop is not None else stall
        self.wfile.write(content[start:end])
        if stall is not None:
            self.wfile.flush()
            self.hub.stalled.set()
            self.connection.recv(1)  # until the other side goes away
        if end is not None:
            self.close_connection = True

    def _json(self, value: object, status: int = 200, headers: dict[str, str] | None = None) -> None:
        body = json.dumps(value).encode()
        self.send_response(status)
        for key, entry in (
            (headers or {}) | {"Content-Type": "application/json", "Content-Length": str(len(body))}
        ).items():
            self.send_header(key, entry)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


def _git_id(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def _lfs(name: str, content: bytes) -> dict[str, dict[str, object]]:
    if not name.endswith(LFS_SUFFIXES):
        return {}
    return {"lfs": {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 134}}
