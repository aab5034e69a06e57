"""Locks of files that every host sees and that end with their holder: the kernel's, or a lease where it has none.

flock ends with the process that holds it, on whichever host. Some file systems have none (Lustre without `-o flock`,
some FUSE mounts); there a file's existence is the lock, and one of a host that died would stand for ever. So it is a
lease: `NAME.lease` names its owner's process and host, the owner renews it, and whoever has seen it unrenewed for
LEASE_SECONDS takes it over. Each counts by its own clock, so clocks that differ between hosts do no harm.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import BaseFileLock, FileLock, SoftFileLease

# Longer than a client of NFS may show old attributes (acregmax, 60 s), and several renewals.
LEASE_SECONDS = 180.0
_RENEWED_EVERY = 20.0
UNSUPPORTED = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL)
"""Errors of flock on a file system that has no locks."""


@contextmanager
def held(path: Path) -> Iterator[None]:
    """Inside, no other process on this file system holds the lock `path`; waits for it."""
    lock = acquire(path)
    try:
        yield
    finally:
        lock.release()


def acquire(path: Path) -> BaseFileLock:
    """Wait for the lock `path` (`NAME.lock`), and take it; the caller releases it."""
    lock: BaseFileLock = FileLock(path, fallback_to_soft=False)
    try:
        lock.acquire()
    except OSError as error:
        if error.errno not in UNSUPPORTED:
            raise
        lock = lease_of(path)
        lock.acquire()
    return lock


def lease_of(path: Path) -> SoftFileLease:
    """The lease that stands in for the lock `path`. A file of its own: flock leaves an empty one behind."""
    file = path.with_name(f"{path.name.removesuffix('.lock')}.lease")
    return SoftFileLease(file, lease_duration=LEASE_SECONDS, heartbeat_interval=_RENEWED_EVERY)
