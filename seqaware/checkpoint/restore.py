"""Loading a checkpoint into the engine."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from seqaware.checkpoint.deepspeed_storage import load_through, own_files
from seqaware.checkpoint.manifest import Listing
from seqaware.checkpoint.resharding import fill, settle
from seqaware.checkpoint.shards import UNIVERSAL
from seqaware.checkpoint.tensor_files import as_written, read_tensors
from seqaware.distributed.collective_errors import raise_collectively
from seqaware.engine.engine import Engine
from seqaware.engine.random_state import restore_random_state
from seqaware.errors import CheckpointError

_ANOTHER = "name another with --resume, or move this one out of the way"


def load_checkpoint(engine: Engine, listing: Listing) -> None:
    """Put model, optimizer and random state of a checkpoint into the engine, whatever topology wrote it. Collective.

    On the ranks and the ZeRO stage that wrote it the run goes on bit for bit. Else the weights and the optimizer are
    the same, and the random generators stay as they are.

    Raises:
        CheckpointError: a file would run code, or does not fit the model.
    """
    checkpoint, topology = listing.path, listing.manifest.topology
    dtype = "bfloat16" if engine.deepspeed.bfloat16_enabled() else "another"
    same = topology.is_of(engine.ranks.size, zero_stage=engine.zero_stage, dtype=dtype)
    if same and not (checkpoint / UNIVERSAL).is_dir():
        _load_same(engine, checkpoint)
        return
    raise_collectively(
        engine.ranks, lambda: _fill(engine, checkpoint), on_first_only=False, error=_not_loaded(checkpoint)
    )
    settle(engine)


def _load_same(engine: Engine, checkpoint: Path) -> None:
    random_state = checkpoint / f"rng-{engine.ranks.rank}.pt"

    def try_to_read() -> None:
        # Before DeepSpeed's loader, which waits at barriers: a file that one rank refuses, all ranks refuse.
        with _said_once(engine):
            for path in [random_state, *own_files(engine, checkpoint)]:
                read_tensors(path)

    raise_collectively(engine.ranks, try_to_read, on_first_only=False, error=_not_loaded(checkpoint))
    raise_collectively(
        engine.ranks, lambda: _load(engine, checkpoint), on_first_only=False, error=_not_loaded(checkpoint)
    )
    raise_collectively(engine.ranks, lambda: _restore(random_state), on_first_only=False, error=_not_loaded(checkpoint))


def _restore(random_state: Path) -> None:
    state = read_tensors(random_state)
    with as_written(random_state):
        restore_random_state(state)


def _fill(engine: Engine, checkpoint: Path) -> None:
    with _said_once(engine), as_written(checkpoint):
        fill(engine, checkpoint)


def _load(engine: Engine, checkpoint: Path) -> None:
    try:
        load_through(engine, checkpoint)
    except (ArithmeticError, AssertionError, AttributeError, EOFError, LookupError, TypeError, ValueError) as error:
        # DeepSpeed checks little: a state of another shape fails wherever it is first looked into.
        got = f"{checkpoint} on rank {engine.ranks.rank}: {error!r}"
        raise CheckpointError("the checkpoint does not fit the model or its optimizer", got=got, do=_ANOTHER) from error


@contextmanager
def _said_once(engine: Engine) -> Iterator[None]:
    """Complete an error of a checkpoint's files by the rank that met it and by what to do, in one sentence."""
    try:
        yield
    except CheckpointError as error:
        raise CheckpointError(
            error.what, got=f"{error.got} on rank {engine.ranks.rank}", do=error.do or _ANOTHER
        ) from error


def _not_loaded(checkpoint: Path) -> Callable[[str], CheckpointError]:
    return lambda problem: CheckpointError(
        "the checkpoint cannot be loaded",
        got=f"{checkpoint}, {problem}",
        do=_ANOTHER,
    )
