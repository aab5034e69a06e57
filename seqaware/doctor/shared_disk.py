"""The disk of the run's folder: what a run asks of it, tried out, and how fast it is."""

from __future__ import annotations

import fcntl
import os
import secrets
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from filelock import SoftFileLease

from seqaware.data.store.store_writer import sync_to_disk
from seqaware.doctor.findings import Finding, error, ok, warning
from seqaware.locks import LEASE_SECONDS, UNSUPPORTED

_BLOCK = 2**23
_MOST_BYTES = 2**27
_WRITE_SECONDS = 1.5
_SLOW_MEGABYTES = 50
_SLOW_SYNC_SECONDS = 0.5
_PREFIX = ".doctor-"


def nearest_existing(path: Path) -> Path:
    """The folder itself, or the nearest one above it that is there."""
    return next(parent for parent in (path.absolute(), *path.absolute().parents) if parent.is_dir())


@contextmanager
def _scratch(folder: Path) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(dir=folder, prefix=_PREFIX) as scratch:
        yield Path(scratch)


@dataclass(frozen=True)
class Note:
    """A file for other hosts to read. This process holds its lock."""

    path: Path
    text: str

    @classmethod
    @contextmanager
    def written(cls, folder: Path) -> Iterator[Note]:
        """A note in an existing folder; it is gone after the block."""
        with _scratch(folder) as scratch:
            scratch.chmod(0o755)
            note = cls(scratch / "note", secrets.token_hex(8))
            note.path.write_text(note.text)
            sync_to_disk(note.path)
            with note.path.open() as file:
                # Whether locks work here is another check's to tell.
                with suppress(OSError):
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                yield note


def disk(folder: Path, subject: str) -> Iterator[Finding]:
    """Try out, in an existing folder, what a run does: rename, lock, sync, write and read much.

    Args:
        subject: what the folder is for: `run folder`.
    """
    try:
        with _scratch(folder) as scratch:
            yield from _renames(scratch)
            yield from _locks(scratch)
            yield from _speed(scratch, subject)
    except OSError as trouble:
        do = "correct its rights, free some space, or choose another folder"
        yield error(subject, f"{folder} cannot be written: {trouble.strerror}", do)
        return
    usage = shutil.disk_usage(folder)
    free = f"{usage.free / 1e9:,.1f} of {usage.total / 1e9:,.1f} GB free"
    yield ok(subject, f"{folder} on {file_system(folder)}: {free}")


def _renames(scratch: Path) -> Iterator[Finding]:
    """A checkpoint is complete when its last file is renamed into place."""
    old, new = scratch / "old", scratch / "new"
    old.write_text("old")
    new.write_text("new")
    sync_to_disk(new)
    new.replace(old)
    (scratch / "a").mkdir()
    (scratch / "a").rename(scratch / "b")
    if old.read_text() != "new" or new.exists() or not (scratch / "b").is_dir():
        do = "put output.dir on a POSIX file system"
        yield error("rename", "a file that was renamed is not in its place", do)


def _locks(scratch: Path) -> Iterator[Finding]:
    """A run holds a lock on its folder; two of them would overwrite each other."""
    path = scratch / "lock"
    with path.open("w") as first, path.open("w") as second:
        try:
            fcntl.flock(first, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as trouble:
            do = "mount it with locks (Lustre: flock), or choose another output.dir"
            if trouble.errno in UNSUPPORTED:
                found = f"refused: {trouble.strerror}; leases stand in; they expire after {LEASE_SECONDS:.0f} s"
                yield warning("file locks", found, do)
            else:
                yield error("file locks", f"refused: {trouble.strerror}", do)
            return
        try:
            fcntl.flock(second, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return
        yield error("file locks", "two processes both get the same lock", "choose another output.dir")


def leases(folders: Sequence[Path]) -> Iterator[Finding]:
    """Locks on a file system without flock: who holds each, and whether it has expired."""
    depths = ("*.lease", "*/*.lease")
    for file in sorted({file for folder in folders for depth in depths for file in folder.glob(depth)}):
        try:
            owner, age = SoftFileLease(file).owner, time.time() - file.stat().st_mtime
        except OSError:  # released since
            continue
        who = f"process {owner.pid} on host {owner.hostname}" if owner else "an unknown process"
        found = f"{file}: held by {who}, renewed {max(0.0, age):.0f} s ago"
        if age > LEASE_SECONDS:
            yield warning("lease", f"{found}: expired", "nothing, if that process is gone: whoever comes next takes it")
        else:
            yield ok("lease", found)


def _speed(scratch: Path, subject: str) -> Iterator[Finding]:
    """Write for a second or so, wait for the disk, read it back past the cache."""
    path = scratch / "blocks"
    writing = _write(path, _MOST_BYTES)
    reading = _read_back(path)
    begun = time.monotonic()
    (scratch / "small").write_text("small")
    sync_to_disk(scratch / "small")
    sync = time.monotonic() - begun
    found = f"writes {writing:,.0f} MB/s, reads {reading:,.0f} MB/s, syncs a small file in {sync * 1e3:.0f} ms"
    if min(writing, reading) < _SLOW_MEGABYTES or sync > _SLOW_SYNC_SECONDS:
        do = "choose a faster disk, or write checkpoints less often (output.save_every)"
        yield warning(f"{subject} speed", found, do)
    else:
        yield ok(f"{subject} speed", found)


def _write(path: Path, most: int) -> float:
    """Megabytes a second, onto the disk and not into its cache."""
    block = os.urandom(_BLOCK)  # random, so that no disk compresses it
    begun, written = time.monotonic(), 0
    with path.open("wb", buffering=0) as file:
        while written < most and time.monotonic() - begun < _WRITE_SECONDS:
            file.write(block)
            os.fdatasync(file.fileno())  # block by block, so that a slow disk ends the loop too
            written += _BLOCK
    return written / 1e6 / (time.monotonic() - begun)


def why_not_writable(folder: Path) -> str | None:
    """None if files can be made in the folder, or where it would be made; else why not."""
    try:
        with tempfile.TemporaryFile(dir=nearest_existing(folder)):
            return None
    except OSError as trouble:
        return trouble.strerror or str(trouble)


def roughly_writes(folder: Path) -> float:
    """Megabytes a second of one small file in an existing folder.

    Raises:
        OSError: the folder cannot be written.
    """
    with _scratch(folder) as scratch:
        return _write(scratch / "block", _BLOCK)


def _read_back(path: Path) -> float:
    """Megabytes a second."""
    begun, size = time.monotonic(), 0
    with path.open("rb", buffering=0) as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        while block := file.read(_BLOCK):
            size += len(block)
    return size / 1e6 / max(time.monotonic() - begun, 1e-9)


def file_system(folder: Path) -> str:
    """The kind of file system: ext4, nfs4, lustre …; `unknown` where the kernel does not say."""
    best, kind = Path(), "unknown"
    with suppress(OSError):
        for line in Path("/proc/self/mounts").read_text(encoding="utf-8", errors="replace").splitlines():
            _, place, found, *_ = line.split(" ")
            mount = Path(place.replace("\\040", " "))
            if folder.absolute().is_relative_to(mount) and len(mount.parts) >= len(best.parts):
                best, kind = mount, found
    return kind
