"""The folder of checkpoints: what is deleted, what is left alone, and what a run knows to lie in it."""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from seqaware.checkpoint import checkpointer as written
from seqaware.checkpoint import manifest as manifests
from seqaware.checkpoint.checkpointer import Checkpoints
from seqaware.checkpoint.manifest import (
    MANIFEST,
    checkpoint_name,
    read_listing,
    read_manifest,
    read_whole,
    sealed,
    survey,
)
from seqaware.checkpoint.retention import Retention, forget_old
from seqaware.errors import CheckpointError
from tests.fakes import checkpoint_folder

ALONE = SimpleNamespace(rank=0, size=1, is_first=True, gather=lambda value: [value], agree=lambda value: value)


def _checkpoint(folder: Path, step: int, name: str | None = None) -> Path:
    return checkpoint_folder(folder / (name or checkpoint_name(step)), step)


def test_a_checkpoint_that_is_a_link_goes_and_what_it_leads_to_stays(tmp_path: Path) -> None:
    folder, elsewhere = tmp_path / "checkpoints", tmp_path / "elsewhere"
    _checkpoint(elsewhere, 1)
    for step in (2, 3):
        _checkpoint(folder, step)
    (folder / checkpoint_name(1)).symlink_to(elsewhere / checkpoint_name(1))
    assert forget_old(folder, Retention(2), {}, trusted=set()) == []
    assert sorted(child.name for child in folder.iterdir()) == [checkpoint_name(2), checkpoint_name(3)]
    assert (elsewhere / checkpoint_name(1) / MANIFEST).is_file()


def test_only_checkpoints_that_were_on_their_way_are_swept(tmp_path: Path) -> None:
    passing = ["step-00000004.partial", "step-00000004.replaced", "abandoned-0001-step-00000002.deleting"]
    others = ["universal-4.partial", "mine.deleting"]
    for name in passing + others:
        (tmp_path / name).mkdir()
    assert forget_old(tmp_path, Retention(2), {}, trusted=set()) == []
    assert sorted(child.name for child in tmp_path.iterdir()) == sorted(others)


@pytest.mark.parametrize("name", ["step-00000004", "abandoned-0001-step-00000004"])
def test_only_a_checkpoint_under_its_own_name_is_known_to_be_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(written, "load_checkpoint", lambda engine, listing: None)
    checkpoint = _checkpoint(tmp_path, 4, name)
    engine: Any = SimpleNamespace(ranks=ALONE)
    checkpoints = Checkpoints(engine, tmp_path, keep=Retention(2))
    checkpoints.load(read_listing(checkpoint))
    # Else the run would not save this step again, and its rerun would not find it.
    assert checkpoints.complete == (4 if name == checkpoint_name(4) else None)


def test_a_checkpoint_that_its_run_removes_while_it_is_read_is_told_in_a_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "checkpoints"
    old, _ = _checkpoint(folder, 1), _checkpoint(folder, 2)
    look = manifests.inspect

    def look_and_lose(checkpoint: Path) -> manifests.Listing | str:
        monkeypatch.undo()
        found = look(checkpoint)
        forget_old(folder, Retention(1), {}, trusted=set())
        return found

    monkeypatch.setattr(manifests, "inspect", look_and_lose)
    with pytest.raises(CheckpointError, match=r"removed while it was being read.*step-00000001.*keep_last"):
        read_whole(old)


RECORD = {"bytes": 1, "sha256": "0" * 64}


@pytest.mark.parametrize(
    "changes",
    [
        {"step": "4"},
        {"step": -4},
        {"step": 10**30},
        {"step": True},
        {"step": None},
        {"epoch": 1.5},
        {"passed_over": 3},
        {"passed_over": [1, "2"]},
        {"data_fingerprint": ["x"]},
        {"plan_hash": None},
        {"mathematics": [1]},
        {"topology": {"ranks": 0, "zero_stage": 1}},
        {"topology": {"ranks": 1, "zero_stage": "1"}},
        {"topology": None},
        {"files": [1]},
        {"files": {"a": "x"}},
        {"files": {"a": {"bytes": 1}}},
        {"files": {"a": {**RECORD, "bytes": -1}}},
        {"files": {"a": {**RECORD, "sha256": "x"}}},
        {"files": {"a\0b": RECORD}},
        {"files": {"../../secret": RECORD}},
        {"files": {"/etc/passwd": RECORD}},
        {"files": {"pipe": {**RECORD, "bytes": 0}}},
        {"files": {"x" * 300: RECORD}},
    ],
    ids=lambda changes: repr(changes)[:60],
)
def test_a_signed_manifest_with_invalid_values_is_an_invalid_checkpoint_by_name(
    tmp_path: Path, changes: dict[str, Any]
) -> None:
    folder = tmp_path / "checkpoints"
    before, invalid = _checkpoint(folder, 3), checkpoint_folder(folder / checkpoint_name(4), 4, **changes)
    os.mkfifo(invalid / "pipe")
    found = survey(folder)
    assert found.whole == (before,)
    assert [damage.path for damage in found.damaged] == [invalid] and found.damaged[0].problem
    with pytest.raises(CheckpointError, match=r"step-00000004"):
        read_whole(invalid)


@pytest.mark.parametrize("key", ["step", "epoch", "passed_over", "plan_hash", "mathematics", "topology", "files"])
def test_a_signed_manifest_without_a_value_is_invalid(tmp_path: Path, key: str) -> None:
    path = _checkpoint(tmp_path, 4)
    manifest = json.loads((path / MANIFEST).read_text())
    (path / MANIFEST).write_text(json.dumps(sealed({k: v for k, v in manifest.items() if k not in (key, "checksum")})))
    with pytest.raises(CheckpointError, match=rf"seqaware.json is invalid: {key}: Field required"):
        read_manifest(path)


@pytest.mark.parametrize(
    "text", ["", "[" * 100_000, '{"a":' * 5000, "9" * 5000, "[]", '{"format": "\\ud800"}', "\udcff"]
)
def test_a_manifest_that_is_no_manifest_is_damaged(tmp_path: Path, text: str) -> None:
    path = _checkpoint(tmp_path, 4)
    (path / MANIFEST).write_text(text, errors="surrogateescape")
    assert survey(tmp_path).whole == ()
    with pytest.raises(CheckpointError, match=r"seqaware.json is (damaged|not a manifest)"):
        read_manifest(path)
