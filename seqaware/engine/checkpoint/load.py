"""Loading a checkpoint into the engine."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from seqaware.engine.checkpoint.manifest import Listing
from seqaware.engine.checkpoint.reading import read_tensors
from seqaware.engine.checkpoint.reshard import fill, settle
from seqaware.engine.checkpoint.shards import UNIVERSAL
from seqaware.engine.checkpoint.storage import load_through, own_files
from seqaware.engine.engine import Engine
from seqaware.engine.randomness import restore_random_state
from seqaware.engine.together import together
from seqaware.errors import CheckpointError


def load_checkpoint(engine: Engine, listing: Listing) -> None:
    """Put model, optimizer and random state of a checkpoint into the engine, whatever topology wrote it. Collective.

    On the ranks and the ZeRO stage that wrote it the run goes on bit for bit. Else the weights and the optimizer are
    the same, and the random generators stay as they are.

    Raises:
        CheckpointError: a file would run code, or does not fit the model.
    """
    checkpoint, topology = listing.path, listing.manifest.topology
    ranks, stage = topology.ranks, topology.zero_stage
    # ZeRO-1 and 2 write the same files; in bfloat16 DeepSpeed makes them from other classes.
    alike = {stage, engine.zero_stage} == {1, 2} and not engine.deepspeed.bfloat16_enabled()
    same_kind = stage == engine.zero_stage or alike
    if ranks == engine.ranks.size and same_kind and not (checkpoint / UNIVERSAL).is_dir():
        _load_same(engine, checkpoint)
        return
    together(engine.ranks, lambda: _fill(engine, checkpoint), on_first_only=False, error=_not_loaded(checkpoint))
    settle(engine)


def _load_same(engine: Engine, checkpoint: Path) -> None:
    random_state = checkpoint / f"rng-{engine.ranks.rank}.pt"

    def try_to_read() -> None:
        # Before DeepSpeed's loader, which meets at barriers: a file that one rank refuses, all ranks refuse.
        for path in [random_state, *own_files(engine, checkpoint)]:
            read_tensors(path)

    together(engine.ranks, try_to_read, on_first_only=False, error=_not_loaded(checkpoint))
    together(engine.ranks, lambda: _load(engine, checkpoint), on_first_only=False, error=_not_loaded(checkpoint))
    restore_random_state(read_tensors(random_state))


def _fill(engine: Engine, checkpoint: Path) -> None:
    try:
        fill(engine, checkpoint)
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError("its files are not what DeepSpeed writes", got=repr(error)) from error


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
