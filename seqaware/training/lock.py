"""One run in a folder at a time: rank 0 holds a lock on `.lock`, whose text says who it is.

The lock is the kernel's (flock): whatever ends the process frees it, so that none is left behind by a crash.
"""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from seqaware.engine.address import RankAddress
from seqaware.errors import ConfigError
from seqaware.training.process import Say

LOCK = ".lock"
_HELD = (errno.EACCES, errno.EAGAIN)
_UNSUPPORTED = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL)


@contextmanager
def alone_in(folder: Path, address: RankAddress, *, say: Say) -> Iterator[None]:
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
    try:
        _take(file, folder, say)
        with suppress(OSError):  # a full disk: the lock holds without a name on it
            os.truncate(file, 0)
            os.pwrite(file, _who(address).encode(), 0)
        yield
    finally:
        os.close(file)


def _take(file: int, folder: Path, say: Say) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in _UNSUPPORTED:
            say(f"warning     {folder} cannot be locked ({error.strerror}): see to it that no second run works in it")
            return
        if error.errno not in _HELD:
            raise ConfigError("output.dir cannot be locked", got=f"{folder} ({error.strerror})") from error
        who = os.pread(file, 1000, 0).decode(errors="replace").strip()
        raise ConfigError(
            "another run is at work in output.dir",
            got=f"{folder}, held by {who or 'a process that is just starting'}",
            do="wait for it, end it, or choose another output.dir",
        ) from error


def _who(address: RankAddress) -> str:
    job = "" if address.job is None else f", job {address.job}"
    return f"process {os.getpid()} on {socket.gethostname()} since {time.strftime('%Y-%m-%d %H:%M:%S %z')}{job}\n"
