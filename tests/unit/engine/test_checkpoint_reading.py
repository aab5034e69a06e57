"""A checkpoint's file is data: whatever else a pickle asks for is refused, and not done."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from seqaware.engine.checkpoint.reading import read_tensors
from seqaware.engine.checkpoint.retention import Retention
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
