"""What a hub does with uploads: repositories made, files sent in a commit or through LFS."""

from __future__ import annotations

import base64
import hashlib
import json
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from http import HTTPStatus
from pathlib import Path
from typing import Any, Protocol

LFS_SUFFIX = ".safetensors"


class Server(Protocol):
    """What has the repositories."""

    repositories: list[Any]

    def add(self, name: str, folder: Path, *, private: bool) -> None: ...


@dataclass(frozen=True)
class Answer:
    """What a request is answered with."""

    content: object
    status: HTTPStatus = HTTPStatus.OK
    headers: Mapping[str, str] = field(default_factory=dict)


class Uploads:
    """The calls of an upload, for a client with the right token; `tokens` are those that were sent."""

    right_token: str | None = None

    def __init__(self, server: Server, address: str) -> None:
        self._server = server
        self._address = address
        self._objects: dict[str, bytes] = {}
        self._folder = tempfile.TemporaryDirectory()
        self.tokens: set[str | None] = set()
        self.commits: list[str] = []

    def answer(self, method: str, path: str, body: bytes, *, token: str | None) -> Answer | None:
        """The answer to a call of an upload; None for any other call."""
        call = self._call(method, path)
        if call is None:
            return None
        self.tokens.add(token)
        if path.startswith("lfs/"):  # signed addresses carry no token
            return call(path, body)
        if token != f"Bearer {self.right_token}":
            return Answer({"error": "Invalid username or password."}, HTTPStatus.UNAUTHORIZED)
        return call(path, body)

    def _call(self, method: str, path: str) -> Any:
        if method == "PUT" and path.startswith("lfs/"):
            return self._put
        if method != "POST":
            return None
        known = {"api/repos/create": self._create, "api/validate-yaml": self._validate}
        if path.endswith(".git/info/lfs/objects/batch"):
            return self._batch
        if path.startswith("api/models/") and "/preupload/" in path:
            return self._preupload
        if path.startswith("api/models/") and "/commit/" in path:
            return self._commit
        return known.get(path)

    def _create(self, path: str, body: bytes) -> Answer:
        asked = json.loads(body)
        name = f"{asked['organization']}/{asked['name']}"
        address = {"url": f"{self._address}/{name}"}
        if any(each.name == name for each in self._server.repositories):
            return Answer({"error": "You already created this model repo", **address}, HTTPStatus.CONFLICT)
        folder = Path(self._folder.name, name)
        folder.mkdir(parents=True)
        self._server.add(name, folder, private=asked.get("visibility") == "private")
        return Answer(address)

    def _validate(self, path: str, body: bytes) -> Answer:
        begins = json.loads(body)["content"].startswith("---\n")
        return Answer({"errors": [] if begins else [{"message": "no front matter"}], "warnings": []})

    def _preupload(self, path: str, body: bytes) -> Answer:
        files = [
            {
                "path": each["path"],
                "uploadMode": "lfs" if each["path"].endswith(LFS_SUFFIX) else "regular",
                "shouldIgnore": False,
            }
            for each in json.loads(body)["files"]
        ]
        return Answer({"files": files})

    def _batch(self, path: str, body: bytes) -> Answer:
        objects = [
            {**each, "actions": {"upload": {"href": f"{self._address}/lfs/{each['oid']}"}}}
            for each in json.loads(body)["objects"]
        ]
        return Answer({"transfer": "basic", "objects": objects})

    def _put(self, path: str, body: bytes) -> Answer:
        oid = hashlib.sha256(body).hexdigest()
        assert path == f"lfs/{oid}", "what was sent is not what was announced"
        self._objects[oid] = body
        return Answer({})

    def _commit(self, path: str, body: bytes) -> Answer:
        name = path.removeprefix("api/models/").partition("/commit/")[0]
        repository = next(each for each in self._server.repositories if each.name == name)
        lines = [json.loads(line) for line in body.decode().splitlines() if line]
        contents = {}
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                contents[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                contents[value["path"]] = self._objects[value["oid"]]
        for place, content in contents.items():
            target = repository.folder / place
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(content)
        self.commits.append(next(line["value"]["summary"] for line in lines if line["key"] == "header"))
        sha = repository.sha
        return Answer({"success": True, "commitOid": sha, "commitUrl": f"{self._address}/{name}/commit/{sha}"})
