"""Limits that end what hangs, in proportion to how slow this machine is: no test outcome depends on the wall clock."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

# Of a launch, or of one of several runs that share one, on an idle machine. There they take half a minute at most.
LAUNCH_SECONDS = 300.0
# The work of `slowness`, and its time on one idle core of a common server (3 GHz).
_WORK = "sum(range(10_000_000))"
_IDLE_SECONDS = 0.25


def slowness() -> float:
    """How many times longer than an idle machine this one takes now for a fixed piece of work; at least 1."""
    begun = time.monotonic()
    subprocess.run([sys.executable, "-S", "-c", _WORK], check=True)
    return max(1.0, (time.monotonic() - begun) / _IDLE_SECONDS)


@cache
def usual_slowness() -> float:
    """`slowness` at its first use in this process, doubled: other tests may start beside this one."""
    return 2 * slowness()


class Patience:
    """A limit on a wait. The speed of the machine is measured again before the limit counts as reached.

    Args:
        seconds: on an idle machine; far more than what is waited for takes there.
    """

    def __init__(self, seconds: float = LAUNCH_SECONDS) -> None:
        self._seconds = seconds
        self._factor = 1.0
        self.renew()

    def renew(self) -> None:
        """Restart the wait, because something has moved."""
        self._begun = time.monotonic()

    def is_over(self) -> bool:
        waited = time.monotonic() - self._begun
        if waited > self._seconds * self._factor:
            self._factor = max(self._factor, slowness(), usual_slowness())
        return waited > self._seconds * self._factor


def wait_for(
    what: str,
    ready: Callable[[], bool],
    *,
    seconds: float = LAUNCH_SECONDS,
    every: float = 0.05,
    problem: Callable[[], str | None] = lambda: None,
) -> None:
    """Wait until `ready`.

    Args:
        seconds: see `Patience`. every: seconds between two checks.
        problem: says why it will not come any more, as when a process has ended.
    """
    patience = Patience(seconds)
    while not ready():
        why = problem()
        assert why is None, f"{what} does not come: {why}"
        assert not patience.is_over(), f"{what} has not come in {seconds:g} s of an idle machine"
        time.sleep(every)


def communicate(process: subprocess.Popen[str], seconds: float = LAUNCH_SECONDS) -> tuple[str, str]:
    """`Popen.communicate`; a process that hangs is killed, and fails the test with its output."""
    patience = Patience(seconds)
    while True:
        try:
            return process.communicate(timeout=5.0)
        except subprocess.TimeoutExpired:
            if patience.is_over():
                process.kill()
                output = ""
                with suppress(subprocess.TimeoutExpired):  # those that it has started may hold its outputs open
                    output = "\n".join(text or "" for text in process.communicate(timeout=10.0))
                raise AssertionError(f"{process.args!r} hangs: {output[-6000:]}") from None


def wait(process: subprocess.Popen[Any], seconds: float = LAUNCH_SECONDS) -> int:
    """`Popen.wait`, as `communicate`."""
    wait_for(f"the end of {process.args!r}", lambda: process.poll() is not None, seconds=seconds, every=0.01)
    assert process.returncode is not None
    return process.returncode


def run(
    command: Sequence[str], *, cwd: Path, env: Mapping[str, str], seconds: float = LAUNCH_SECONDS
) -> subprocess.CompletedProcess[str]:
    """`subprocess.run` with text of both outputs, as `communicate`."""
    with subprocess.Popen(
        command, cwd=cwd, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        stdout, stderr = communicate(process, seconds)
    return subprocess.CompletedProcess(command, process.returncode, stdout, stderr)
