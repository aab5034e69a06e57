"""Where a run goes on, and whether it is the same run still: a change is refused, or allowed by its name."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from seqaware.engine.checkpoint.manifest import RunState, first_wrong_hash, read_state, step_of, survey, what_is_wrong
from seqaware.engine.ranks import Ranks
from seqaware.errors import CheckpointError, ConfigError
from seqaware.plan.plan import MATHEMATICS, Plan
from seqaware.training.process import Say
from seqaware.training.watch.host import HostProcess


@dataclass(frozen=True)
class ResumePoints:
    """Checkpoints that a run may go on from, the best first, and damaged ones that are passed over.

    Attributes:
        candidates: whole by their manifests and sizes; their hashes are yet to be checked. asked: a person named it.
        damaged: what is wrong with newer ones, a line each.
    """

    candidates: tuple[Path, ...]
    damaged: tuple[str, ...]
    asked: bool


@dataclass(frozen=True)
class Wish:
    """What `--resume` says, and whose start it is.

    Attributes:
        resume: "auto", "never" or a checkpoint's folder.
        launch: names who starts the same command again by itself, torchrun's agent or a SLURM job; None: nobody does.
        start: another number each time that it does.
    """

    resume: str
    launch: str | None = None
    start: int = 0

    @classmethod
    def of(cls, resume: str, environment: Mapping[str, str]) -> Wish:
        if "TORCHELASTIC_RUN_ID" in environment:
            agent = HostProcess.of(os.getppid())
            return cls(resume, f"torchrun {agent.pid} since {agent.started} on {socket.gethostname()}", os.getpid())
        if job := environment.get("SLURM_JOB_ID"):
            return cls(resume, f"SLURM job {job}", int(environment.get("SLURM_RESTART_COUNT") or 0))
        return cls(resume)

    def now(self, attempts: Sequence[Mapping[str, Any]]) -> str:
        """What is to be done after these attempts of the run: who starts again by itself goes on, and not back."""
        last: Mapping[str, Any] = attempts[-1].get("asked") or {} if attempts else {}
        again = (last.get("resume"), last.get("launch")) == (self.resume, self.launch) and self.launch is not None
        return "auto" if again and last.get("start") != self.start else self.resume


def resume_points(
    checkpoints: Path, plan: Plan, *, resume: str, anyway: Collection[str] = (), allowed: Collection[str] = ()
) -> ResumePoints:
    """Where a run may go on; no candidates for a fresh start. Looks at manifests and sizes only.

    Args:
        checkpoints: the run's own. resume: "auto", "never" or a checkpoint's path.
        anyway: names of MATHEMATICS that may have changed.
        allowed: plan hashes that this run has gone on from before, with a person's leave.

    Raises:
        CheckpointError: one is torn that was asked for, of another run, or later than this run's end.
    """
    match resume:
        case "never":
            return ResumePoints((), (), asked=False)
        case "auto":
            found = survey(checkpoints)
            newest = step_of(found.whole[0]) if found.whole else -1
            damaged = tuple(f"{each.path}: {each.problem}" for each in found.damaged if step_of(each.path) > newest)
            points = ResumePoints(found.whole, damaged, asked=False)
        case _:
            points = ResumePoints((Path(resume),), (), asked=True)
    for number, checkpoint in enumerate(points.candidates):
        try:
            _check(checkpoint, read_state(checkpoint), plan, anyway=anyway, allowed=allowed)
        except CheckpointError:
            if number == 0:
                raise
            # Only the newest must be this run's: none that stands behind a stranger is gone on from.
            return ResumePoints(points.candidates[:number], points.damaged, points.asked)
    return points


def _check(checkpoint: Path, state: RunState, plan: Plan, *, anyway: Collection[str], allowed: Collection[str]) -> None:
    others = {} if state.plan_hash in allowed else changes(state.mathematics, plan.mathematics())
    refused = {name: change for name, change in others.items() if name not in anyway}
    if refused:
        raise CheckpointError(
            "the checkpoint belongs to another run",
            got=f"{checkpoint}, where {listed(refused)}",
            do=how_to_go_on(refused),
        )
    if plan.total_steps is not None and state.step > plan.total_steps:
        raise CheckpointError(
            "the checkpoint is later than the end of this run",
            got=f"{checkpoint} at step {state.step}, and the run has {plan.total_steps} steps",
            do="name an earlier one with --resume, or raise training.schedule.max_steps",
        )


def first_whole(points: ResumePoints, ranks: Ranks, *, say: Say) -> Path | None:
    """The first candidate whose files are what was written, by their hashes. Collective: each rank reads its share.

    Raises:
        CheckpointError: the one that was asked for is damaged, or other ranks do not see what rank 0 sees.
    """
    for damage in points.damaged:
        say(f"warning     passed over {damage}")
    for checkpoint in points.candidates:
        problems = ranks.gather(first_wrong_hash(checkpoint, rank=ranks.rank, size=ranks.size))
        problem = next((each for each in problems if each is not None), None)
        if problem is None:
            return checkpoint
        if points.asked:
            raise CheckpointError(
                "the checkpoint is damaged", got=f"{checkpoint}: {problem}", do="name another, or --resume auto"
            )
        say(f"warning     passed over {checkpoint}: {problem}")
    if points.candidates:
        _refuse_other_folder(points.candidates[0], ranks)
    if points.damaged or points.candidates:
        say("warning     no checkpoint of this run is whole: it begins anew")
    return None


def _refuse_other_folder(newest: Path, ranks: Ranks) -> None:
    """Nothing begins anew because a host does not see the checkpoints that rank 0 has found. Collective."""
    for rank, problem in enumerate(ranks.gather(what_is_wrong(newest))):
        if problem is not None:
            raise CheckpointError(
                "a rank does not see the checkpoints that rank 0 sees",
                got=f"{newest} on rank {rank}, where {problem}",
                do="see to it that all hosts share output.dir, under the same path and with the same rights",
            )


def check_names(anyway: Iterable[str]) -> None:
    """Refuse what `--resume-anyway` cannot mean.

    Raises:
        ConfigError: a name is none of MATHEMATICS.
    """
    unknown = [name for name in anyway if name not in MATHEMATICS]
    if unknown:
        raise ConfigError(
            "--resume-anyway names nothing that a run is made of",
            got=", ".join(map(repr, unknown)),
            do=f"the names are {', '.join(MATHEMATICS)}",
        )


@dataclass(frozen=True)
class Change:
    """One of MATHEMATICS as it was and as it is; None where there was none."""

    was: Any
    now: Any


def changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, Change]:
    """What differs between the mathematics of two runs, by their top names."""
    # As it reads back from a file: tuples become lists.
    written: dict[str, Any] = json.loads(json.dumps(now))
    names = [name for name in MATHEMATICS if before.get(name) != written.get(name)]
    return {name: Change(before.get(name), written.get(name)) for name in names}


def listed(differences: Mapping[str, Change]) -> str:
    """All of them for a person, each down to the keys that differ."""
    return "; ".join(_difference(change.was, change.now, name) for name, change in differences.items())


def how_to_go_on(differences: Mapping[str, Change]) -> str:
    return f"to go on all the same, write --resume-anyway {','.join(differences)}"


def _difference(old: Any, new: Any, name: str) -> str:
    if isinstance(old, dict) and isinstance(new, dict):
        inner = [each for each in sorted({*old, *new}) if old.get(each) != new.get(each)]
        return ", ".join(_difference(old.get(each), new.get(each), f"{name}.{each}") for each in inner)
    return f"{name} was {json.dumps(old)} and is now {json.dumps(new)}"
