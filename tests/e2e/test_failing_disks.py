"""A disk that fills up, a folder that may only be read, data that vanishes: under a run of two ranks, ZeRO-3.

The file systems are real ones, mounted by the test, which root alone may do. Whatever happens, both ranks end alike and
in words, and the run that comes through, or is started again, is the run that nothing has happened to: bit for bit.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests import tiny
from tests.e2e.disturbed import BEYOND, STEPS, Launch, Told, weighted_rows

EVERY_STEP = {"output__save_every": 1, "output__keep_last": 2}
NO_SPACE, READ_ONLY = "No space left on device", "Read-only file system"


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Told]]:
    if os.geteuid() != 0:
        pytest.skip("mounting a small file system needs root")
    workshop = tiny.build(tmp_path_factory.mktemp("disks"))
    small, locked = workshop.folder / "small", workshop.folder / "locked"
    small.mkdir()
    locked.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", str(small)], check=True)
    try:
        yield _runs(workshop, small=small, locked=locked).start()
    finally:
        remounted = workshop.folder / "remounted" / "checkpoints"
        if remounted.is_mount():
            subprocess.run(["umount", str(remounted)], check=True)
        subprocess.run(["umount", str(small)], check=True)


def _runs(workshop: tiny.Workshop, *, small: Path, locked: Path) -> Launch:
    full, read_only = {"fill": str(small)}, {"lock": str(locked)}
    runs = Launch(workshop)
    runs.add("whole", "whole")
    runs.add("full for a while", "small/while", {"step": 3, **full, "undo": 5}, **EVERY_STEP)
    background = {**EVERY_STEP, "output__async_save": True}
    runs.add("full behind its back", "small/background", {"step": 3, **full, "undo": 5}, **background)
    for name, saving in (("full", EVERY_STEP), ("full, background", background)):
        runs.add(f"{name} to the end", f"small/{name}", {"step": 3, **full}, **saving)
        runs.add(f"{name}, then room", f"small/{name}", **saving)
    # The loss of a row that comes in the third step is beyond float32.
    poison = {"dataset__name": str(weighted_rows(workshop, "poison", place=1, weight=BEYOND))}
    runs.add("full, then not finite", "small/poison", {"step": 2, **full}, **background, **poison)
    at_export = {"step": STEPS, "phase": "exporting"}
    runs.add("full at the export", "small/export", {**at_export, **full})
    runs.add("after the export", "small/export")
    runs.add("read-only to the end", "locked/end", {"step": 3, **read_only}, **EVERY_STEP)
    runs.add("read-only no more", "locked/end", **EVERY_STEP)
    remount = {"step": 3, "remount": str(workshop.folder / "remounted" / "checkpoints"), "undo": 5}
    runs.add("remounted for a while", "remounted", remount, **EVERY_STEP)
    runs.add("read-only at the export", "locked/export", {**at_export, **read_only})
    runs.add("export, no more", "locked/export")
    gone = workshop.folder / "gone"
    gone.mkdir()
    rows, stores = gone / "rows.jsonl", gone / "stores"
    rows.write_bytes(workshop.rows.read_bytes())
    data = {"dataset__name": str(rows), "dataset__store_dir": str(stores)}
    runs.add("data vanishes", "vanished", {"step": 2, "remove": [str(rows), str(stores)]}, **data)
    runs.add("data is gone", "never", **data)
    stores = workshop.folder / "own stores"
    own = {"dataset__store_dir": str(stores)}
    runs.add("store vanishes", "store", {"step": 2, "remove": [str(stores)], "signal": "SIGTERM"}, **own)
    runs.add("store is made again", "store", **own)
    return runs


def _is_the_whole_run(run: Told, whole: Told) -> None:
    assert run.hows == ["trained", "trained"], run.endings[0]["text"]
    assert run.losses == whole.losses and list(run.losses) == list(range(1, STEPS + 1))
    expected, weights = (load_file(each.folder / "model" / "model.safetensors") for each in (whole, run))
    assert all(weights[name].equal(tensor) for name, tensor in expected.items())
    assert run.checkpoints()[-1] == STEPS
    assert not list((run.folder / "checkpoints").glob("*.partial"))


@pytest.mark.parametrize("name", ["full for a while", "full behind its back", "remounted for a while"])
def test_a_disk_that_is_full_for_a_while_costs_checkpoints_and_no_more(told: dict[str, Told], name: str) -> None:
    run = told[name]
    failed = [line["step"] for line in run.lines("save_failed")]
    # What is written in the background may meet the full disk a step later, or be through when there is room again.
    assert failed and set(failed) <= ({2, 3, 4} if name == "full behind its back" else {3, 4})
    warnings = [line for line in run.endings[0]["said"] if line.startswith("warning")]
    words = f"checkpoint of step {failed[0]} could not be written"
    why = READ_ONLY if name.startswith("remounted") else NO_SPACE
    assert any(words in line and why in line for line in warnings), warnings
    _is_the_whole_run(run, told["whole"])


@pytest.mark.parametrize("name", ["full", "full, background"])
def test_a_disk_that_stays_full_leaves_the_checkpoint_before(told: dict[str, Told], name: str) -> None:
    run = told[f"{name} to the end"]
    assert run.hows == ["CheckpointError", "CheckpointError"]
    saved = 2 if "it goes on from step 2" in run.endings[0]["text"] else 1
    assert name != "full" or saved == 2
    for ending in run.endings:
        assert f"the checkpoint of step {STEPS} could not be written" in ending["text"] and NO_SPACE in ending["text"]
        assert f"it goes on from step {saved}" in ending["text"]
    again = told[f"{name}, then room"]
    assert any(f"after step {saved}" in line for line in again.endings[0]["said"])
    _is_the_whole_run(again, told["whole"])


def test_a_folder_that_may_only_be_read_from_now_on(told: dict[str, Told]) -> None:
    run, again = told["read-only to the end"], told["read-only no more"]
    assert run.hows == ["CheckpointError", "CheckpointError"]
    assert all(READ_ONLY in ending["text"] and "goes on from step 2" in ending["text"] for ending in run.endings)
    assert any("after step 2" in line for line in again.endings[0]["said"])
    _is_the_whole_run(again, told["whole"])


def test_what_is_saved_is_named_though_later_steps_could_not_be(told: dict[str, Told]) -> None:
    run = told["full, then not finite"]
    assert run.hows == ["DivergenceError", "DivergenceError"]
    bad = max(run.losses) + 1
    saved = run.checkpoints()
    assert not saved or saved[-1] < bad - 1, "a step between the full disk and the bad one could not be saved"
    for ending in run.endings:
        assert f"step {bad} is not finite" in ending["text"]
        assert (f"step {saved[-1]}, the last good one that is" if saved else "nothing is saved") in ending["text"]


@pytest.mark.parametrize(
    ("name", "then", "why"),
    [("full at the export", "after the export", NO_SPACE), ("read-only at the export", "export, no more", READ_ONLY)],
)
def test_a_model_that_cannot_be_written_is_written_by_the_rerun(
    told: dict[str, Told], name: str, then: str, why: str
) -> None:
    run, again = told[name], told[then]
    assert run.hows == ["StorageError", "StorageError"]
    for ending in run.endings:
        assert (
            f"the model's folder {run.folder / 'model'} could not be written" in ending["text"]
            and why in ending["text"]
        )
    assert any(f"after step {STEPS}" in line for line in again.endings[0]["said"])
    _is_the_whole_run(again, told["whole"])


def test_data_that_vanishes_under_a_run_is_missed_by_the_next_one(told: dict[str, Told]) -> None:
    run, next_one = told["data vanishes"], told["data is gone"]
    assert not (run.folder.parent / "gone" / "rows.jsonl").exists()
    _is_the_whole_run(run, told["whole"])
    assert next_one.hows == ["DataError", "DataError"]
    assert all(f"{run.folder.parent / 'gone' / 'rows.jsonl'}" in ending["text"] for ending in next_one.endings)
    assert not next_one.folder.exists()


def test_a_store_that_vanishes_is_made_again(told: dict[str, Told]) -> None:
    assert told["store vanishes"].hows == ["left", "left"]
    again = told["store is made again"]
    assert any("after step 2" in line for line in again.endings[0]["said"])
    _is_the_whole_run(again, told["whole"])
