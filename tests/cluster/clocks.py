"""A clock that is wrong: what to put into a process's environment so that all of it reads another time of day.

By Debian's libfaketime, preloaded. Clocks that only count, such as time.monotonic, stay right, and files keep the times
that the kernel gives them, as those of a shared disk do.
"""

from __future__ import annotations

from pathlib import Path

# Two hours, which is longer than any limit of a test's run.
AHEAD, BEHIND = "+7200", "-7200"


def wrong_clock(offset: str) -> dict[str, str]:
    """Variables for a process whose clock is off; if it is killed, a few bytes of it stay in its /dev/shm.

    Args:
        offset: seconds, with a sign.
    """
    return {
        "LD_PRELOAD": str(next(Path("/usr/lib").glob("*/faketime/libfaketimeMT.so.1"))),
        "FAKETIME": offset,
        "FAKETIME_DONT_FAKE_MONOTONIC": "1",
    }
