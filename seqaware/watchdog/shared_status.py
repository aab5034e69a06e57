"""Where a rank is, in memory that it shares with its siblings: exact at the moment that it is killed.

The memory is a file of one page in the folder of the launch. Its rank writes to it without a system call; the others
map it and read. What was written stays when the writer is killed by any signal.
"""

from __future__ import annotations

import mmap
import struct
from pathlib import Path
from typing import NamedTuple

_BEATS = struct.Struct("<Q")
_PLACE = struct.Struct("<QqQ48s")
_SIZE = _BEATS.size + _PLACE.size
NO_STEP = -1


class RankPosition(NamedTuple):
    """Where a rank is.

    Attributes:
        beats: what its monitor has counted, one a second. moves: what its main thread has: phases and pulses.
        step: the optimizer step, or NO_STEP before the first. turn: phases since that step began.
        phase: `forward`, `saving`, …; empty before the first.
    """

    beats: int
    moves: int
    step: int
    turn: int
    phase: str

    def words(self) -> str:
        """`at step 17, in forward`; `in tokenising` before the first step."""
        phase = self.phase or "starting"
        return f"in {phase}" if self.step == NO_STEP else f"at step {self.step}, in {phase}"


class SharedStatus:
    """This rank's own place, for others to read. The main thread moves it, the monitor beats it."""

    def __init__(self, path: Path) -> None:
        # Written, not only made longer: a page without its block on a full disk would end us with SIGBUS later.
        path.write_bytes(bytes(_SIZE))
        with path.open("r+b") as file:
            self._memory = mmap.mmap(file.fileno(), _SIZE)
        self._beats = 0
        self._moves = 0
        self._step = NO_STEP
        self._turn = 0
        self._phase = b""
        self._write()

    def turn_to(self, phase: str, step: int | None) -> None:
        """Another phase begins; a step that is not told stays as it was."""
        if step is not None and step != self._step:
            self._step = step
            self._turn = 0
        self._turn += 1
        self._moves += 1
        self._phase = phase.encode()
        self._write()

    def move(self) -> None:
        """Progress inside the phase."""
        self._moves += 1
        self._write()

    def _write(self) -> None:
        _PLACE.pack_into(self._memory, _BEATS.size, self._moves, self._step, self._turn, self._phase)

    def beat(self) -> None:
        self._beats += 1
        _BEATS.pack_into(self._memory, 0, self._beats)

    def place(self) -> RankPosition:
        return RankPosition(self._beats, self._moves, self._step, self._turn, self._phase.decode())


def read_position(path: Path) -> RankPosition | None:
    """The place that another rank of this host has written; None where there is none yet."""
    try:
        content = path.read_bytes()
    except OSError:
        return None
    if len(content) < _SIZE:
        return None
    (beats,) = _BEATS.unpack_from(content)
    moves, step, turn, phase = _PLACE.unpack_from(content, _BEATS.size)
    return RankPosition(beats, moves, step, turn, phase.rstrip(b"\0").decode(errors="replace"))
