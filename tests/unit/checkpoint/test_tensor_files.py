"""A checkpoint's file is data: whatever else a pickle asks for is refused, and not done."""

from __future__ import annotations

import os
import zipfile
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed.utils.tensor_fragment import fragment_address

from seqaware.checkpoint.retention import Retention
from seqaware.checkpoint.shards import Shards
from seqaware.checkpoint.tensor_files import read_tensors
from seqaware.errors import CheckpointError


class Planted:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self.target,)


def test_a_planted_pickle_is_refused_and_not_run(tmp_path: Path) -> None:
    torch.save({"module": torch.zeros(2), "extra": Planted(tmp_path / "ran")}, tmp_path / "state.pt")
    with pytest.raises(CheckpointError, match=r"more than data.*state\.pt"):
        read_tensors(tmp_path / "state.pt")
    assert not (tmp_path / "ran").exists()
    torch.load(tmp_path / "state.pt", weights_only=False)
    assert (tmp_path / "ran").exists(), "the pickle is a working one"


def test_what_a_checkpoint_holds_is_read(tmp_path: Path) -> None:
    torch.save({"a": torch.arange(3), "b": [1, "two", None]}, tmp_path / "state.pt")
    content = read_tensors(tmp_path / "state.pt")
    assert content["a"].tolist() == [0, 1, 2] and content["b"] == [1, "two", None]


@pytest.mark.parametrize(
    ("keep", "losses", "kept"),
    [
        (Retention(2), {}, {5, 6}),
        (Retention(1, keep_every=2), {}, {2, 4, 6}),
        (Retention(1, keep_best=2), {1: 0.5, 2: 0.4, 3: 0.4, 9: 0.1}, {2, 3, 6}),
        (Retention(3, keep_every=3, keep_best=1), {1: 0.1}, {1, 3, 4, 5, 6}),
    ],
)
def test_which_checkpoints_are_kept(keep: Retention, losses: dict[int, float], kept: set[int]) -> None:
    assert keep.kept(range(1, 7), losses) == kept


def test_a_step_is_worth_saving_while_fewer_than_the_best_are_saved() -> None:
    keep = Retention(1, keep_best=2)
    losses = {2: 0.9, 4: 0.5, 6: 0.7, 8: 0.8}
    assert keep.best({2, 4, 6}, losses) == {4, 6}
    assert 8 not in keep.best({4, 6, 8}, losses)
    assert 8 in keep.best({4, 8}, losses), "step 6 could not be saved"
    assert Retention(1).best({4}, losses) == set()


def _shared(levels: int) -> object:
    value: object = torch.zeros(1)
    for _ in range(levels):
        value = (value, value)
    return value


def _circle() -> list[object]:
    value: list[object] = []
    value.append(value)
    return value


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"a": _shared(30)}, "more than 2,000,000 values"),
        ({"a": _circle()}, "more than 32 levels"),
        ({"a": torch.zeros(1).expand(10**12)}, "a tensor of 1,000,000,000,000 elements over a storage of 4 bytes"),
        ({"a": torch.zeros(2, 2).to_sparse()}, "another layout|cannot be read"),
        ([1, 2], "holds no table"),
    ],
)
def test_a_table_that_takes_too_much_is_refused(tmp_path: Path, content: object, said: str) -> None:
    torch.save(content, tmp_path / "state.pt")
    with pytest.raises(CheckpointError, match=rf"state\.pt: {said}|{said}.*state\.pt"):
        read_tensors(tmp_path / "state.pt")


def test_archives_that_torch_does_not_write_are_refused(tmp_path: Path) -> None:
    torch.save({"a": torch.arange(3)}, tmp_path / "state.pt")
    with zipfile.ZipFile(tmp_path / "state.pt") as archive:
        entries = {entry.filename: archive.read(entry) for entry in archive.infolist()}
    with zipfile.ZipFile(tmp_path / "small.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in entries.items():
            archive.writestr(name, content)
    torch.save({"a": torch.arange(3)}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    os.mkfifo(tmp_path / "pipe.pt")
    for name, said in (
        ("small", "compressed"),
        ("old", "not a zip"),
        ("pipe", "no such file"),
        ("none", "no such file"),
    ):
        with pytest.raises(CheckpointError, match=rf"cannot be read.*{name}\.pt.*{said}"):
            read_tensors(tmp_path / f"{name}.pt")


def test_a_damaged_table_is_a_clear_error(tmp_path: Path) -> None:
    """Of every byte of the table; some changes leave one that reads as well."""
    torch.save({"a": torch.arange(3), "b": [1, "two", None, 2.5, {"c": (True,)}]}, tmp_path / "state.pt")
    content = (tmp_path / "state.pt").read_bytes()
    begin = content.index(b"PK", 4) if b"data.pkl" not in content[:200] else content.index(b"data.pkl")
    refused = 0
    for place in range(begin, begin + 400):
        for flip in (0x01, 0x80):
            (tmp_path / "state.pt").write_bytes(content[:place] + bytes([content[place] ^ flip]) + content[place + 1 :])
            with suppress(CheckpointError):
                read_tensors(tmp_path / "state.pt")
                continue
            refused += 1
    assert refused > 300


@pytest.mark.parametrize(
    "change",
    [
        {"fp32": torch.zeros(3)},
        {"fp32": None},
        {"fp32": [1]},
        {"exp_avg": torch.zeros(7)},
        {"exp_avg": "x"},
        {"state": 3},
        {"state": [{"step": "x"}]},
        {"loss_scaler": 1},
        {"groups": "x"},
    ],
    ids=repr,
)
def test_a_universal_checkpoint_of_other_contents_is_a_clear_error(tmp_path: Path, change: dict[str, Any]) -> None:
    folder = tmp_path / "zero" / "w"
    folder.mkdir(parents=True)
    torch.save({"module": {}, "buffer_names": []}, tmp_path / "mp_rank_00_model_states.pt")
    common = {
        "loss_scaler": None,
        "param_groups": change.get("groups", [{}]),
        "optimizer_state_dict": {"state": change.get("state", [{"step": 1}])},
    }
    if change.keys() & {"groups", "loss_scaler"}:
        common.pop("param_groups")
    torch.save(common, tmp_path / "zero" / "optimizer_state.pt")
    for name in ("fp32", "exp_avg"):
        torch.save({"param": change.get(name, torch.zeros(2, 3))}, folder / f"{name}.pt")
    with pytest.raises(CheckpointError):
        shards = Shards(tmp_path)
        shards.check({"w": torch.Size([2, 3])})
        for key in shards.keys("w"):
            shards.read("w", key)


@pytest.mark.parametrize(
    ("mapping", "step", "said"), [({}, 1, "no file holds a piece of w"), (None, [1], "w holds more than numbers")]
)
def test_a_shard_without_a_parameter_or_with_other_counts_is_a_clear_error(
    tmp_path: Path, mapping: dict[str, Any] | None, step: Any, said: str
) -> None:
    optimizer = {"state": {0: {"exp_avg": torch.zeros(6), "step": step}}, "param_groups": [{}]}
    shard = {
        "single_partition_of_fp32_groups": [torch.zeros(6)],
        "param_slice_mappings": [{"w": fragment_address(numel=6, start=0)} if mapping is None else mapping],
        "group_paddings": [0],
        "base_optimizer_state": optimizer,
        "partition_count": 1,
    }
    torch.save({"module": {}, "param_shapes": [{"w": [2, 3]}]}, tmp_path / "mp_rank_00_model_states.pt")
    torch.save({"optimizer_state_dict": shard}, tmp_path / "zero_pp_rank_0_mp_rank_00_optim_states.pt")
    with pytest.raises(CheckpointError, match=said):
        Shards(tmp_path)
