"""A process of this host: not taken for a later one with its number; whether it lives, how it ended. Linux only."""

from __future__ import annotations

import os
import signal
import socket
from contextlib import suppress
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

# Places in /proc/<pid>/stat, counted behind the command's name: see proc_pid_stat(5).
_STATE, _PARENT, _GROUP, _STARTED, _EXIT_STATUS = 0, 1, 2, 19, 49


class Life(Enum):
    """What a process does."""

    RUNNING = "running"
    STOPPED = "stopped"
    GONE = "gone"


@dataclass(frozen=True)
class HostProcess:
    """A process of this host.

    Attributes:
        started: clock ticks between the host's start and its own; with it no later process is taken for this one.
    """

    pid: int
    started: int

    @classmethod
    def of(cls, pid: int) -> HostProcess:
        """The process that has this number now; one that is gone has started at 0."""
        fields = _stat(pid)
        return cls(pid, int(fields[_STARTED]) if fields else 0)

    @classmethod
    def of_myself(cls) -> HostProcess:
        return cls.of(os.getpid())

    def life(self) -> Life:
        fields = self._fields()
        if fields is None or fields[_STATE] in "ZX":
            return Life.GONE
        return Life.STOPPED if fields[_STATE] in "Tt" else Life.RUNNING

    def exit_status(self) -> int | None:
        """The status as its parent will get it (`os.waitpid`); None when the parent has fetched it already."""
        fields = self._fields()
        if fields is None or fields[_STATE] != "Z":
            return None
        return int(fields[_EXIT_STATUS])

    def kill(self) -> None:
        """End it at once, if it still is this process."""
        if self.life() is not Life.GONE:
            with suppress(ProcessLookupError, PermissionError):
                os.kill(self.pid, signal.SIGKILL)

    def _fields(self) -> list[str] | None:
        fields = _stat(self.pid)
        return fields if fields and int(fields[_STARTED]) == self.started else None


def _stat(pid: int) -> list[str] | None:
    try:
        text = Path("/proc", str(pid), "stat").read_text(encoding="ascii", errors="replace")
    except OSError:
        return None
    # The command's name stands in brackets and may hold blanks and brackets itself.
    return text[text.rindex(")") + 2 :].split()


def children() -> list[HostProcess]:
    """The processes that this one has started and that still run."""
    me, found = str(os.getpid()), []
    for entry in Path("/proc").iterdir():
        fields = _stat(int(entry.name)) if entry.name.isdigit() else None
        if fields and fields[_PARENT] == me:
            found.append(HostProcess(int(entry.name), int(fields[_STARTED])))
    return found


def above_own_group() -> HostProcess:
    """The nearest process above this one that is not of its process group."""
    pid, group = os.getppid(), str(os.getpgid(0))
    while (fields := _stat(pid)) and fields[_GROUP] == group:
        pid = int(fields[_PARENT])
    return HostProcess.of(pid)


def ending(status: int | None) -> str:
    """How a process ended, for a person: `was killed by SIGKILL`, `ended with exit code 3`, `is gone`."""
    if status is None:
        return "is gone"
    number = status & 0x7F
    if not number:
        return f"ended with exit code {status >> 8}"
    try:
        return f"was killed by {signal.Signals(number).name}"
    except ValueError:
        return f"was killed by signal {number}"


def host_name() -> str:
    return socket.gethostname()


def memory_kills() -> int:
    """Processes that the out-of-memory killer has ended since this host started; 0 where the kernel does not say."""
    with suppress(OSError, ValueError):
        for line in Path("/proc/vmstat").read_text(encoding="ascii").splitlines():
            if line.startswith("oom_kill "):
                return int(line.split()[1])
    return 0
