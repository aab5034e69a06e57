"""A clock that is wrong: the time of day as a process of Python's reads it, ranks and launchers alike.

Clocks that only count, such as time.monotonic, stay right, and files keep the times that the kernel gives them, as
those of a shared disk do. (libfaketime, which would reach further, breaks time.sleep in today's Python.)
"""

from __future__ import annotations

from pathlib import Path

from tests import launch

# Two hours, which is longer than any limit of a test's run.
AHEAD, BEHIND = 7200, -7200

# Python imports a module of this name when it starts.
_AT_THE_START = """
import os
import time

_OFF = int(os.environ.get("SECONDS_OFF", "0"))
_seconds, _nanoseconds = time.time, time.time_ns
time.time = lambda: _seconds() + _OFF
time.time_ns = lambda: _nanoseconds() + _OFF * 1_000_000_000
"""


def wrong_clock(folder: Path, *, off: int) -> dict[str, str]:
    """Variables for processes whose clock is so many seconds off. folder: for a file that they read."""
    folder.mkdir(exist_ok=True)
    (folder / "sitecustomize.py").write_text(_AT_THE_START)
    return {"SECONDS_OFF": str(off), "PYTHONPATH": f"{folder}:{launch.ROOT}"}
