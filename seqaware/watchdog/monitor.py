"""The thread that watches: it beats for its own rank, looks after the others, and ends the launch when one is lost.

Whoever finds out first has the word (`OwnRank.tell`): it is told once in a launch how it ended. The lowest
rank that can speak goes first, the others a little later in case it cannot.

Across hosts, one rank of each host does the work: the lowest that answers shows its host's ranks in one file of the
attempt's folder, reads those of the other hosts when nothing moves, and judges. The others read files of their own
host alone, so that what a shared file system has to serve grows with the hosts.
"""

from __future__ import annotations

import os
import threading
import time
from contextlib import suppress
from typing import NoReturn

from seqaware.metrics.progress import duration
from seqaware.watchdog import failure_messages
from seqaware.watchdog.hang_report import RankStanding, awaited, inspect_main_thread
from seqaware.watchdog.host_process import Life, children, memory_kills
from seqaware.watchdog.own_rank import OwnRank
from seqaware.watchdog.peers import MUTE_SECONDS, Peer, Peers, Stillness
from seqaware.watchdog.rank_card import code_of
from seqaware.watchdog.shared_status import NO_STEP, RankPosition

FAILURE = 1
_PERIOD = 1.0
_LOOKS_A_SECOND = 16
_BETWEEN_KEEPS = 3600.0
# For the rank before this one to speak first; and for a main thread to end by itself once the launch is over.
_TURN = 0.7
_MOST_TURNS = 20
_GRACE = 2.0
_GUARDS_TURN = 3.0
# A rank that has failed is about to tell so itself.
_PATIENCE_WITH_FAILED = 8.0
# A look reads small files; a file system may be slow.
_LONGEST_LOOK = 5.0
_SHOW_CURSOR = b"\x1b[?25h"


class Monitor(threading.Thread):
    """Watches from `start` to `stop`; may end the process."""

    def __init__(self, own: OwnRank) -> None:
        super().__init__(name="watch", daemon=True)
        self._own = own
        self._peers = Peers(own.folder, but=own.address.rank)
        self._stopping = threading.Event()
        self._idle = Stillness()
        self._over = Stillness()
        self._failed_for = 0.0
        self._since_share = 0.0
        self._since_fetch = 0.0
        self._since_look = 0.0
        self._since_kept = 0.0
        self._memory_kills = memory_kills()

    def stop(self) -> None:
        """Watch no more: this rank ends by itself. Returns when the thread has seen it."""
        self._stopping.set()
        self._peers.wake()
        if self.is_alive():
            self.join(_LONGEST_LOOK)

    def leads(self) -> bool:
        """Whether this rank is the one that works for its host: see above."""
        return self._peers.leads(self._own.address.rank)

    def run(self) -> None:
        before = time.monotonic()
        while not self._stopping.is_set():
            woken = self._peers.wait(_PERIOD)
            now = time.monotonic()
            # Time in which this very process was stopped says nothing of the others.
            elapsed = min(now - before, 2 * _PERIOD)
            before = now
            try:
                if not self._stopping.is_set():
                    self._look(elapsed, woken=woken)
            except OSError as problem:
                # A full disk, say: not to be seen by the others is no reason to end.
                self._own.log.note(f"the watch could not do its work: {problem}")

    def _look(self, elapsed: float, *, woken: bool) -> None:
        self._own.dial.beat()
        self._since_look += elapsed
        # Each looks at each: less often where they are many. The end of a process wakes us in any case.
        if woken or self._since_look >= len(self._peers.here()) / _LOOKS_A_SECOND:
            self._peers.look_around(self._since_look)
            self._since_look = 0.0
        self._share(elapsed)
        self._since_kept += elapsed
        if self._since_kept >= _BETWEEN_KEEPS:
            self._own.folder.keep(self._own.address.rank)
            self._since_kept = 0.0
        if self._own.told():
            self._follow(elapsed)
        elif dead := [peer for peer in self._peers.here() if peer.missed]:
            self._tell_of_the_dead(dead)
        elif failed := [peer for peer in self._peers.all() if peer.card.status == "failed"]:
            self._wait_for_failed(failed, elapsed)
        else:
            self._look_for_hang(elapsed)

    def _share(self, elapsed: float) -> None:
        """Show this host's ranks to the other hosts, and look at theirs, every few seconds; one rank of a host does."""
        own, hang = self._own, self._own.hang_seconds
        self._since_share += elapsed
        self._since_fetch += elapsed
        if own.address.nodes == 1 or own.shared is None or not self.leads():
            return
        if self._since_fetch >= own.told_seconds:
            own.fetch_told()
            self._since_fetch = 0.0
        if self._since_share < own.share_seconds:
            return
        own.share()
        if hang is not None and self._idle.seconds >= hang / 4:
            self._peers.look_afar(self._since_share, shared=own.shared, own=own.host_file)
        self._since_share = 0.0

    def _follow(self, elapsed: float) -> None:
        """Another rank has told how the launch ended: end too, a little later if the main thread does not."""
        if self._over.see(0, elapsed) >= _GRACE:
            self._leave(self._code())

    def _code(self) -> int:
        return code_of([self._own.card, *(peer.card for peer in self._peers.all())]) or FAILURE

    def _tell_of_the_dead(self, dead: list[Peer]) -> None:
        own = self._own
        able = [peer.card.rank for peer in self._peers.here() if peer.life is Life.RUNNING]
        before = [rank for rank in able if rank < own.address.rank]
        if not self._await_turn(len(before), extra=_GUARDS_TURN if own.guarded else 0.0):
            kills = memory_kills() - self._memory_kills
            text = failure_messages.dead_ranks_message(dead, memory_kills=kills, shared=own.shared)
            own.tell(text)
        self._leave(self._code())

    def _await_turn(self, before: int, extra: float = 0.0) -> bool:
        """Give so many ranks before this one the time to speak, and `extra` seconds; True once one has."""
        until = time.monotonic() + _TURN * min(before, _MOST_TURNS) + extra
        while time.monotonic() < until:
            if self._own.told():
                return True
            time.sleep(0.02)
        return self._own.told()

    def _wait_for_failed(self, failed: list[Peer], elapsed: float) -> None:
        """A rank has failed by its own error. It tells so; the main thread here may yet meet the same error."""
        self._failed_for += elapsed
        gone = all(peer.life is Life.GONE for peer in failed)
        if self._failed_for < (_GRACE if gone else _PATIENCE_WITH_FAILED):
            return
        card = failed[0].card
        text = f"{card.name()} failed {card.place.words()}: {card.message}\nits log: {card.log}"
        self._own.tell(text)
        self._leave(self._code())

    def _look_for_hang(self, elapsed: float) -> None:
        own, hang = self._own, self._own.hang_seconds
        idle = self._idle.see(own.dial.place().moves, elapsed)
        if hang is None or idle < hang or own.failing:
            if own.card.stuck is not None:
                own.log.note("moves again")
                own.update(stuck=None)
            return
        stuck = inspect_main_thread(idle)
        if own.card.stuck is None:
            own.log.note(f"stands still since {duration(idle)}:\n" + "\n".join(stuck.stack))
        if own.card.stuck is None or own.card.stuck.stack != stuck.stack:
            own.update(stuck=stuck)
        # Ranks of several hosts cannot see each other before the run's folder is claimed.
        if own.address.nodes == 1 or (own.shared is not None and self.leads()):
            self._judge(hang)

    def _judge(self, hang: float) -> None:
        own = self._own
        standings = self._standings()
        culprits = awaited(standings, hang_seconds=hang)
        if culprits is None:
            return
        able = {each.rank for each in standings if each.answers(hang) and each.rank < own.address.rank}
        # Of each other host one rank may speak.
        speakers = {peer.host_file or peer.card.rank for peer in self._peers.all() if peer.card.rank in able}
        if not self._await_turn(len(speakers)):
            text = failure_messages.hanging_ranks_message(culprits, standings, hang_seconds=hang, shared=own.shared)
            own.tell(text)
        self._leave(FAILURE)

    def _standings(self) -> list[RankStanding]:
        own = self._own
        found = [RankStanding(own.address.rank, own.card, own.dial.place(), self._idle.seconds, silent=0.0)]
        for peer in self._peers.all():
            stopped = peer.life is Life.STOPPED
            found.append(
                RankStanding(peer.card.rank, peer.card, peer.place, peer.idle.seconds, peer.silent.seconds, stopped)
            )
        missing = set(range(own.address.size)) - {each.rank for each in found}
        nowhere = RankPosition(0, 0, NO_STEP, 0, "")
        found += [RankStanding(rank, None, nowhere, self._idle.seconds, self._idle.seconds) for rank in missing]
        return sorted(found, key=lambda each: each.rank)

    def _leave(self, code: int) -> NoReturn:
        """End this process whatever its main thread does, and with it what would stay behind."""
        self._own.log.note(f"leaves with exit code {code}, as the launch is over")
        self._own.update(status="ended", code=code)
        for peer in self._peers.here():
            # One that cannot end by itself: its launcher would wait for it.
            if peer.card.status == "running" and (peer.life is Life.STOPPED or peer.silent.seconds > MUTE_SECONDS):
                peer.card.process.kill()
        for child in children():
            # The guard may be about to tell how the launch ended. It ends by itself.
            if child.pid != self._own.guard:
                child.kill()
        self._own.finish_speaking()
        with suppress(OSError):
            if os.isatty(1):
                os.write(1, _SHOW_CURSOR)
        os._exit(code)
