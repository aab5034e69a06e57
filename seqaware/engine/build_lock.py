"""The lock under which torch builds and loads a compiled operator, made one that ends with its holder.

torch's own is a file, and that it is there is the lock: where the process that made it is killed, every later one waits
for ever, without a word. Here the kernel holds a lock on the same file (flock), and frees it whatever ends the process.
"""

from __future__ import annotations

import fcntl
import os
import time
from pathlib import Path

from torch.utils import cpp_extension
from torch.utils.file_baton import FileBaton


class KernelLock(FileBaton):
    """torch's lock on a file, but that a file which nobody holds is free."""

    def try_acquire(self) -> bool:
        """Whether it is ours now. On a disk without locks, whether the file was not there, as torch has it."""
        try:
            file = os.open(self.lock_file_path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o666)
            made = True
        except FileExistsError:
            made = False
            try:
                file = os.open(self.lock_file_path, os.O_RDWR)
            except OSError:  # gone since, or another user's
                return False
        if self._holds(file, otherwise=made):
            self.fd = file  # type: ignore[assignment]  # torch does not say that it may be one
            return True
        os.close(file)
        return False

    def _holds(self, file: int, *, otherwise: bool) -> bool:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError:
            return otherwise
        # Its last holder may have removed it since we opened it.
        path = Path(self.lock_file_path)
        return path.exists() and path.stat().st_ino == os.fstat(file).st_ino

    def release(self) -> None:
        Path(self.lock_file_path).unlink(missing_ok=True)
        if self.fd is not None:
            os.close(self.fd)
            self.fd = None

    def wait(self) -> None:
        """Return when whoever holds it has released it, or is no more."""
        while not self.try_acquire():
            time.sleep(self.wait_seconds)
        self.release()


def free_locks_of_the_dead() -> None:
    """Let torch use this lock in this process."""
    cpp_extension.FileBaton = KernelLock  # type: ignore[attr-defined]
