"""DeepSpeed's way to the disk, through ours: it says what belongs into a checkpoint's files, we write and read them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from deepspeed.runtime.checkpoint_engine.checkpoint_engine import CheckpointCommitInfo, CheckpointEngine

from seqaware.checkpoint.tensor_files import read_tensors
from seqaware.checkpoint.writer import snapshot
from seqaware.engine.engine import Engine

Take = Callable[[str, Any], None]


class _Storage(CheckpointEngine):  # type: ignore[misc]  # DeepSpeed has no types
    """What DeepSpeed calls to write and to read a file.

    It never raises while DeepSpeed saves: DeepSpeed meets at barriers on the way, and a rank that raised would leave
    the others waiting there for the collective's timeout. `take` keeps a problem for the vote that follows.
    """

    def __init__(self, take: Take | None = None) -> None:
        super().__init__()
        self._take = take

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        """The folder is there already: made by rank 0, whose failure all ranks have heard of."""

    def create(self, info: CheckpointCommitInfo) -> None:
        """Nothing to begin."""

    def save(self, state_dict: Any, path: str) -> None:
        assert self._take is not None, "a loader does not save"
        self._take(Path(path).name, state_dict)

    def load(self, path: str, map_location: Any = None) -> Any:
        """A file's content, on the CPU.

        Read without running code, and copied out of the mapped file: DeepSpeed keeps some of these tensors, and the
        checkpoint is deleted one day.
        """
        return snapshot(read_tensors(Path(path)))

    def commit(self, info: CheckpointCommitInfo) -> bool:
        """All ranks vote afterwards, by themselves."""
        return True


def save_through(engine: Engine, partial: Path, take: Take) -> None:
    """Have DeepSpeed hand every file of this rank to `take`. Collective."""
    # What it does beside its files could fail on one rank alone, at the same barriers: it copies scripts into the
    # folder (they come with DeepSpeed anyway), and what lies on a drive, which it cannot bring back.
    beside: dict[str, Any] = {
        "_copy_recovery_script": lambda save_path: None,
        "zero_nvme_offload_optimizer": lambda: False,
    }
    with _installed(engine, checkpoint_engine=_Storage(take), **beside):
        engine.deepspeed.save_checkpoint(
            str(partial.parent),
            tag=partial.name,
            client_state={},
            save_latest=False,
            # The weights that adapters leave alone are in the base model already.
            exclude_frozen_parameters=engine.wrapped.adapters is not None,
        )


def load_through(engine: Engine, checkpoint: Path) -> None:
    """Have DeepSpeed load a checkpoint of this topology. Collective.

    Raises:
        RuntimeError: the weights are not those of this model.
    """
    deepspeed = engine.deepspeed

    def zero_names(load_dir: str, tag: str, bf16_mode: bool) -> list[str]:
        ranks = deepspeed.loaded_checkpoint_dp_world_size
        names: list[str] = deepspeed._get_mp_rank_zero_checkpoint_names(
            load_dir, tag, mp_rank=deepspeed.checkpoint_mp_rank, dp_world_size=ranks, bf16_mode=bf16_mode
        )
        return names

    # DeepSpeed lists the folder and stats the optimizer file of every rank, on every rank, although each then reads its
    # own file only: N² requests to a shared file system. The manifest has been checked by rank 0. (DeepSpeed 0.19.8.)
    own_only: dict[str, Any] = {
        "_get_all_ckpt_names": lambda path, tag: [deepspeed._get_ckpt_name(path, tag)],
        "_get_all_zero_checkpoint_names": zero_names,
    }
    with _installed(engine, checkpoint_engine=_Storage(), **own_only):
        path, _ = deepspeed.load_checkpoint(
            str(checkpoint.parent), tag=checkpoint.name, load_module_strict=engine.wrapped.adapters is None
        )
    if path is None:
        raise RuntimeError("DeepSpeed finds no file of its own in it")


def own_files(engine: Engine, checkpoint: Path) -> list[Path]:
    """The files of a checkpoint of this topology that DeepSpeed will read on this rank."""
    deepspeed, place = engine.deepspeed, (str(checkpoint.parent), checkpoint.name)
    names = [deepspeed._get_ckpt_name(*place)]
    if hasattr(deepspeed.optimizer, "dp_process_group"):
        names.append(deepspeed._get_zero_ckpt_name(*place))
    return [Path(name) for name in names if Path(name).exists()]


@contextmanager
def _installed(engine: Engine, **changes: Any) -> Iterator[None]:
    """Put these in the place of DeepSpeed's own for a while."""
    own = engine.deepspeed.__dict__
    before = {name: own[name] for name in changes if name in own}
    own.update(changes)
    try:
        yield
    finally:
        for name in changes:
            del own[name]
        own.update(before)
