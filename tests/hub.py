"""A small Hugging Face hub on loopback: models and datasets from folders, in the hub's API and file layout.

    with hub({"openai/gsm8k": folder}, models={"someone/model": folder}) as server:
        subprocess.run([...], env=server.environment(cache))

The real `datasets.load_dataset` and transformers' `from_pretrained` then read from it, without knowing. Every
repository has one commit; a file that is asked for in ranges is sent in ranges, as streaming needs it.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from tests.hub_uploads import Uploads

REVISIONS = ("main", "refs/convert/parquet")


@dataclass(frozen=True)
class Repository:
    """A repository: what kind, its id, and the folder that holds its files."""

    kind: str
    name: str
    folder: Path
    private: bool = False

    @property
    def sha(self) -> str:
        """The commit: the content decides."""
        digest = hashlib.sha1(self.name.encode())
        for path in self.paths():
            digest.update(path.encode() + (self.folder / path).read_bytes())
        return digest.hexdigest()

    def paths(self) -> list[str]:
        return sorted(file.relative_to(self.folder).as_posix() for file in self.folder.rglob("*") if file.is_file())

    def info(self) -> dict[str, Any]:
        """What GET /api/datasets/<id> answers."""
        return {
            "_id": self.sha[:24],
            "id": self.name,
            "sha": self.sha,
            "private": self.private,
            "gated": False,
            "disabled": False,
            "downloads": 0,
            "likes": 0,
            "tags": [],
            "lastModified": "2026-01-01T00:00:00.000Z",
            "createdAt": "2026-01-01T00:00:00.000Z",
            "siblings": [{"rfilename": path} for path in self.paths()],
        }

    def entry(self, path: str) -> dict[str, Any] | None:
        """What the hub says about one file or folder, or None if there is none."""
        place = self.folder / path
        if place.is_dir():
            return {"type": "directory", "oid": "0" * 40, "size": 0, "path": path}
        if not place.is_file():
            return None
        return {"type": "file", "oid": etag(place), "size": place.stat().st_size, "path": path}

    def tree(self, under: str, *, recursive: bool) -> list[dict[str, Any]] | None:
        """Files and folders below a folder; None if there is no such folder."""
        root = self.folder / under
        if not root.is_dir():
            return None
        found = root.rglob("*") if recursive else root.glob("*")
        paths = sorted(place.relative_to(self.folder).as_posix() for place in found)
        return [entry for path in paths if (entry := self.entry(path)) is not None]


def etag(file: Path) -> str:
    return hashlib.sha1(file.read_bytes()).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    def do_GET(self) -> None:
        self._answer()

    def do_HEAD(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer()

    def do_PUT(self) -> None:
        self._answer()

    def log_message(self, format: str, *args: object) -> None:
        """Silent: `_Server.requests` has them."""

    def _answer(self) -> None:
        parts = urlsplit(self.path)
        path = unquote(parts.path).strip("/")
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.server.requests.append(f"{self.command} /{path}")
        query = parse_qs(parts.query)
        answer = self.server.uploads.answer(self.command, path, body, token=self.headers.get("Authorization"))
        if answer is not None:
            self._send(answer.status, json.dumps(answer.content).encode(), "application/json", answer.headers)
            return
        if path.startswith("api/"):
            self._api(path.removeprefix("api/"), query, body)
            return
        kind = "datasets" if path.startswith("datasets/") else "models"
        repository, rest = self._repository(kind, path.removeprefix("datasets/"))
        if repository is None:
            return
        revision, file = _revision_of(rest.removeprefix("resolve/"), repository)
        if revision is None:
            self._refuse("RevisionNotFound", "no such revision")
            return
        self._file(repository, file)

    def _api(self, path: str, query: Mapping[str, list[str]], body: bytes) -> None:
        kind, _, rest = path.partition("/")
        if kind not in ("datasets", "models"):
            self._refuse("EntryNotFound", f"no such call: {path}")
            return
        repository, call = self._repository(kind, rest)
        if repository is None:
            return
        verb, _, rest = call.partition("/")
        revision, place = _revision_of(rest, repository) if rest else ("main", "")
        if revision is None:
            self._refuse("RevisionNotFound", "no such revision")
            return
        match verb:
            case "" | "revision":
                self._json(repository.info())
            case "tree":
                tree = repository.tree(place, recursive=query.get("recursive", ["false"])[0].lower() == "true")
                if tree is None:
                    self._refuse("EntryNotFound", f"no folder {place}")
                else:
                    self._json(tree)
            case "paths-info":
                text = body.decode()
                paths = json.loads(text)["paths"] if text.startswith("{") else parse_qs(text).get("paths", [])
                self._json([entry for path in paths if (entry := repository.entry(path)) is not None])
            case _:
                self._refuse("EntryNotFound", f"no such call: {path}")

    def _repository(self, kind: str, path: str) -> tuple[Repository | None, str]:
        for repository in self.server.repositories:
            if repository.kind == kind and (path + "/").startswith(repository.name + "/"):
                return repository, path[len(repository.name) + 1 :]
        self._refuse("RepoNotFound", f"Repository Not Found: {path}")
        return None, ""

    def _file(self, repository: Repository, path: str) -> None:
        file = repository.folder / path
        if not file.is_file():
            self._refuse("EntryNotFound", f"no file {path}", {"X-Repo-Commit": repository.sha})
            return
        content = file.read_bytes()
        begin, end, status = 0, len(content), HTTPStatus.OK
        asked = self.headers.get("Range", "")
        headers = {"ETag": f'"{etag(file)}"', "X-Repo-Commit": repository.sha, "Accept-Ranges": "bytes"}
        if asked.startswith("bytes="):
            first, _, last = asked.removeprefix("bytes=").partition("-")
            begin, end = int(first), min(int(last) + 1 if last else len(content), len(content))
            status = HTTPStatus.PARTIAL_CONTENT
            headers["Content-Range"] = f"bytes {begin}-{end - 1}/{len(content)}"
        self.server.bytes_sent += end - begin if self.command == "GET" else 0
        self._send(status, content[begin:end], "application/octet-stream", headers)

    def _json(self, value: object) -> None:
        self._send(HTTPStatus.OK, json.dumps(value).encode(), "application/json", {})

    def _refuse(self, code: str, message: str, headers: Mapping[str, str] | None = None) -> None:
        body = json.dumps({"error": message}).encode()
        named = {"X-Error-Code": code, "X-Error-Message": message, **(headers or {})}
        self._send(HTTPStatus.NOT_FOUND, body, "application/json", named)

    def _send(self, status: HTTPStatus, body: bytes, kind: str, headers: Mapping[str, str]) -> None:
        self.send_response(status)
        for name, value in {"Content-Type": kind, "Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


def _revision_of(path: str, repository: Repository) -> tuple[str | None, str]:
    """(revision, the rest of the path); the revision is None if there is no such one."""
    for revision in (*REVISIONS, repository.sha):
        if (path + "/").startswith(revision + "/"):
            return revision, path[len(revision) + 1 :]
    return None, ""


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def add(self, name: str, folder: Path, *, private: bool) -> None:
        """A repository that a client has made."""
        self.repositories.append(Repository("models", name, folder, private))

    def __init__(self, repositories: list[Repository]) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repositories = repositories
        self.requests: list[str] = []
        self.uploads = Uploads(self, f"http://127.0.0.1:{self.server_port}")
        self.bytes_sent = 0


@dataclass(frozen=True)
class Hub:
    """A running hub: its address, and what it was asked for."""

    server: _Server

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server.server_port}"

    @property
    def requests(self) -> list[str]:
        return list(self.server.requests)

    @property
    def uploads(self) -> Uploads:
        return self.server.uploads

    @property
    def bytes_sent(self) -> int:
        """Bytes of files, API answers not counted."""
        return self.server.bytes_sent

    def environment(self, cache: Path) -> dict[str, str]:
        """The environment of a process that shall use this hub, with its own cache."""
        inherited = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "http", "HTTP"))}
        return {
            **inherited,
            "HF_ENDPOINT": self.address,
            "HF_HOME": str(cache),
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_XET": "1",
            "NO_PROXY": "127.0.0.1",
        }


@contextmanager
def hub(datasets: Mapping[str, Path], models: Mapping[str, Path] | None = None) -> Iterator[Hub]:
    """Serve folders as repositories, by their ids, while the block runs."""
    repositories = [Repository("datasets", name, folder) for name, folder in datasets.items()]
    repositories += [Repository("models", name, folder) for name, folder in (models or {}).items()]
    server = _Server(repositories)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield Hub(server)
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
