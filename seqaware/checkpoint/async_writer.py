"""Writing a checkpoint while training goes on: a thread of each rank writes, and rank 0's completes.

Ranks that train do not wait for each other here, so they vote by small files in the folder that becomes the checkpoint.
Rank 0's thread reads them; when all are there it completes the checkpoint, or gives it up at the first veto. Whenever
the process ends before that, the checkpoint before is the newest.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from seqaware.checkpoint.manifest import write_durably
from seqaware.checkpoint.writer import Share, Vote, vote_path

_LOOK_SECONDS = 0.1
# All ranks have said that they voted: only a folder that the hosts do not share can hide a vote for longer.
_VISIBLE_SECONDS = 180.0

Judge = Callable[[Sequence[Vote]], None]


class BackgroundWrite:
    """One checkpoint on its way to the disk, seen from one rank.

    Args:
        partial: the folder that becomes the checkpoint. share: what this rank writes. ranks: how many vote.
        judge: on rank 0, completes the checkpoint or notes why not; None elsewhere.
    """

    def __init__(self, partial: Path, share: Share, *, ranks: int, judge: Judge | None) -> None:
        self._partial = partial
        self._share = share
        self._ranks = ranks
        self._judge = judge
        self._vote: Vote | None = None
        self._voted = threading.Event()
        self._veto: str | None = None
        self._all_voted_at: float | None = None
        # The interpreter does not wait for it: a process that must end does not wait for its disk.
        self._thread = threading.Thread(target=self._work, name="checkpoint", daemon=True)
        self._thread.start()

    def problem(self) -> str | None:
        """Wait until this rank has voted; why it vetoes, or None."""
        self._voted.wait()
        return "the thread that writes has failed" if self._vote is None else self._vote.problem

    def settle(self, *, veto: str | None) -> None:
        """Wait for the thread, once all ranks have said that they voted, and whether one vetoes."""
        self._veto = veto
        self._all_voted_at = time.monotonic()
        self._thread.join()

    def join(self, seconds: float) -> None:
        """Wait at most so long for the thread. A process that ends beside one that writes may crash on its way out."""
        self._thread.join(seconds)

    def _work(self) -> None:
        try:
            vote = self._vote = self._cast()
        finally:
            self._voted.set()  # whatever went wrong: the training waits for it
        if self._judge is not None:
            self._judge(self._collect(vote))

    def _cast(self) -> Vote:
        vote = self._share.vote()
        try:
            write_durably(vote_path(self._partial, vote.rank), vote.to_json())
        except OSError as error:
            return Vote(vote.rank, {}, vote.problem or f"rank {vote.rank}: {error}")
        return vote

    def _collect(self, own: Vote) -> list[Vote]:
        """The votes of all ranks, or those up to the first veto."""
        votes = {own.rank: own}
        while len(votes) < self._ranks and all(vote.problem is None for vote in votes.values()):
            why_not = self._why_not()
            for rank in set(range(self._ranks)) - set(votes):
                vote = _read(vote_path(self._partial, rank)) or (Vote(rank, {}, why_not) if why_not else None)
                if vote is not None:
                    votes[rank] = vote
            time.sleep(_LOOK_SECONDS)
        return [votes[rank] for rank in sorted(votes)]

    def _why_not(self) -> str | None:
        """Why a vote that is not there will not come any more; None where it still may."""
        if self._share.stopped:
            return "given up"
        if self._veto is not None:
            return self._veto
        if self._all_voted_at is not None and time.monotonic() - self._all_voted_at > _VISIBLE_SECONDS:
            return "rank 0 cannot see the votes of the others: the hosts must share the folder of the run"
        return None


def _read(path: Path) -> Vote | None:
    # Renamed into place: it is whole, or not there yet.
    with suppress(FileNotFoundError):
        return Vote.from_json(path.read_text(encoding="utf-8"))
    return None
