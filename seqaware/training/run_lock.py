"""One run in a folder at a time: rank 0 holds a lock on `.lock`, whose text says who it is.

The lock is the kernel's (flock): whatever ends the process frees it, so that none is left behind by a crash. On a file
system without locks it is a lease, which expires (seqaware/locks.py).
"""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from filelock import SoftFileLease, Timeout

from seqaware.distributed.launch_environment import LaunchEnvironment
from seqaware.errors import ConfigError
from seqaware.locks import LEASE_SECONDS, UNSUPPORTED, lease_of
from seqaware.training.process import Say

LOCK = ".lock"
_HELD = (errno.EACCES, errno.EAGAIN)
_BETWEEN_LOOKS = 1.0


@contextmanager
def locked_run(folder: Path, address: LaunchEnvironment, *, say: Say) -> Iterator[None]:
    """Keep other runs out of `folder`, which is made if it is not there.

    Raises:
        ConfigError: another run is at work in it, or it cannot be locked. Nothing was changed.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # Not truncated on opening: until the lock is ours, the text is another run's.
        file = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        do = f"mend the rights of {LOCK} in it, or choose another output.dir"
        raise ConfigError("output.dir cannot be locked", got=f"{folder} ({error.strerror})", do=do) from error
    with ExitStack() as stack:
        stack.callback(os.close, file)
        if not _take(file, folder):
            say(
                f"warning     {folder} has no file locks: a lease keeps other runs out, and expires after "
                f"{LEASE_SECONDS:.0f} s without its run"
            )
            lease = lease_of(folder / LOCK)
            _take_lease(lease, folder, say)
            stack.callback(lease.release)
        with suppress(OSError):  # a full disk: the lock holds without a name on it
            os.truncate(file, 0)
            os.pwrite(file, _who(address).encode(), 0)
        yield


def _take(file: int, folder: Path) -> bool:
    """Take the kernel's lock; False where there are none."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in UNSUPPORTED:
            return False
        if error.errno not in _HELD:
            raise ConfigError("output.dir cannot be locked", got=f"{folder} ({error.strerror})") from error
        who = os.pread(file, 1000, 0).decode(errors="replace").strip()
        raise _another_run(folder, who or "a process that is just starting") from error
    return True


def _take_lease(lease: SoftFileLease, folder: Path, say: Say) -> None:
    """Take the lease once it is free or has expired; refuse once its owner is seen to renew it."""
    first: tuple[int, int] | None = None
    while True:
        try:
            lease.acquire(blocking=False)
            return
        except Timeout:
            owner = lease.owner
        with suppress(OSError):  # released since
            status = Path(lease.lock_file).stat()
            renewed = (status.st_ino, status.st_mtime_ns)
            who = f"process {owner.pid} on {owner.hostname}" if owner else "a process that is just starting"
            if first is None:
                say(f"waiting     {folder} is held by {who}: waiting to see whether it still runs")
            elif renewed != first:
                raise _another_run(folder, who)
            first = renewed
        time.sleep(_BETWEEN_LOOKS)


def _another_run(folder: Path, who: str) -> ConfigError:
    return ConfigError(
        "another run is at work in output.dir",
        got=f"{folder}, held by {who}",
        do="wait for it, end it, or choose another output.dir",
    )


def _who(address: LaunchEnvironment) -> str:
    job = "" if address.job is None else f", job {address.job}"
    return f"process {os.getpid()} on {socket.gethostname()} since {time.strftime('%Y-%m-%d %H:%M:%S %z')}{job}\n"
