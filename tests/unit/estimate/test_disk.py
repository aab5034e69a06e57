"""What a run needs on the disk: bytes as they were measured, and how many checkpoints lie there at once."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from seqaware.config.loading import REPOSITORY
from seqaware.errors import ConfigError
from seqaware.estimate.disk import DiskUse, checkpoint_bytes, moment_bytes
from seqaware.plan.plan import Plan
from seqaware.training.run_directory import check_disk
from tests.unit.plan.test_plan import config, plan


# Of a Llama of 2,034,202 weights on 2 gloo ranks: the bytes of all files of a checkpoint / the weights. Random states,
# names and manifests take up to 63,000 bytes beside the tensors: 0.031 a weight.
@pytest.mark.parametrize(
    ("stage", "dtype", "optimizer", "measured"),
    [
        (0, "float32", "adamw", 12.031),
        (0, "float32", "lion", 12.027),
        (1, "float32", "adamw", 16.021),
        (1, "bfloat16", "adamw", 14.022),
        (1, "bfloat16", "lion", 14.021),
        (2, "float32", "adamw", 16.021),
        (2, "bfloat16", "adamw", 14.022),
        (3, "float32", "adamw", 12.031),
        (3, "bfloat16", "adamw", 12.031),
        (3, "bfloat16", "lion", 12.030),
    ],
)
def test_a_checkpoint_has_the_bytes_that_were_measured(stage: int, dtype: str, optimizer: str, measured: float) -> None:
    moments = moment_bytes(optimizer, on_cpu=True)
    assert checkpoint_bytes(1000, dtype, moments=moments, stage=stage) / 1000 == pytest.approx(measured, abs=0.032)


def _made(
    *, steps: int | None = 100, every_steps: int | None = None, minutes: float | None = None, **output: Any
) -> Plan:
    evaluation = {"dataset": {"name": "gsm8k"}, "every_steps": every_steps, "every_minutes": minutes}
    schedule = {"max_steps": steps}
    return plan(config(training={"schedule": schedule}, output=output, evaluation=evaluation), data=None)


@pytest.mark.parametrize(
    ("made", "most"),
    [
        (_made(), 1),
        (_made(steps=None), 1),
        (_made(save_every=10), 3),  # two that are kept and one that is written
        (_made(save_every=10, keep_last=5), 6),
        (_made(save_every=60, keep_last=5), 2),  # steps 60 and 100
        (_made(save_every=10, keep_every=50), 5),  # and steps 50 and 100
        (_made(save_every=10, keep_every=25), 5),  # of the multiples of 25, only 50 and 100 are saved
        (_made(save_every=10, keep_best=2, every_steps=10), 5),
        (_made(keep_best=2, every_steps=50), 3),  # only evaluations save, at steps 50 and 100, and the end
        (_made(keep_best=2, every_steps=1), 5),
        (_made(keep_best=2, minutes=5.0), 5),
        (_made(save_every_minutes=30.0), 3),
        (_made(steps=None, save_every=10), 3),
    ],
)
def test_how_many_checkpoints_lie_there_at_once(made: Plan, most: int) -> None:
    assert DiskUse.of(made, parameters=10, trained=10).checkpoints == most


def test_models_are_counted_as_they_are_written() -> None:
    scratch = {"base_name": None, "from_scratch": {"model_type": "llama"}, "tokenizer": "gpt2", "dtype": "bf16"}
    made = plan(config(model=scratch))
    assert DiskUse.of(made, parameters=1000, trained=1000) == DiskUse(14_000, 1, model=2000, initial=4000)
    alone = plan(config(model={"base_name": "gpt2", "dtype": "bf16"}, lora={"export": "adapter"}))
    assert DiskUse.of(alone, parameters=1000, trained=10) == DiskUse(140, 1, model=20, initial=0)
    nothing = plan(config(output={"save_model": False}), deepspeed_path=REPOSITORY / "ds_configs" / "zero3.json")
    assert DiskUse.of(nothing, parameters=1000, trained=1000) == DiskUse(12_000, 1, model=0, initial=0)


def test_a_disk_without_room_is_refused_by_the_same_figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = _made(save_every=10)
    need = DiskUse.of(made, parameters=1000, trained=1000).total()

    class Usage(NamedTuple):
        total: int
        used: int
        free: int

    for free, fits in ((need, True), (need - 1, False)):
        monkeypatch.setattr(shutil, "disk_usage", lambda path, free=free: Usage(free, 0, free))
        if fits:
            check_disk(tmp_path, made, 1000, trained=1000)
        else:
            with pytest.raises(ConfigError, match="not enough disk space"):
                check_disk(tmp_path, made, 1000, trained=1000)
