"""The first word about the end of a launch: shown once, whoever has it."""

from __future__ import annotations

import os
import time
from contextlib import suppress
from pathlib import Path

from seqaware.masking import escaped
from seqaware.watchdog.launch_directory import LaunchDirectory, claim

LONGEST_WORD = 5.0
"""Seconds that showing a text may take."""


_STANDARD_ERROR = 2
_LAYOUT = "\n\t"  # of tracebacks and stacks
_screen = _STANDARD_ERROR


def keep_screen() -> None:
    """Keep standard error as it is now, for `show`.

    While DeepSpeed tries whether an operator compiles, it lays a temporary file under descriptor 2 of this process: a
    word of another thread would go there, and be deleted with it.
    """
    global _screen
    if _screen == _STANDARD_ERROR:
        with suppress(OSError):  # a process that was started without one
            _screen = os.dup(_STANDARD_ERROR)


def report_first(text: str, folder: LaunchDirectory, shared: Path | None) -> bool:
    """Show how the launch ends, unless that is told already; whether it was shown.

    Args:
        shared: the attempt's folder, where ranks on other hosts would have told it.
    """
    first = folder.claim(text) and (shared is None or claim(shared, text))
    if first:
        show(text)
    return first


def show(text: str) -> None:
    """Put text on standard error in one piece, whatever else this process is writing, or has made of it since."""
    content = f"\n{escaped(text, keep=_LAYOUT)}\n".encode(errors="replace")
    until = time.monotonic() + LONGEST_WORD
    while content and time.monotonic() < until:
        try:
            content = content[os.write(_screen, content) :]
        except BlockingIOError:
            time.sleep(0.01)  # somebody before us has made it a descriptor that does not wait for its reader
        except OSError:
            return  # nobody is there to read it; it is in the log
