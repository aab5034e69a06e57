"""What a rank says of a checkpoint that it could not write."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch

from seqaware.checkpoint.writer import Share


@pytest.mark.parametrize("at_once", [True, False])
def test_a_full_disk_is_told_as_the_disk_has_said_it_and_leaves_no_file(tmp_path: Path, at_once: bool) -> None:
    (tmp_path / "full.pt").symlink_to("/dev/full")
    share = Share(tmp_path, rank=3, at_once=at_once, stop=threading.Event())
    for name in ("whole.pt", "full.pt"):
        share.take(name, {"weights": torch.zeros(100_000)})
    vote = share.vote()
    assert vote.problem is not None and "rank 3" in vote.problem and "No space left on device" in vote.problem
    assert vote.files == {} and list(tmp_path.iterdir()) == []
