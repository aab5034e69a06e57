"""This process among those of the run: which rank it is, whom it tells, and what it hears."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, field

from seqaware.distributed.launch_environment import LaunchEnvironment
from seqaware.masking import escaped_lines
from seqaware.training.preemption import Signals
from seqaware.watchdog.heartbeat import Heartbeat

Say = Callable[[str], None]


@dataclass(frozen=True)
class Process:
    """What a command hands down to the run.

    Attributes:
        say: shows a line to the person (rank 0's goes to the screen).
        signals: those this process has caught. heartbeat: hears what the process turns to.
    """

    address: LaunchEnvironment
    say: Say
    signals: Signals = field(default_factory=Signals)
    heartbeat: Heartbeat = field(default_factory=Heartbeat)

    def tell(self, text: str) -> None:
        """Show a line of this rank's on the screen, whichever rank it is, and keep it in its log."""
        self.heartbeat.note(text)
        print(escaped_lines(text), file=sys.stderr, flush=True)
