"""The Plan: every number that follows from the configuration, the ranks, the model and the data. Nobody changes it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from seqaware.config.loading import REPOSITORY
from seqaware.config.schema import Config
from seqaware.plan.batches import BatchPlan, derive_batches
from seqaware.plan.deepspeed_config import build_deepspeed_config, read_deepspeed_json
from seqaware.plan.offload import offload_device
from seqaware.plan.specs import DataFacts, ModelFacts, World
from seqaware.plan.validation import (
    check_contradictions,
    check_sequence_parallelism,
    stage_of,
)
from seqaware.plan.weighting_source import weighting_source

DEFAULT_DEEPSPEED = REPOSITORY / "ds_configs" / "zero2.json"
# Four implementations of one update: where the weights lie decides which is fast, not what is computed.
_ADAMW = ("adamw", "adamw_fused", "cpu_adam", "fused_adam")

# What decides the numbers of a run, by name: what `--resume-anyway` may name.
MATHEMATICS = ("objective", "data", "tokenizer", "batch", "model", "optimizer", "schedule", "seed", "lora")


def mathematics_hash(mathematics: Mapping[str, Any]) -> str:
    """SHA-256, hexadecimal, of a plan's mathematics; the same where they were read from a file."""
    return hashlib.sha256(json.dumps(mathematics, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class Plan:
    """What a run will do.

    Attributes:
        dtype: float32, bfloat16 or float16: what `model.dtype` comes to on these ranks.
        attention: the backend as asked; the engine resolves auto on the device.
        deepspeed: the complete dict for `deepspeed.initialize`; deepspeed_path: the JSON it started from.
        model, data: None while they are not known here.
        weighting_source: digest of a user's weighting function, as it was when the plan was made; None: not a user's,
            or not found.
        notes: what works but a person may not expect.
    """

    config: Config
    world: World
    dtype: str
    attention: str
    batches: BatchPlan
    deepspeed: dict[str, Any]
    deepspeed_path: Path
    zero_stage: int
    model: ModelFacts | None
    data: DataFacts | None
    notes: tuple[str, ...]
    weighting_source: str | None = None

    @property
    def total_steps(self) -> int | None:
        """Optimizer steps of the run; None while the data is not known."""
        return self.batches.total_steps

    def to_json(self) -> dict[str, Any]:
        """The plan as plain JSON values."""
        plan = {
            "config": self.config.model_dump(mode="json"),
            "world": asdict(self.world),
            "dtype": self.dtype,
            "attention": self.attention,
            "gamma": self.config.training.sft.discount,
            "batches": asdict(self.batches),
            "zero_stage": self.zero_stage,
            "deepspeed_path": str(self.deepspeed_path),
            "deepspeed": self.deepspeed,
            "model": None if self.model is None else asdict(self.model),
            "data": None if self.data is None else asdict(self.data),
            "notes": list(self.notes),
            "mathematics": self.mathematics(),
            "mathematics_hash": self.mathematics_hash(),
        }
        values: dict[str, Any] = json.loads(json.dumps(plan))
        return values

    def mathematics(self) -> dict[str, Any]:
        """What decides the numbers of the run, and nothing that is topology: runs with equal ones are one run.

        Prepared data is named by its fingerprint alone, and its tokenizer by a digest, so that they may be moved. The
        length of the run counts only where the learning rate depends on it, so that a run at a constant rate may be
        continued for longer. The top names are `MATHEMATICS`, lora only where there are adapters.
        """
        config, training, batches = self.config, self.config.training, self.batches
        optimizer = training.optimizer.model_dump(mode="json")
        if optimizer["type"] in _ADAMW:
            optimizer["type"] = "adamw"
        if optimizer["type"] != "muon":
            del optimizer["momentum"]
        schedule = {"scheduler_type": training.schedule.scheduler_type, "warmup_steps": batches.warmup_steps}
        if training.schedule.scheduler_type != "constant":
            shape = training.schedule.model_dump(mode="json", include={"min_lr_ratio", "power", "decay_ratio"})
            schedule |= {**shape, "total_steps": batches.total_steps}
        objective = training.sft.model_dump(mode="json", exclude={"gamma", "half_life", "horizon"})
        if self.weighting_source is not None:
            objective["weighting_source"] = self.weighting_source
        of_model = {"base_name", "from_scratch", "revision", "dropout"}
        adapters = config.lora and {"lora": config.lora.model_dump(mode="json", exclude={"export"})}
        return {
            **(adapters or {}),
            "objective": {"gamma": training.sft.discount, **objective},
            "model": {**config.model.model_dump(mode="json", include=of_model), "dtype": self.dtype},
            "data": self._data_identity(),
            "tokenizer": self._tokenizer_identity(),
            "batch": {
                "global_batch_size": batches.global_batch_size,
                "global_batch_tokens": batches.global_batch_tokens,
                "max_seq_length": batches.max_seq_length,
            },
            "seed": training.control.seed,
            "optimizer": optimizer,
            "schedule": schedule,
        }

    def mathematics_hash(self) -> str:
        """SHA-256 of `mathematics()`, hexadecimal."""
        return mathematics_hash(self.mathematics())

    def unknown_mathematics(self) -> tuple[str, ...]:
        """What is not known here and will change `mathematics()` in the run; empty where its hash is final."""
        unknown = []
        if not self.batches.length_known:
            unknown.append("the model's maximum")
        if self.data is None or not self.data.fingerprint:
            unknown.append("the tokenised data")
        if ":" in self.config.training.sft.weighting and self.weighting_source is None:
            unknown.append("the weighting function's source")
        return tuple(unknown)

    def _tokenizer_identity(self) -> dict[str, Any]:
        """By its content, wherever it lies; by its name while nothing is tokenised."""
        if self.data is not None and self.data.tokenizer:
            return {"digest": self.data.tokenizer}
        return {"name": self.config.model.tokenizer or self.config.model.base_name}

    def _data_identity(self) -> dict[str, Any]:
        if self.data is not None and self.data.fingerprint:
            return {"fingerprint": self.data.fingerprint}
        dataset = self.config.dataset.model_dump(mode="json", exclude={"store_dir", "workers", "streaming"})
        return {"dataset": dataset, "format": self.config.format.model_dump(mode="json")}


def make_plan(
    config: Config,
    *,
    world: World,
    deepspeed_path: Path | None = None,
    model: ModelFacts | None = None,
    data: DataFacts | None = None,
) -> Plan:
    """The plan of a run, or the reason why there can be none.

    Args:
        deepspeed_path: the command line's --deepspeed; None takes the config's, or ds_configs/zero2.json.
        model, data: None while they are not known; the figures that need them stay open.

    Raises:
        ConfigError: what was written contradicts itself, the ranks, the model or the installed libraries.
    """
    path = deepspeed_path or (Path(config.deepspeed) if config.deepspeed else DEFAULT_DEEPSPEED)
    raw = read_deepspeed_json(path)
    check_sequence_parallelism(config.parallel.sequence, world=world, model=model)
    world = replace(world, sequence=config.parallel.sequence)
    dtype = _resolved_dtype(config.model.dtype, world)
    check_contradictions(config, raw, world=world, dtype=dtype)
    return Plan(
        config=config,
        world=world,
        dtype=dtype,
        attention=config.model.attention,
        batches=derive_batches(config.training, world=world, model=model, data=data),
        deepspeed=build_deepspeed_config(config, raw, world=world, dtype=dtype),
        deepspeed_path=path,
        zero_stage=stage_of(raw),
        model=model,
        data=data,
        notes=tuple(_notes(config, raw)),
        weighting_source=weighting_source(config.training.sft.weighting),
    )


def _resolved_dtype(asked: str, world: World) -> str:
    if asked != "auto":
        return asked
    return "bfloat16" if world.device == "cuda" and world.bf16 else "float32"


def _notes(config: Config, raw: dict[str, Any]) -> list[str]:
    zero = raw.get("zero_optimization", {})
    notes = []
    kind = config.training.optimizer.type
    if offload_device(zero, "offload_optimizer") and kind in ("adamw", "adamw_fused"):
        notes.append(f"the offloaded optimizer is torch's {kind}; cpu_adam computes the same several times faster")
    if "nvme" in (offload_device(zero, "offload_optimizer"), offload_device(zero, "offload_param")):
        notes.append("states on a drive: DeepSpeed cannot resume such a run from a checkpoint; its model is exported")
    quantized = [key for key in ("zero_quantized_weights", "zero_quantized_gradients") if zero.get(key)]
    if quantized:
        notes.append(f"{' and '.join(quantized)}: communication is lossy, so the numbers depend on the ranks")
    if config.training.optimizer.weight_decay and kind == "lion":
        notes.append("Lion wants a learning rate 3 to 10 times smaller than AdamW, and as much more weight decay")
    return notes
