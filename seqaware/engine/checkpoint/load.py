"""Loading a checkpoint into the engine."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from seqaware.engine.checkpoint.manifest import read_manifest
from seqaware.engine.checkpoint.reading import read_tensors
from seqaware.engine.checkpoint.save import together
from seqaware.engine.checkpoint.storage import load_through, own_files
from seqaware.engine.engine import Engine
from seqaware.engine.randomness import restore_random_state
from seqaware.errors import CheckpointError


def load_checkpoint(engine: Engine, checkpoint: Path) -> None:
    """Put model, optimizer and random state of `checkpoint` into the engine. Collective.

    Raises:
        CheckpointError: it was written by another number of ranks, or another ZeRO stage with files of another kind; or
            a file would run code, or does not fit the model.
    """
    topology = read_manifest(checkpoint)["topology"]
    ranks, stage = topology["ranks"], topology["zero_stage"]
    same_kind = stage == engine.zero_stage or {stage, engine.zero_stage} == {1, 2}
    if ranks != engine.ranks.size or not same_kind:
        raise CheckpointError(
            "the checkpoint was written on another topology",
            got=f"{ranks} ranks with ZeRO-{stage} then, {engine.ranks.size} with ZeRO-{engine.zero_stage} now",
            do=f"resume on {ranks} ranks with ZeRO-{stage}",
        )
    random_state = checkpoint / f"rng-{engine.ranks.rank}.pt"

    def try_to_read() -> None:
        # Before DeepSpeed's loader, which meets at barriers: a file that one rank refuses, all ranks refuse.
        for path in [random_state, *own_files(engine, checkpoint)]:
            read_tensors(path)

    together(engine.ranks, try_to_read, on_first_only=False, error=_not_loaded(checkpoint))
    together(engine.ranks, lambda: _load(engine, checkpoint), on_first_only=False, error=_not_loaded(checkpoint))
    restore_random_state(read_tensors(random_state))


def _load(engine: Engine, checkpoint: Path) -> None:
    try:
        load_through(engine, checkpoint)
    except (AssertionError, AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        # DeepSpeed checks little: a state of another shape fails wherever it is first looked into.
        raise CheckpointError("it does not fit the model or its optimizer", got=repr(error)) from error


def _not_loaded(checkpoint: Path) -> Callable[[str], CheckpointError]:
    return lambda problem: CheckpointError(
        "the checkpoint cannot be loaded",
        got=f"{checkpoint}, {problem}",
        do="name another with --resume, or move this one out of the way",
    )
