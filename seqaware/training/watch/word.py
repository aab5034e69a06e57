"""The first word about the end of a launch: shown once, whoever has it."""

from __future__ import annotations

import os
import time
from pathlib import Path

from seqaware.training.watch.launch_folder import LaunchFolder, claim

LONGEST_WORD = 5.0
"""Seconds that showing a text may take."""


def tell_first(text: str, folder: LaunchFolder, shared: Path | None) -> bool:
    """Show how the launch ends, unless that is told already; whether it was shown.

    Args:
        shared: the attempt's folder, where ranks on other hosts would have told it.
    """
    first = folder.claim(text) and (shared is None or claim(shared, text))
    if first:
        show(text)
    return first


def show(text: str) -> None:
    """Put text on standard error in one piece, whatever else this process is writing."""
    content = f"\n{text}\n".encode(errors="replace")
    until = time.monotonic() + LONGEST_WORD
    while content and time.monotonic() < until:
        try:
            content = content[os.write(2, content) :]
        except BlockingIOError:
            time.sleep(0.01)  # somebody before us has made it a descriptor that does not wait for its reader
        except OSError:
            return  # nobody is there to read it; it is in the log
