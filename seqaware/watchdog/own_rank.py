"""What this process writes of itself: its dial, its card, its log."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from threading import Lock
from typing import Any

from seqaware.distributed.launch_environment import LaunchEnvironment
from seqaware.watchdog.first_error import LONGEST_WORD, report_first
from seqaware.watchdog.host_process import HostProcess, host_name
from seqaware.watchdog.launch_directory import TOLD, LaunchDirectory, host_file
from seqaware.watchdog.rank_card import RankCard, write_cards
from seqaware.watchdog.rank_log import RankLog
from seqaware.watchdog.shared_status import SharedStatus, read_position

_SHARE_SECONDS = 5.0
_TOLD_SECONDS = 1.0
# What all hosts together may ask of a shared file system for the watchdog: writes a second, and as many stats.
_REQUESTS_A_SECOND = 50


class OwnRank:
    """This rank, as the others see it.

    Args:
        host: the name of this host, if it is not to be asked.

    Attributes:
        shared: the attempt's folder, which ranks on other hosts see too; None before the run's folder is claimed.
        host_file: the file in it that shows this host's ranks.
        hang_seconds: how long a rank may stand still; None: for ever.
        guarded: whether a process beside the ranks tells of those that die: see guard.py. guard: the number of that
            process, where this rank has started it.
        failing: whether the main thread is about to end with an exception: it does not hang.
    """

    def __init__(self, address: LaunchEnvironment, folder: LaunchDirectory, *, host: str | None = None) -> None:
        self.address = address
        self.folder = folder
        self.dial = SharedStatus(folder.dial(address.rank))
        self.log = RankLog(folder.log(address.rank))
        self.shared: Path | None = None
        self.host_file: Path | None = None
        self.hang_seconds: float | None = None
        self.guarded = False
        self.guard: int | None = None
        self.failing = False
        self._lock = Lock()
        self._speaking = Lock()
        self.card = RankCard(
            rank=address.rank,
            size=address.size,
            host=host or host_name(),
            process=HostProcess.of_myself(),
            log=str(self.log.path),
            place=self.dial.place(),
        )
        self.update()

    @property
    def share_seconds(self) -> float:
        """How often this host's ranks are shown to other hosts: less often where a file system serves many hosts."""
        usual = max(_SHARE_SECONDS, self.address.nodes / _REQUESTS_A_SECOND)
        return usual if self.hang_seconds is None else min(usual, self.hang_seconds / 6)

    @property
    def told_seconds(self) -> float:
        """How often one rank of this host asks whether the launch has ended on another host."""
        return max(_TOLD_SECONDS, self.address.nodes / _REQUESTS_A_SECOND)

    def update(self, **changes: Any) -> RankCard:
        """Change the card, and write it for the ranks of this host."""
        with self._lock:
            self.card = replace(self.card, place=self.dial.place(), **changes)
            self._write(self.folder.card(self.address.rank))
            return self.card

    def share(self) -> None:
        """Write the cards of this host's ranks, all in one file, for the ranks of other hosts."""
        if self.host_file is None:
            return
        own = self.update()
        cards = {card.rank: card for card in self.folder.cards()} | {own.rank: own}
        places = {rank: read_position(self.folder.dial(rank)) or card.place for rank, card in cards.items()}
        try:
            write_cards(self.host_file, [replace(cards[rank], place=places[rank]) for rank in sorted(cards)])
        except OSError as problem:
            self.log.note(f"the cards of this host could not be written: {problem}")

    def _write(self, path: Path) -> None:
        try:
            self.card.write(path)
        except OSError as problem:
            # A full disk is no reason to end: the other ranks then do not see this one.
            self.log.note(f"the card could not be written: {problem}")

    def settle(self, shared: Path) -> None:
        """Go on in the attempt's folder."""
        self.log.move(shared / f"rank-{self.address.rank:04d}.log")
        self.update(log=str(self.log.path))
        # All ranks of this host are connected by now, so each of them finds the same lowest one.
        lowest = min([self.address.rank, *(card.rank for card in self.folder.cards())])
        self.host_file = host_file(shared, lowest)
        self.shared = shared

    def told(self) -> bool:
        """Whether the end of this launch is reported, as far as this host knows. Touches no shared file system."""
        return self.folder.told()

    def fetch_told(self) -> None:
        """Let this host's ranks know where a rank of another host has reported the end of the launch."""
        if self.shared is not None and not self.folder.told() and (self.shared / TOLD).exists():
            self.folder.claim("reported on another host")

    def tell(self, text: str) -> None:
        """Show how the launch ends, unless a rank of it has: only the first word is shown."""
        with self._speaking:
            first = report_first(text, self.folder, self.shared)
            self.log.note(text if first else f"not shown, as another rank has told how the launch ended:\n{text}")

    def finish_speaking(self) -> None:
        """Before the process ends: another thread of it may have taken the word, and not yet have shown it."""
        self._speaking.acquire(timeout=LONGEST_WORD)
