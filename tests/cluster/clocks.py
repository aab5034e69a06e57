"""A clock that is wrong: what to put into a process's environment so that all of it reads another time of day.

By Debian's libfaketime, preloaded. Clocks that only count, such as time.monotonic, stay right, and files keep the times
that the kernel gives them, as those of a shared disk do.
"""

from __future__ import annotations

from pathlib import Path

# Two hours, which is longer than any limit of a test's run.
AHEAD, BEHIND = "+7200", "-7200"


def is_missing() -> str | None:
    """Why no clock can be wrong on this machine; None where one can."""
    return None if _libraries() else "not installed: libfaketime (Debian: faketime)"


def wrong_clock(offset: str) -> dict[str, str]:
    """Variables for a process whose clock is off; if it is killed, a few bytes of it stay in its /dev/shm.

    Args:
        offset: seconds, with a sign.
    """
    return {
        "LD_PRELOAD": str(_libraries()[0]),
        "FAKETIME": offset,
        "FAKETIME_DONT_FAKE_MONOTONIC": "1",
    }


def _libraries() -> list[Path]:
    return sorted(Path("/usr/lib").glob("*/faketime/libfaketimeMT.so.1"))
