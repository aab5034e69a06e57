"""What one rank writes into a checkpoint: every file hashed on its way out, made durable, and voted on.

A rank's `Vote` says what it meant to write, by size and hash, or why it could not. A checkpoint is complete when all
ranks have voted for it and every file lies there in its size.
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
import socket
import threading
from collections import OrderedDict
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from seqaware.data.file_records import FileRecord
from seqaware.data.store.store_writer import sync_to_disk
from seqaware.distributed.collective_errors import FAILURES


@dataclass(frozen=True)
class Vote:
    """A rank's word on its share of a checkpoint.

    Attributes:
        files: what it wrote. problem: why the share is not complete, or None.
    """

    rank: int
    files: Mapping[str, FileRecord]
    problem: str | None = None

    def to_json(self) -> str:
        files = {name: asdict(record) for name, record in self.files.items()}
        return json.dumps({"rank": self.rank, "files": files, "problem": self.problem})

    @classmethod
    def from_json(cls, text: str) -> Vote:
        content = json.loads(text)
        files = {name: FileRecord(**record) for name, record in content["files"].items()}
        return cls(content["rank"], files, content["problem"])


def vote_path(partial: Path, rank: int) -> Path:
    """Where a rank leaves its vote, for ranks that are not waiting for each other."""
    return partial / f"rank-{rank}.vote"


class Share:
    """One rank's part of a checkpoint: written at once, or copied to the host's memory and written later.

    After the first problem nothing more is written; nothing here raises it, because the other ranks wait for a vote.

    Args:
        partial: the folder that becomes the checkpoint. stop: set when nobody wants the checkpoint any more.
    """

    def __init__(self, partial: Path, *, rank: int, at_once: bool, stop: threading.Event) -> None:
        self._partial = partial
        self._rank = rank
        self._at_once = at_once
        self._stop = stop
        self._waiting: OrderedDict[str, Any] = OrderedDict()
        self._files: dict[str, FileRecord] = {}
        self._begun: list[Path] = []
        self._problem: str | None = None

    @property
    def stopped(self) -> bool:
        """Whether nobody wants the checkpoint any more."""
        return self._stop.is_set()

    def take(self, name: str, state: Any) -> None:
        """Take in the file `name`: anything that torch.save can write."""
        if self._problem is not None:
            return
        try:
            if self._at_once:
                self._files[name] = self._write(name, state)
            else:
                self._waiting[name] = snapshot(state)
        except FAILURES as error:
            self._give_up(error)

    def vote(self) -> Vote:
        """Write what waits, and judge. A share that failed leaves none of its files: they may have filled the disk."""
        try:
            while self._waiting and self._problem is None:
                name, state = self._waiting.popitem(last=False)
                self._files[name] = self._write(name, state)
                del state  # its memory is given back before the next file is written
            if self._problem is None:
                sync_to_disk(self._partial)
        except FAILURES as error:
            self._give_up(error)
        return Vote(self._rank, self._files, self._problem)

    def _write(self, name: str, state: Any) -> FileRecord:
        path = self._partial / name
        file = _HashedFile(path, self._stop)
        self._begun.append(path)
        try:
            torch.save(state, file)  # type: ignore[arg-type]  # it writes front to back, and asks for no more
            record = file.close()
        except RuntimeError as error:
            # torch swallows what the disk has said, and complains of a position in its stead.
            raise file.problem or error from None
        finally:
            file.abandon()
        size = path.stat().st_size
        if size != record.bytes:
            raise OSError(f"{name} has {size:,} bytes on the disk, of {record.bytes:,} that were written")
        return record

    def _give_up(self, error: BaseException) -> None:
        self._waiting.clear()
        self._files = {}
        self._problem = f"rank {self._rank} on {socket.gethostname()}: {error or type(error).__name__}"
        for path in self._begun:
            with suppress(OSError):
                path.unlink(missing_ok=True)


class _HashedFile:
    """A file that torch.save writes front to back, with its SHA-256 on the way.

    Attributes:
        problem: what the disk has refused a write with.
    """

    def __init__(self, path: Path, stop: threading.Event) -> None:
        self._file = path.open("wb")
        self._stop = stop
        self._digest = hashlib.sha256()
        self._bytes = 0
        self.problem: OSError | None = None

    def write(self, data: Any) -> int:
        if self._stop.is_set():
            raise OSError("given up")
        view = memoryview(data).cast("B")
        self._digest.update(view)
        try:
            self._file.write(view)
        except OSError as error:
            self.problem = error
            raise
        self._bytes += view.nbytes
        return view.nbytes

    def flush(self) -> None:
        self._file.flush()

    def close(self) -> FileRecord:
        with self._file as file:
            file.flush()
            os.fsync(file.fileno())
        return FileRecord(self._bytes, self._digest.hexdigest())

    def abandon(self) -> None:
        # Closed already where all went well. What is still buffered is not wanted: a disk that refuses it is no news.
        with suppress(OSError):
            self._file.close()


def snapshot(value: Any) -> Any:
    """A copy in the host's memory that shares nothing with `value`, however deep; torch.save writes both alike.

    Storages are copied whole and once, as torch.save writes them, so that tensors that share one still do.
    """
    return _Copier().copied(value)


class _Copier:
    def __init__(self) -> None:
        self._storages: dict[tuple[str, int, int], torch.UntypedStorage] = {}

    def copied(self, value: Any) -> Any:
        if type(value) in (torch.Tensor, torch.nn.Parameter):
            return self._tensor(value)
        if isinstance(value, dict):
            same_kind = copy.copy(value)  # with what an OrderedDict of weights carries besides
            same_kind.update({key: self.copied(each) for key, each in value.items()})
            return same_kind
        if type(value) is list:
            return [self.copied(each) for each in value]
        if type(value) is tuple:
            return tuple(self.copied(each) for each in value)
        return copy.deepcopy(value)

    def _tensor(self, tensor: torch.Tensor) -> torch.Tensor:
        source = tensor.untyped_storage()
        key = (str(source.device), source.data_ptr(), source.nbytes())
        if key not in self._storages:
            self._storages[key] = source.clone() if source.device.type == "cpu" else source.cpu()
        data = torch.empty(0, dtype=tensor.dtype)
        data.set_(self._storages[key], tensor.storage_offset(), tensor.size(), tensor.stride())
        if isinstance(tensor, torch.nn.Parameter):
            return torch.nn.Parameter(data, requires_grad=tensor.requires_grad)
        return data.requires_grad_(tensor.requires_grad)
