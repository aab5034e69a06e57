"""What this rank knows of the others: of its host's ranks everything, of the rest what each host's file shows.

Time here is this process's own running time. A host that was suspended, or a job that the batch system stopped for a
while, has not stood still for longer than the others.
"""

from __future__ import annotations

import os
import select
import time
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

from seqaware.watchdog.host_process import Life
from seqaware.watchdog.launch_directory import LaunchDirectory, host_files
from seqaware.watchdog.own_rank import OwnRank
from seqaware.watchdog.rank_card import RankCard, read_card, read_cards
from seqaware.watchdog.shared_status import RankPosition, read_position

MUTE_SECONDS = 5.0
"""A monitor that has not moved for so long does not answer."""


class Stillness:
    """For how long a counter has not changed.

    Attributes:
        seconds: since it was last seen to change.
    """

    def __init__(self) -> None:
        self._value: int | None = None
        self.seconds = 0.0

    def see(self, value: int, elapsed: float) -> float:
        self.seconds = self.seconds + elapsed if value == self._value else 0.0
        self._value = value
        return self.seconds


@dataclass
class Peer:
    """Another rank.

    Attributes:
        host_file: which shows it, for a rank of another host; None: it runs on this host.
        life: of its process; ranks of other hosts are taken to run.
        exit_status: as its parent gets it, if it was seen in time.
        awaited: whether the kernel tells when it ends; not of one that was gone when we met it.
        idle, silent: how long neither its main thread nor its monitor has moved.
    """

    card: RankCard
    place: RankPosition
    host_file: Path | None = None
    life: Life = Life.RUNNING
    exit_status: int | None = None
    awaited: bool = False
    idle: Stillness = field(default_factory=Stillness)
    silent: Stillness = field(default_factory=Stillness)

    @property
    def here(self) -> bool:
        return self.host_file is None

    @property
    def missed(self) -> bool:
        """Gone without a word."""
        return self.life is Life.GONE and self.card.status == "running"


class Peers:
    """All ranks of a launch that have shown themselves, as seen from this host.

    Args:
        but: the rank that looks, which is not its own peer.

    Attributes:
        gone: ranks of this host whose end a wait has seen, in the order in which they ended, however late it looked.
    """

    def __init__(self, folder: LaunchDirectory, *, but: int | None = None) -> None:
        self._folder = folder
        self._but = but
        self.gone: list[int] = []
        self._watched: dict[int, int] = {}
        self._known: dict[int, Peer] = {}
        # It gives what has happened in the order in which it happened; `select.poll` gives it by descriptor.
        self._poll = select.epoll()
        self._wake_read, self._wake_write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._poll.register(self._wake_read, select.EPOLLIN)

    def all(self) -> list[Peer]:
        return [self._known[rank] for rank in sorted(self._known)]

    def here(self) -> list[Peer]:
        """Those on this host, by rank."""
        return [peer for peer in self.all() if peer.here]

    def wait(self, seconds: float) -> bool:
        """Wait, at most until a process of this host ends or `wake` is called; whether that was so."""
        events = self._poll.poll(seconds)
        for descriptor, _ in events:
            if descriptor == self._wake_read:
                with suppress(BlockingIOError):
                    os.read(descriptor, 64)
            else:
                # It stays readable for good: once is enough.
                self._poll.unregister(descriptor)
                os.close(descriptor)
        self.gone += [self._watched.pop(descriptor) for descriptor, _ in events if descriptor in self._watched]
        return bool(events)

    def wake(self) -> None:
        with suppress(BlockingIOError):
            os.write(self._wake_write, b".")

    def look_around(self, elapsed: float) -> None:
        """See how the ranks of this host are.

        Args:
            elapsed: seconds since the last look.
        """
        known = {peer.card.rank: peer.card for peer in self.here()}
        for card in (known | {card.rank: card for card in self._folder.cards()}).values():
            if card.rank == self._but:
                continue
            peer = self._meet(card)
            place = read_position(self._folder.dial(card.rank)) or card.place
            self._see(peer, card, place=place, elapsed=elapsed)
            if peer.life is not Life.GONE:
                self._look_at_process(peer)

    def look_afar(self, elapsed: float, *, shared: Path, own: Path | None) -> None:
        """See what the ranks of other hosts show; reads a file for each host.

        Args:
            shared: the attempt's folder. own: the file in it that this host writes.
        """
        for file in host_files(shared):
            if file != own:
                for card in read_cards(file):
                    self._see(self._meet(card, host_file=file), card, place=card.place, elapsed=elapsed)

    def leads(self, rank: int) -> bool:
        """Whether `rank` is the lowest of this host that runs and answers: the one that works for its host."""
        lower = (peer for peer in self.here() if peer.card.rank < rank and peer.card.status == "running")
        return not any(peer.life is Life.RUNNING and peer.silent.seconds < MUTE_SECONDS for peer in lower)

    def _meet(self, card: RankCard, *, host_file: Path | None = None) -> Peer:
        peer = self._known.get(card.rank)
        if peer is None or peer.card.process != card.process:
            peer = self._known[card.rank] = Peer(card, card.place, host_file)
            if peer.here:
                self._await(peer)
        return peer

    def _await(self, peer: Peer) -> None:
        # Where the kernel has no such descriptors, or this Python was built without them, its end is seen at a look.
        with suppress(OSError, AttributeError):
            descriptor = os.pidfd_open(peer.card.process.pid)
            if peer.card.process.life() is Life.GONE:
                os.close(descriptor)
                return
            self._poll.register(descriptor, select.EPOLLIN)
            self._watched[descriptor] = peer.card.rank
            peer.awaited = True

    def _see(self, peer: Peer, card: RankCard, *, place: RankPosition, elapsed: float) -> None:
        peer.card, peer.place = card, place
        peer.idle.see(place.moves, elapsed)
        peer.silent.see(place.beats, elapsed)

    def _look_at_process(self, peer: Peer) -> None:
        peer.life = peer.card.process.life()
        if peer.life is Life.GONE:
            peer.exit_status = peer.card.process.exit_status()
            # Its last words may have come after we had read its card.
            latest = read_card(self._folder.card(peer.card.rank))
            # The last one that ends as it should takes the folder with it.
            peer.card = latest or replace(peer.card, status="ended")
            peer.place = read_position(self._folder.dial(peer.card.rank)) or peer.place


def missed_now(own: OwnRank) -> list[RankCard]:
    """The ranks of this host that have failed or are gone without a word, found out without the monitor."""
    found = []
    for card in own.folder.cards():
        if card.rank == own.address.rank or card.status == "ended":
            continue
        gone = card.status == "running" and card.process.life() is Life.GONE
        latest = read_card(own.folder.card(card.rank)) if gone else card
        if latest is not None and (latest.status == "failed" or (gone and latest.status == "running")):
            found.append(latest)
    return found


def silent_afar(own: OwnRank, seconds: float) -> list[Peer]:
    """The ranks of other hosts that show nothing new for so long; waits as long."""
    peers = Peers(own.folder, but=own.address.rank)
    if own.shared is not None:
        peers.look_afar(0.0, shared=own.shared, own=own.host_file)
        time.sleep(seconds)
        peers.look_afar(seconds, shared=own.shared, own=own.host_file)
    return [peer for peer in peers.all() if not peer.here and peer.silent.seconds > 0.0]
