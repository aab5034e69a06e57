"""The checkpoints of a run, as its ranks write and read them."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial as partial_call
from pathlib import Path
from typing import Any

from seqaware.checkpoint.async_writer import BackgroundWrite
from seqaware.checkpoint.deepspeed_storage import save_through
from seqaware.checkpoint.manifest import PARTIAL, Listing, RunState, checkpoint_name, step_of, survey
from seqaware.checkpoint.restore import load_checkpoint
from seqaware.checkpoint.retention import Evaluations, Retention, forget_old, set_aside_later, sweep
from seqaware.checkpoint.save import call_latest, complete, describe, make_empty
from seqaware.checkpoint.writer import Share, Vote
from seqaware.distributed.collective_errors import FAILURES, not_written, raise_collectively
from seqaware.engine.engine import Engine
from seqaware.engine.random_state import random_state
from seqaware.errors import CheckpointError

_PATIENCE_SECONDS = 10.0


@dataclass(frozen=True)
class SaveOutcome:
    """How the writing of a checkpoint ended.

    Attributes:
        bytes: its size; 0 where it failed. seconds: from the start to the end of the writing. stood_still: of those the
            seconds that training waited.
        problem: why there is no checkpoint of this step, or None. warnings: what else went wrong.
    """

    step: int
    bytes: int
    seconds: float
    stood_still: float
    problem: str | None = None
    warnings: tuple[str, ...] = ()

    @property
    def figures(self) -> dict[str, float]:
        """Step, bytes and seconds, rounded for a report."""
        seconds = {"seconds": round(self.seconds, 3), "stood_still": round(self.stood_still, 3)}
        return {"step": self.step, "bytes": self.bytes, **seconds}


@dataclass
class _Writing:
    """A checkpoint on its way, as this rank sees it. outcome: on rank 0 alone, until the ranks settle it."""

    step: int
    partial: Path
    started: float
    stood_still: float = 0.0
    background: BackgroundWrite | None = None
    outcome: SaveOutcome | None = None
    told: bool = False
    stop: threading.Event = field(default_factory=threading.Event)


class Checkpoints:
    """Writes, keeps and loads the checkpoints of a run. Made on every rank; all but `poll` and `close` are collective.

    A checkpoint is one when all ranks have written and voted: whatever fails or ends before leaves the one before as
    the newest. With `asynchronous` the ranks copy their state to the host's memory and write while training goes on;
    at most one write is under way.

    Args:
        folder: `checkpoints` of the run's folder, which all ranks share and which must exist itself.

    Attributes:
        complete: the last step that is known to lie whole in `folder`, or None.
    """

    def __init__(self, engine: Engine, folder: Path, *, keep: Retention, asynchronous: bool = False) -> None:
        self._engine = engine
        self._ranks = engine.ranks
        self._folder = folder
        self._keep = keep
        self._asynchronous = asynchronous
        self._evaluations = Evaluations(folder)
        self._trusted: set[Path] = set()
        self._writing: _Writing | None = None
        self.complete: int | None = None
        self._outcomes: list[SaveOutcome] = []
        self._warnings: list[str] = [self._evaluations.problem] if self._evaluations.problem else []

    def save(self, state: RunState) -> None:
        """Write a checkpoint; when `asynchronous`, begin to, once the write under way has ended.

        A step that is complete already is not written again. A background write that failed is not raised here but
        told by `poll`: this is the next attempt.

        Raises:
            CheckpointError: on every rank: it could not be written, on one of them; what was there before is untouched.
        """
        started = time.monotonic()
        self._settle()
        if self.complete == state.step:
            return
        partial = self._folder / f"{checkpoint_name(state.step)}{PARTIAL}"
        raise_collectively(self._ranks, lambda: make_empty(partial), on_first_only=True, error=self._error(state.step))
        writing = _Writing(state.step, partial, started)
        share = Share(partial, rank=self._ranks.rank, at_once=not self._asynchronous, stop=writing.stop)
        save_through(self._engine, partial, share.take)
        share.take(f"rng-{self._ranks.rank}.pt", random_state())
        judge = partial_call(self._judge, writing, describe(state, self._engine))
        self._writing = writing
        if self._asynchronous:
            own_judge = judge if self._ranks.is_first else None
            writing.background = BackgroundWrite(writing.partial, share, ranks=self._ranks.size, judge=own_judge)
            writing.stood_still = time.monotonic() - started
            return
        votes = self._ranks.gather(share.vote())
        if self._ranks.is_first:
            judge(votes)
        self._raise(self._settle())

    def poll(self) -> list[SaveOutcome]:
        """What has ended since the last call, as far as this rank knows: rank 0 hears of all of it, and at once.

        A failure that was raised is not told again.
        """
        writing = self._writing
        if writing is not None and writing.outcome is not None and not writing.told:
            writing.told = True
            self._outcomes.append(writing.outcome)
        told, self._outcomes = self._outcomes, []
        return told

    def wait(self) -> None:
        """Wait for the write under way. A failure is told by `poll`."""
        self._settle()

    def finish(self) -> None:
        """Wait for the write under way, which must succeed.

        Raises:
            CheckpointError: on every rank: it failed.
        """
        self._raise(self._settle())

    def close(self) -> None:
        """Give up a write under way, before the process ends for another reason; what it wrote is no checkpoint."""
        if self._writing is not None and self._writing.background is not None:
            self._writing.stop.set()
            self._writing.background.join(_PATIENCE_SECONDS)
        self._writing = None

    def load(self, listing: Listing) -> None:
        """Put model, optimizer and random state of a checkpoint into the engine, and set later ones aside.

        Args:
            listing: as rank 0 has read it, on every rank.

        Raises:
            CheckpointError: on every rank: a file would run code, or does not fit the model.
        """
        self._settle()
        load_checkpoint(self._engine, listing)
        step = listing.manifest.step
        error = not_written(str(self._folder))
        raise_collectively(self._ranks, lambda: self._go_back(step), on_first_only=True, error=error)
        # One that was set aside, or lies elsewhere, is not found by a rerun.
        own = self._folder / checkpoint_name(step)
        self.complete = step if listing.path.resolve() == own.resolve() else None

    def note_evaluation(self, step: int, loss: float) -> bool:
        """Remember the held-out loss after a step, for `Retention.keep_best`. Collective.

        Returns:
            whether the step is among the best, so that it is to be saved.
        """
        best = self._among_best(step, loss) if self._ranks.is_first else False
        return self._keep.keep_best > 0 and bool(self._ranks.agree(best))

    def _among_best(self, step: int, loss: float) -> bool:
        try:
            self._evaluations.note(step, loss)
        except OSError as error:
            self._warnings.append(f"the held-out loss of step {step} could not be noted: {error}")
        if self._writing is None:  # else the thread that writes will see to it
            self._warnings += self._forget_old()
        saved = {step_of(path) for path in survey(self._folder, self._trusted).whole} if self._keep.keep_best else set()
        coming = {self._writing.step} if self._writing is not None else set()
        return step in self._keep.best(saved | coming | {step}, self._evaluations.losses)

    def _judge(self, writing: _Writing, manifest: Mapping[str, Any], votes: Sequence[Vote]) -> None:
        """Rank 0, perhaps in the background: complete the checkpoint, or clear away what there is of it."""
        final = self._folder / checkpoint_name(writing.step)
        warnings, self._warnings = self._warnings, []
        size, problem = 0, None
        try:
            size = complete(writing.partial, final, votes, manifest=manifest)
        except (*FAILURES, CheckpointError) as error:
            problem = str(error)
            warnings += sweep(self._folder)
        else:
            self._trusted.add(final)
            warnings += call_latest(final) + self._forget_old()
        seconds = time.monotonic() - writing.started
        still = writing.stood_still if self._asynchronous else seconds
        writing.outcome = SaveOutcome(writing.step, size, seconds, still, problem, tuple(warnings))

    def _forget_old(self) -> list[str]:
        return forget_old(self._folder, self._keep, self._evaluations.losses, trusted=self._trusted)

    def _settle(self) -> SaveOutcome | None:
        """Wait for the write under way; how it ended, on every rank."""
        writing = self._writing
        if writing is None:
            return None
        if writing.background is not None:
            problems = self._ranks.gather(writing.background.problem())
            writing.background.settle(veto=next((problem for problem in problems if problem), None))
        outcome: SaveOutcome | None = self._ranks.agree(writing.outcome)
        assert outcome is not None, "rank 0 has judged"
        self._writing = None
        if outcome.problem is None:
            self.complete = outcome.step
        if not writing.told:
            self._outcomes.append(outcome)
        return outcome

    def _raise(self, outcome: SaveOutcome | None) -> None:
        if outcome is not None and outcome.problem is not None:
            if outcome in self._outcomes:  # else `poll` has told it already
                self._outcomes.remove(outcome)
            raise self._error(outcome.step)(outcome.problem)

    def _error(self, step: int) -> Callable[[str], CheckpointError]:
        newest = "its beginning" if self.complete is None else f"step {self.complete}"
        return lambda problem: CheckpointError(
            f"the checkpoint of step {step} could not be written",
            got=problem,
            do=f"see to the disk's space and rights, and give the same command again: it goes on from {newest}",
        )

    def _go_back(self, step: int) -> None:
        set_aside_later(self._folder, step)
        self._evaluations.forget_later(step)
