"""What offloading and ZeRO++ can do: refused by name where DeepSpeed would fail later or train something else."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from seqaware.errors import ConfigError
from seqaware.plan.deepspeed_config import check_owned_keys
from seqaware.plan.offload import (
    SwapSizes,
    check_swap_space,
    communication_contradictions,
    offload_contradictions,
    swap_folders,
    with_own_swap_folder,
)
from seqaware.plan.specs import World

GPU = World(size=16, local_size=8, nodes=2, device="cuda", bf16=True)
SIZES = SwapSizes(parameters=1000, trained=600, largest=320, itemsize=2)


@pytest.fixture(autouse=True)
def libaio(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether this machine has libaio is not the question here."""
    monkeypatch.setattr("seqaware.plan.offload.find_library", lambda name: f"lib{name}.so.1")


def free(count: int) -> Callable[[Path], SimpleNamespace]:
    return lambda path: SimpleNamespace(free=count)


def words(errors: Iterable[ConfigError]) -> list[str]:
    return [str(error) for error in errors]


def drive(path: Path, **keys: Any) -> dict[str, Any]:
    return {"device": "nvme", "nvme_path": str(path), **keys}


OF_OPTIMIZER = [
    ({"ratio": 0.5}, "cpu_adam", "keeps the first step's learning rate; got 0.5"),
    ({"super_offload": True}, "cpu_adam", "super_offload is not known"),
    ({"device": "nvme", "fast_init": True}, "cpu_adam", "fast_init is not known"),
    ({"device": "nvme"}, "muon", "type muon with zero_optimization.offload_optimizer.device nvme"),
    ({"device": "nvme", "buffer_count": 3}, "cpu_adam", "got 3; write 4 or more"),
    ({"device": "nvme", "buffer_count": 7, "pipeline_read": True}, "cpu_adam", "got 7; write 8 or more"),
]


@pytest.mark.parametrize(("keys", "optimizer", "word"), OF_OPTIMIZER, ids=[case[-1] for case in OF_OPTIMIZER])
def test_optimizer_blocks_that_are_refused(tmp_path: Path, keys: dict[str, Any], optimizer: str, word: str) -> None:
    block = {"device": "cpu", "nvme_path": str(tmp_path), **keys}
    (error,) = words(offload_contradictions({"stage": 3, "offload_optimizer": block}, optimizer=optimizer))
    assert word in error


def test_zenflow_is_refused() -> None:
    (error,) = words(offload_contradictions({"stage": 2, "zenflow": {"topk_ratio": 0.1}}, optimizer="cpu_adam"))
    assert "zenflow applies most of a gradient steps later" in error


def test_what_works_is_let_through(tmp_path: Path) -> None:
    for block in (drive(tmp_path), drive(tmp_path, pipeline_read=True, buffer_count=8), {"device": "cpu", "ratio": 1}):
        zero = {"stage": 3, "offload_optimizer": block, "offload_param": drive(tmp_path)}
        assert not words(offload_contradictions(zero, optimizer="cpu_adam"))


def test_quantised_gradients_are_read_as_float16() -> None:
    raw: dict[str, Any] = {"zero_optimization": {"stage": 3, "zero_quantized_gradients": True}}
    (error,) = words(communication_contradictions(raw, GPU, dtype="bfloat16"))
    assert "as float16; got gradients in bfloat16" in error
    assert not words(communication_contradictions(raw, GPU, dtype="float16"))
    assert not words(communication_contradictions({**raw, "communication_data_type": "fp16"}, GPU, dtype="bfloat16"))


def test_quantised_weights_need_stage_3() -> None:
    raw = {"zero_optimization": {"stage": 2, "zero_quantized_weights": True}}
    (error,) = words(communication_contradictions(raw, GPU, dtype="bfloat16"))
    assert "needs ZeRO stage 3; got stage 2" in error


def test_mics_is_refused_with_the_reason() -> None:
    with pytest.raises(ConfigError, match="mics_shard_size: MiCS is no longer in DeepSpeed; delete it"):
        check_owned_keys({"zero_optimization": {"stage": 3, "mics_shard_size": 8}}, origin="mine.json")


def test_removed_keys_are_those_deepspeed_removed() -> None:
    from deepspeed.runtime.config import _REMOVED_ZERO_CONFIG_KEYS

    from seqaware.plan.zero_schema import REMOVED

    assert set(REMOVED) == set(_REMOVED_ZERO_CONFIG_KEYS)


def test_keys_of_aio_are_those_deepspeed_reads() -> None:
    from deepspeed.runtime.swap_tensor.aio_config import AIO_DEFAULT_DICT

    from seqaware.plan.zero_schema import AIO_VALUES

    assert set(AIO_VALUES) == set(AIO_DEFAULT_DICT)
    assert all(AIO_VALUES[name].takes(value) for name, value in AIO_DEFAULT_DICT.items())
    with pytest.raises(ConfigError, match=r"aio\.queue_dept: unknown key; did you mean queue_depth"):
        check_owned_keys({"aio": {"queue_dept": 8}}, origin="mine.json")


def test_two_runs_share_a_drive_but_no_folder(tmp_path: Path) -> None:
    zero = {"stage": 3, "offload_param": drive(tmp_path), "offload_optimizer": {"device": "cpu"}}
    (one,), (other,) = (swap_folders(with_own_swap_folder(zero, name)) for name in ("runs/one", "runs/other"))
    assert one != other
    assert one.parent == other.parent == tmp_path
    assert zero["offload_param"] == drive(tmp_path)
    assert swap_folders(with_own_swap_folder(zero, "runs/one")) == {one}


def test_a_drive_with_too_little_space_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    zero = with_own_swap_folder({"offload_param": drive(tmp_path), "offload_optimizer": drive(tmp_path)}, "run")
    # Half of the ranks are here: 16 bytes for each of 600 trained weights, 2 for each of 1000 weights.
    needed = (16 * 600 + 2 * 1000) // 2
    monkeypatch.setattr(shutil, "disk_usage", free(needed))
    check_swap_space(zero, SIZES, world=GPU)
    monkeypatch.setattr(shutil, "disk_usage", free(needed - 10))
    with pytest.raises(ConfigError) as caught:
        check_swap_space(zero, SIZES, world=GPU)
    assert f"{needed - 10:,} bytes free at {tmp_path}, about {needed:,} bytes needed" in str(caught.value)
    (folder,) = swap_folders(zero)
    folder.mkdir()
    (folder / "left.swp").write_bytes(bytes(10))
    check_swap_space(zero, SIZES, world=GPU)


def test_a_buffer_holds_a_share_of_the_largest_parameter(tmp_path: Path) -> None:
    def check(size: int) -> None:
        block = drive(tmp_path, buffer_size=size)
        check_swap_space(with_own_swap_folder({"offload_param": block}, "run"), SIZES, world=GPU)

    check(20)
    with pytest.raises(ConfigError, match="got 19 for 20 weights; write 20 or more"):
        check(19)
