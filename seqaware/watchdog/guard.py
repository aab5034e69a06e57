"""A process beside the ranks of a host, for a launcher that ends all ranks the moment that one is gone.

MPICH's mpirun sends them SIGKILL within milliseconds: no rank lives long enough to say which of them was the first. The
guard has a session of its own, so that it is not sent the same, and nothing to do but to wait. It ends with the last
rank; mpirun waits until nobody holds its standard error any more.

    python -m seqaware.watchdog.guard FOLDER STARTER
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from seqaware.distributed.launch_environment import LaunchEnvironment
from seqaware.watchdog import failure_messages
from seqaware.watchdog.first_error import report_first
from seqaware.watchdog.host_process import Life, memory_kills
from seqaware.watchdog.launch_directory import LaunchDirectory, host_files
from seqaware.watchdog.peers import Peer, Peers
from seqaware.watchdog.rank_card import RankCard, read_cards

_PERIOD = 1.0
_MODULE = "seqaware.watchdog.guard"


def is_needed(address: LaunchEnvironment) -> bool:
    """Whether the launcher leaves the ranks no time."""
    return address.launcher == "mpirun" and address.size > 1


def start_guard(address: LaunchEnvironment, folder: LaunchDirectory) -> int:
    """Start the guard of this host; one rank of it does. Returns its process's number."""
    return subprocess.Popen(
        [sys.executable, "-m", _MODULE, str(folder.path), str(os.getpid())],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        start_new_session=True,
    ).pid


def guard(folder: LaunchDirectory, *, starter: int) -> None:
    """Watch until all ranks of this host have ended; say which was the first, if it ended without a word.

    Args:
        starter: the number of the rank's process that started this one.
    """
    peers = Peers(folder)
    kills = memory_kills()
    while True:
        peers.wait(0.0)  # a wait that was interrupted may have heard nothing
        heard = peers.gone.copy()
        peers.look_around(0.0)
        here = peers.here()
        if any(peer.missed for peer in here) and (dead := _first_dead(peers, heard)):
            shared = _shared(dead[0].card)
            if not _somebody_left(peers, shared):
                report_first(
                    failure_messages.dead_ranks_message(dead, memory_kills=memory_kills() - kills, shared=shared),
                    folder,
                    shared,
                )
            return
        over = not folder.path.exists() or (here and all(peer.life is Life.GONE for peer in here))
        # They could write nothing, and by now may all be gone.
        if over or (not here and os.getppid() != starter):
            return
        peers.wait(_PERIOD)


def _first_dead(peers: Peers, heard: list[int]) -> list[Peer]:
    """Whom the launcher has ended the others for. Several, where nobody can say which of them was the first.

    Args:
        heard: the ranks whose end was heard of before the look that found somebody missed.
    """
    unheard = any(peer.missed and not peer.awaited for peer in peers.here())
    peers.wait(0.0)
    peers.look_around(0.0)  # some may have ended during the look before
    missed = {peer.card.rank: peer for peer in peers.here() if peer.missed}
    # Who was gone when we met it, in that look, has ended before all that we have heard of since.
    in_order = [rank for rank in (heard if unheard else peers.gone) if rank in missed]
    first = [rank for rank, peer in missed.items() if not peer.awaited or rank in in_order[:1]]
    return [missed[rank] for rank in first or missed]


def _shared(card: RankCard) -> Path | None:
    """The attempt's folder, once a rank's log is there."""
    parent = Path(card.log).parent
    return parent if parent.name.startswith("attempt-") else None


def _somebody_left(peers: Peers, shared: Path | None) -> bool:
    """Whether a rank has ended with an exit code that makes the launcher end the others."""
    cards = [peer.card for peer in peers.all()]
    if shared is not None:
        cards += [card for file in host_files(shared) for card in read_cards(file)]
    return any(card.code for card in cards)


def main() -> None:
    folder, starter = sys.argv[1:]
    guard(LaunchDirectory(Path(folder)), starter=int(starter))


if __name__ == "__main__":
    main()
