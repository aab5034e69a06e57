"""The lock under which torch builds a compiled operator: it ends with its holder, and shows that the build proceeds.

torch's own lock is a file, and its existence is the lock: if the process that made it is killed, every later one waits
forever. Here the kernel holds a lock on the same file (flock), and frees it whatever ends the process. The holder
writes its pid and a counter of its progress into the file, so that those who wait can tell a build from a hang.
Imports without torch.
"""

from __future__ import annotations

import fcntl
import json
import os
import socket
import sys
import threading
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from filelock import SoftFileLease, Timeout

from seqaware.files import read_json
from seqaware.locks import lease_of
from seqaware.masking import escaped

_BETWEEN_LOOKS = 1.0
# A wait that is shorter is not worth a line.
_SAID_AFTER_SECONDS = 1.0
# Of CPU time, of one operator. The longest build that is known takes ten minutes; a compiler that loops is a hang.
_LONGEST_BUILD_SECONDS = 3600.0
# Places in /proc/<pid>/stat, counted behind the command's name: see proc_pid_stat(5).
_PARENT, _CPU_TIMES = 1, slice(11, 15)


class BuildListener:
    """What is done when an operator is built. This one prints to standard error.

    Args:
        quiet: do not print that this process waits: another one of the same launch does.
    """

    def __init__(self, *, quiet: bool = False) -> None:
        self._quiet = quiet

    def moved(self) -> None:
        """The build proceeds: this process's own, or the one that it waits for. Called from any thread."""

    def builds(self, text: str) -> None:
        """This process starts to compile an operator."""
        print(escaped(text), file=sys.stderr, flush=True)

    def waits(self, text: str) -> None:
        """This process waits for another one that compiles an operator."""
        if not self._quiet:
            print(escaped(text), file=sys.stderr, flush=True)


_listener = BuildListener()


def listen(listener: BuildListener) -> None:
    """Report every build of this process to `listener`, instead of the one before."""
    global _listener
    _listener = listener


def listener() -> BuildListener:
    """The listener of this process."""
    return _listener


@dataclass(frozen=True)
class Holder:
    """What the holder of a lock writes into its file. moves: a counter of its progress."""

    pid: int
    parent: int
    host: str
    moves: int = 0


class KernelLock:
    """Stands in for `torch.utils.file_baton.FileBaton`: acquired by one process after the other; none builds twice.

    Args:
        lock_file_path: as torch passes it. wait_seconds: between two tries.
    """

    def __init__(self, lock_file_path: str, wait_seconds: float = 0.1) -> None:
        self.lock_file_path = lock_file_path
        self.wait_seconds = wait_seconds
        self._file: int | None = None
        self._pulse: _Pulse | None = None
        self._lease: SoftFileLease | None = None

    def try_acquire(self) -> bool:
        """Wait until the lock is ours; always True.

        torch would let the others wait and then load what the holder has built, which is nothing if the holder was
        killed. Here each of them checks in turn that the operator is built.
        """
        self._wait()
        self._pulse = _Pulse(self._file)
        self._pulse.start()
        return True

    def take(self) -> bool:
        """Take the lock if nobody holds it. On a disk without locks a lease stands in, which expires."""
        try:
            file = os.open(self.lock_file_path, os.O_CREAT | os.O_RDWR, 0o666)
        except OSError:  # another user's
            return False
        if self._holds(file):
            self._file = file
            return True
        os.close(file)
        return False

    def release(self) -> None:
        if self._pulse is not None:
            self._pulse.stop()
            self._pulse = None
        Path(self.lock_file_path).unlink(missing_ok=True)
        if self._file is not None:
            os.close(self._file)
            self._file = None
        if self._lease is not None:
            self._lease.release()

    def _holds(self, file: int) -> bool:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError:
            return self._has_lease()
        # Its last holder may have removed it since we opened it, and the next one may remove its own at any moment.
        try:
            return Path(self.lock_file_path).stat().st_ino == os.fstat(file).st_ino
        except FileNotFoundError:
            return False

    def _has_lease(self) -> bool:
        if self._lease is None:
            # One for all looks: it counts for how long it has not seen the holder renew the lease.
            self._lease = lease_of(Path(self.lock_file_path))
        with suppress(Timeout):
            self._lease.acquire(blocking=False)
        return self._lease.is_locked

    def _wait(self) -> None:
        begun, said = time.monotonic(), False
        seen: Holder | None = None
        while not self.take():
            holder = self._holder() or seen
            if holder is not None and holder != seen:
                seen = holder
                _listener.moved()
            # Ranks of one launch share their parent, and the one that builds says so itself.
            sibling = holder is not None and (holder.host, holder.parent) == (socket.gethostname(), os.getppid())
            if not said and not sibling and time.monotonic() - begun > _SAID_AFTER_SECONDS:
                said = True
                name = Path(self.lock_file_path).parent.name
                _listener.waits(f"the operator {name} is not built yet: waiting for {_name(holder)}")
            time.sleep(self.wait_seconds)

    def _holder(self) -> Holder | None:
        try:
            return Holder(**read_json(Path(self.lock_file_path), limit=2**12))
        except (OSError, ValueError, TypeError):
            return None  # gone, being written, or torch's own


def _name(holder: Holder | None) -> str:
    if holder is None:
        return "another process, which is building it"
    elsewhere = "" if holder.host == socket.gethostname() else f" on host {holder.host}"
    return f"pid {holder.pid}{elsewhere}, which is building it"


class _Pulse(threading.Thread):
    """Shows that this process's build proceeds, for as long as what it has started uses CPU time."""

    def __init__(self, file: int | None) -> None:
        super().__init__(name="build", daemon=True)
        self._file = file
        self._stopping = threading.Event()
        self._holder = Holder(os.getpid(), os.getppid(), socket.gethostname())
        # Children from before have nothing to do with the build: workers, or a guard that polls.
        self._others = set(_descendants())
        self._write()

    def run(self) -> None:
        seen: dict[int, float] = {}
        while not self._stopping.wait(_BETWEEN_LOOKS):
            now = {pid: seconds for pid, seconds in _descendants().items() if pid not in self._others}
            if now != seen and sum(now.values()) < _LONGEST_BUILD_SECONDS:
                seen = now
                self._holder = Holder(**asdict(self._holder) | {"moves": self._holder.moves + 1})
                self._write()
                _listener.moved()

    def _write(self) -> None:
        if self._file is not None:
            with suppress(OSError):  # a full disk: the build will say so
                content = json.dumps(asdict(self._holder)).encode()
                os.pwrite(self._file, content, 0)
                # A holder that was killed may have left a longer text.
                os.ftruncate(self._file, len(content))

    def stop(self) -> None:
        self._stopping.set()
        self.join()


def _descendants() -> dict[int, float]:
    """The processes that this one has started, and theirs: pid -> seconds of CPU time, with that of ended children."""
    parents, seconds = {}, {}
    tick = os.sysconf("SC_CLK_TCK")
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with suppress(OSError):
                text = (entry / "stat").read_text(encoding="ascii", errors="replace")
                # The command's name stands in brackets and may hold blanks and brackets itself.
                fields = text[text.rindex(")") + 2 :].split()
                parents[int(entry.name)] = int(fields[_PARENT])
                seconds[int(entry.name)] = sum(map(int, fields[_CPU_TIMES])) / tick
    found, more = set[int](), {os.getpid()}
    while more := {pid for pid, parent in parents.items() if parent in more} - found:
        found |= more
    return {pid: seconds[pid] for pid in found}
