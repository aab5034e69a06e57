"""What may happen to a run's folder between two attempts: each is done by name in `staged_runs.py`."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import torch

from seqaware.checkpoint.manifest import MANIFEST, read_manifest, sealed

_locks: list[BinaryIO] = []


def checkpoint(run: str | Path, step: int) -> Path:
    return Path(run) / "checkpoints" / f"step-{step:08d}"


def largest(folder: Path) -> Path:
    return max(folder.glob("*.pt"), key=lambda path: path.stat().st_size)


def copy_until(source: str, goal: str, last: int) -> None:
    """The run as it was when it was killed after step `last`."""
    shutil.copytree(source, goal, ignore=shutil.ignore_patterns("model", ".lock"))
    forget_after(goal, last)


def copy_checkpoint(run: str, step: int, goal: str) -> None:
    shutil.copytree(checkpoint(run, step), goal)


def forget_after(run: str, last: int) -> None:
    """As if it had not come further than `last`."""
    for path in (Path(run) / "checkpoints").glob("step-*"):
        if int(path.name[5:]) > last:
            shutil.rmtree(path)
    manifest = json.loads((Path(run) / "manifest.json").read_text())
    manifest.pop("finished_steps", None)
    (Path(run) / "manifest.json").write_text(json.dumps(manifest))


def remove(run: str, *names: str) -> None:
    for name in names:
        (Path(run) / name).unlink()


def flip(run: str, step: int) -> None:
    """One bit in the middle of the largest file."""
    path = largest(checkpoint(run, step))
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def truncate(run: str, step: int) -> None:
    path = largest(checkpoint(run, step))
    path.write_bytes(path.read_bytes()[:-1])


def lose(run: str, step: int) -> None:
    largest(checkpoint(run, step)).unlink()


class _Planted:
    def __init__(self, goal: str) -> None:
        self.goal = goal

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return os.mkdir, (self.goal,)


def plant(run: str, step: int, goal: str) -> None:
    """A file that makes a folder when it is unpickled, with a manifest that knows it."""
    folder = checkpoint(run, step)
    path = next(folder.glob("*model_states.pt"))
    torch.save({"module": _Planted(goal)}, path)
    record = {"bytes": path.stat().st_size, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
    _rewrite(folder, {path.name: record})


def name_outside(run: str, step: int) -> None:
    """A manifest that names a file of another folder, as it is."""
    outside = Path(run) / "config.yaml"
    record = {"bytes": outside.stat().st_size, "sha256": hashlib.sha256(outside.read_bytes()).hexdigest()}
    _rewrite(checkpoint(run, step), {"../../config.yaml": record})


def _rewrite(folder: Path, files: dict[str, Any]) -> None:
    manifest = read_manifest(folder).model_dump(mode="json", exclude={"checksum"})
    manifest["files"] |= files
    (folder / MANIFEST).write_text(json.dumps(sealed(manifest)))


def lock(run: str, text: str) -> None:
    """Be at work in the folder."""
    file = (Path(run) / ".lock").open("w+b")
    fcntl.flock(file, fcntl.LOCK_EX)
    file.write(text.encode())
    file.flush()
    _locks.append(file)


def unlock() -> None:
    _locks.pop().close()
