"""Where a run goes on, and whether it is the same run still: a change is refused, or allowed by its name."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from seqaware.checkpoint.manifest import (
    MANIFEST,
    Listing,
    RunState,
    first_wrong_hash,
    inspect,
    named_checkpoints,
    read_listing,
)
from seqaware.distributed.process_group import Ranks
from seqaware.errors import CheckpointError, ConfigError
from seqaware.plan.plan import MATHEMATICS, Plan
from seqaware.training.process import Say
from seqaware.watchdog.host_process import HostProcess

_SOURCE = "weighting_source"  # of `Plan.mathematics()["objective"]`
_NOT_CUT = {
    "muon": "each rank keeps the momentum of whole matrices, in an order of its own",
    "adamw_8bit": "its state has a scale for every block of weights",
}


@dataclass(frozen=True)
class ResumePoints:
    """Where a run may resume, as rank 0 has found it.

    Attributes:
        newest: the newest valid checkpoint of this run, or the one that a user named; its hashes are yet to be checked.
        older: folders with the names of checkpoints before it, not looked into yet, newest first.
        damaged: what is wrong with newer ones, a line each. asked: a user named the checkpoint.
        anyway: names of MATHEMATICS that may have changed. allowed: plan hashes that count as this run's.
    """

    newest: Listing | None
    older: tuple[Path, ...] = ()
    damaged: tuple[str, ...] = ()
    asked: bool = False
    anyway: tuple[str, ...] = ()
    allowed: tuple[str, ...] = ()


@dataclass(frozen=True)
class ResumeRequest:
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
    def of(cls, resume: str, environment: Mapping[str, str]) -> ResumeRequest:
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
            points = ResumePoints(None)
        case "auto":
            points = _newest(named_checkpoints(checkpoints))
        case _:
            points = ResumePoints(read_listing(Path(resume)), asked=True)
    if points.newest is not None:
        _check(points.newest, plan, anyway=anyway, allowed=allowed)
    return replace(points, anyway=tuple(anyway), allowed=tuple(allowed))


def _newest(named: Sequence[Path]) -> ResumePoints:
    """Look into the folders until one is a valid checkpoint: a run may keep hundreds, of thousands of files each."""
    damaged: list[str] = []
    for number, path in enumerate(named):
        found = inspect(path)
        if isinstance(found, Listing):
            return ResumePoints(found, tuple(named[number + 1 :]), tuple(damaged))
        damaged.append(f"{path}: {found}")
    return ResumePoints(None, damaged=tuple(damaged))


def _check(listing: Listing, plan: Plan, *, anyway: Collection[str], allowed: Collection[str]) -> None:
    checkpoint, state = listing.path, listing.state
    others = {} if state.plan_hash in allowed else changes(state.mathematics, plan.mathematics())
    refused = {name: change for name, change in others.items() if name not in anyway}
    if refused:
        raise CheckpointError(
            "the checkpoint belongs to another run",
            got=f"{checkpoint}, where {listed(refused)}",
            do=resume_advice(refused, plan),
        )
    _refuse_reshard(listing, plan)
    if plan.total_steps is not None and state.step > plan.total_steps:
        raise CheckpointError(
            "the checkpoint is later than the end of this run",
            got=f"{checkpoint} at step {state.step}, and the run has {plan.total_steps} steps",
            do="name an earlier one with --resume, or raise training.schedule.max_steps",
        )


def _refuse_reshard(listing: Listing, plan: Plan) -> None:
    """Refuse a topology that the optimizer's state cannot be cut for, before a model loads."""
    topology, optimizer = listing.manifest.topology, listing.manifest.mathematics.get("optimizer")
    kind = optimizer.get("type") if isinstance(optimizer, dict) else None
    if kind not in _NOT_CUT or topology.is_of(plan.world.size, zero_stage=plan.zero_stage, dtype=plan.dtype):
        return
    was = f"{topology.ranks} rank(s) at ZeRO-{topology.zero_stage}"
    raise CheckpointError(
        f"a run with {kind} cannot resume on another topology: {_NOT_CUT[kind]}",
        got=f"{listing.path} of {was}, and {plan.world.size} rank(s) at ZeRO-{plan.zero_stage}",
        do=f"start {was}, or train a new run from its weights: seqaware export {listing.path} FOLDER",
    )


def first_valid(points: ResumePoints, plan: Plan, ranks: Ranks, *, say: Say) -> Listing | None:
    """The first checkpoint whose files are what was written, by their hashes. Collective: each rank reads its share.

    Rank 0 alone reads a manifest and stats its files; the other ranks receive the listing.

    Raises:
        CheckpointError: the one that was asked for is damaged, or other ranks do not see what rank 0 sees.
    """
    for damage in points.damaged:
        say(f"warning     skipped the invalid checkpoint {damage}")
    for listing in _listings(points, plan, ranks, say=say):
        problems = ranks.gather(first_wrong_hash(listing, rank=ranks.rank, size=ranks.size))
        problem = next((each for each in problems if each is not None), None)
        if problem is None:
            return listing
        if points.asked:
            raise CheckpointError(
                "the checkpoint is damaged", got=f"{listing.path}: {problem}", do="name another, or --resume auto"
            )
        say(f"warning     skipped the invalid checkpoint {listing.path}: {problem}")
    if points.newest is not None:
        _refuse_other_folder(points.newest, ranks)
    if points.newest is not None or points.damaged:
        say("warning     no valid checkpoint found; starting from scratch")
    return None


def _listings(points: ResumePoints, plan: Plan, ranks: Ranks, *, say: Say) -> Iterator[Listing]:
    """The newest listing, then those of older checkpoints of this run, the same on every rank. Collective."""
    if points.newest is None:
        return
    yield points.newest
    for path in points.older:
        found: Listing | str = ranks.agree(inspect(path) if ranks.is_first else None)
        if isinstance(found, str):
            say(f"warning     skipped the invalid checkpoint {path}: {found}")
            continue
        try:
            _check(found, plan, anyway=points.anyway, allowed=points.allowed)
        except CheckpointError:
            return  # nothing that stands behind another run's checkpoint is this run's
        yield found


def _refuse_other_folder(newest: Listing, ranks: Ranks) -> None:
    """Raise where a rank does not see the files that rank 0 sees: nothing starts from scratch for that. Collective."""
    for rank, name in enumerate(ranks.gather(_unseen(newest, ranks))):
        if name is not None:
            raise CheckpointError(
                "a rank does not see the checkpoints that rank 0 sees",
                got=f"{newest.path} on rank {rank}, where {name} is missing",
                do="see to it that all hosts share output.dir, under the same path and with the same rights",
            )


def _unseen(listing: Listing, ranks: Ranks) -> str | None:
    names = [MANIFEST, *listing.share(ranks.rank, size=ranks.size)]
    return next((name for name in names if not (listing.path / name).is_file()), None)


def refuse_different_plans(plan: Plan, ranks: Ranks) -> None:
    """Refuse to train where a rank read another config, other data or other code than rank 0. Collective.

    Raises:
        ConfigError: on every rank.
    """
    hashes: list[str] = ranks.gather(plan.mathematics_hash())
    other = next((rank for rank, each in enumerate(hashes) if each != hashes[0]), None)
    if other is None:
        return
    plans: list[dict[str, Any]] = ranks.gather(plan.mathematics())
    names = [name for name in MATHEMATICS if plans[0].get(name) != plans[other].get(name)]
    raise ConfigError(
        "the ranks would train different runs",
        got=f"another {', '.join(names)} on rank {other} than on rank 0",
        do="give every host the same config, data, model and, for training.sft.weighting, the same module",
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
    """Return what differs between the mathematics of two runs, by their top names.

    The source of a user's weighting function counts only where the run before recorded it: version 0.1 recorded its
    name alone.
    """
    # As it reads back from a file: tuples become lists.
    written: dict[str, Any] = json.loads(json.dumps(now))
    if not _records_source(before):
        written["objective"].pop(_SOURCE, None)
    names = [name for name in MATHEMATICS if before.get(name) != written.get(name)]
    return {name: Change(before.get(name), written.get(name)) for name in names}


def _records_source(mathematics: Mapping[str, Any]) -> bool:
    objective = mathematics.get("objective")
    return isinstance(objective, dict) and _SOURCE in objective


def unrecorded(state: RunState, plan: Plan) -> str | None:
    """Return what a checkpoint of an earlier version does not record of the run, or None."""
    if plan.weighting_source is None or _records_source(state.mathematics):
        return None
    name = plan.config.training.sft.weighting
    return f"the checkpoint does not record the source of training.sft.weighting {name}: it is assumed unchanged"


def listed(differences: Mapping[str, Change]) -> str:
    """All of them for a person, each down to the keys that differ."""
    return "; ".join(_difference(change.was, change.now, name) for name, change in differences.items())


def resume_advice(differences: Mapping[str, Change], plan: Plan) -> str:
    """Return what allows the changes, and what undoes the one that a user did not write."""
    allow = f"to resume all the same, write --resume-anyway {','.join(differences)}"
    if _was_one_epoch(differences.get("schedule"), plan):
        return f"write training.schedule.num_epochs: 1, which earlier versions took for null; {allow}"
    return allow


def _was_one_epoch(schedule: Change | None, plan: Plan) -> bool:
    """Whether the run ended with its first epoch because `num_epochs` defaulted to 1 beside `max_steps`."""
    if schedule is None or plan.config.training.schedule.epoch_limit is not None:
        return False
    first_epoch = plan.batches.steps_per_epoch and plan.batches.steps_per_epoch[0]
    return isinstance(schedule.was, dict) and schedule.was.get("total_steps", 0) == first_epoch


def _difference(old: Any, new: Any, name: str) -> str:
    if isinstance(old, dict) and isinstance(new, dict):
        inner = [each for each in sorted({*old, *new}) if old.get(each) != new.get(each)]
        return ", ".join(_difference(old.get(each), new.get(each), f"{name}.{each}") for each in inner)
    return f"{name} was {json.dumps(old)} and is now {json.dumps(new)}"
