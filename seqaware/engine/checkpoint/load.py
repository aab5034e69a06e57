"""Loading a checkpoint into the engine."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from seqaware.engine.checkpoint.manifest import MANIFEST
from seqaware.engine.engine import Engine
from seqaware.errors import CheckpointError


def load_checkpoint(engine: Engine, checkpoint: Path) -> None:
    """Put model, optimizer and random state of `checkpoint` into the engine. Collective.

    Raises:
        CheckpointError: it was written by another number of ranks, or another ZeRO stage with files of another kind.
    """
    manifest = json.loads((checkpoint / MANIFEST).read_text())
    ranks, stage = manifest["world_size"], manifest["zero_stage"]
    same_kind = stage == engine.zero_stage or {stage, engine.zero_stage} == {1, 2}
    if ranks != engine.ranks.size or not same_kind:
        raise CheckpointError(
            "the checkpoint was written on another topology",
            got=f"{ranks} ranks with ZeRO-{stage} then, {engine.ranks.size} with ZeRO-{engine.zero_stage} now",
            do=f"resume on {ranks} ranks with ZeRO-{stage}",
        )
    path, _ = engine.deepspeed.load_checkpoint(
        str(checkpoint.parent), tag=checkpoint.name, load_module_strict=engine.wrapped.adapters is None
    )
    if path is None:
        raise CheckpointError("DeepSpeed could not read the checkpoint", got=checkpoint)
    rng = torch.load(checkpoint / f"rng-{engine.ranks.rank}.pt", weights_only=True)
    torch.set_rng_state(rng["cpu"])
    if "cuda" in rng and torch.cuda.is_available():
        torch.cuda.set_rng_state(rng["cuda"])
