"""Hostile manifests of checkpoints and token stores, signed again, and hostile files beside them."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import launcher.plan
import launcher.train
from seqaware.checkpoint.manifest import (
    MANIFEST,
    Listing,
    RunState,
    first_wrong_hash,
    inspect,
    read_whole,
    sealed,
    set_aside,
    survey,
)
from seqaware.checkpoint.retention import Evaluations, Retention, forget_old, set_aside_later
from seqaware.data.batch_loader import RowFormat, rank_batches
from seqaware.data.store.store_format import MANIFEST as STORE_MANIFEST
from seqaware.data.store.store_format import manifest_checksum
from seqaware.data.store.token_store import Counted, TokenStore
from seqaware.distributed.launch_environment import LaunchEnvironment
from seqaware.training.resume import ResumeRequest, resume_points, unrecorded
from seqaware.training.run_directory import (
    RunDirectory,
    allowed_before,
    attempts_before,
    check_claim,
    claim,
    is_finished,
)
from tests.fakes import checkpoint_folder
from tests.fuzz import hostile
from tests.fuzz.bounds import corpus, ends_well, fuzzed, refuses_clearly
from tests.unit.data.store.test_token_store import document, write
from tests.unit.plan.test_plan import plan

PLAN = plan()
STATE = RunState.of(PLAN, step=3, epoch=0)
NAMES = st.sampled_from(
    [
        *("a.bin", "../x", "/etc/passwd", "/dev/zero", "..", ".", "", "a\0b", "a\\b", "x" * 300, "x/" * 3000, "pipe"),
        *("folder", "\ud800", "\x1b[2J", "config.yaml", "seqaware.json", "tokens.bin", "loop", "rng-99999.pt"),
        *("zero_pp_rank_" + "9" * 200, "rng-" + "9" * 5000),
    ]
)
RECORDS = st.one_of(
    hostile.values,
    st.fixed_dictionaries({"bytes": hostile.values, "sha256": st.sampled_from(["0" * 64, "x", None, "A" * 64])}),
)
FILES = st.dictionaries(NAMES, RECORDS, max_size=3)
MATHEMATICS = sorted(STATE.mathematics)
CHECKPOINT_KEYS = [
    *("step", "epoch", "passed_over", "data_fingerprint", "plan_hash", "topology", "format", "version", "zzz", ""),
    *("topology.ranks", "topology.zero_stage", "mathematics", "mathematics.zzz", "mathematics.optimizer.type"),
    *("mathematics.schedule.total_steps", "mathematics.objective.weighting_source", "mathematics.model.dtype"),
    *(f"mathematics.{name}" for name in MATHEMATICS),
]
RUN_KEYS = [
    *("mathematics", "attempts", "goes_on_from", "finished_steps", "mathematics.objective", "mathematics.seed", "zzz"),
    "mathematics.schedule.total_steps",
]
ATTEMPTS = st.lists(st.fixed_dictionaries({"asked": hostile.values | st.just({"resume": "auto", "start": []})}))
Changes = list[tuple[str, Any]]


def edits(keys: list[str], *special: st.SearchStrategy[tuple[str, Any]]) -> st.SearchStrategy[Changes]:
    one = st.tuples(st.sampled_from(keys), hostile.values | st.sampled_from([[[0]] * 3000, "x" * 10**6, [2**53, -1]]))
    return st.lists(st.one_of(one, one, *special), min_size=1, max_size=3)


def empty(folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def sign(path: Path, manifest: dict[str, Any]) -> None:
    """Write a checkpoint's manifest with a checksum that is right, whatever it holds."""
    body = {key: value for key, value in manifest.items() if key != "checksum"}
    text = json.dumps({**sealed(body), **body, "checksum": ""})
    loaded = json.loads(text)
    checksum = hashlib.sha256(
        json.dumps({k: v for k, v in loaded.items() if k != "checksum"}, sort_keys=True).encode()
    ).hexdigest()
    path.write_text(json.dumps(loaded | {"checksum": checksum}))


def resume(run: Path) -> None:
    """What `--resume auto` reads of a run's folder before it needs ranks, and how it clears the folder up."""
    folder = RunDirectory(run)
    check_claim(folder, PLAN, resume="auto")
    is_finished(folder, PLAN)
    ResumeRequest("auto", "job", 1).now(attempts_before(folder))
    points = resume_points(folder.checkpoints, PLAN, resume="auto", allowed=allowed_before(folder))
    for path in points.older:
        inspect(path)
    state = None
    if points.newest is not None:
        first_wrong_hash(points.newest, rank=0, size=1)
        state = points.newest.state
        unrecorded(state, PLAN)
    claim(folder, PLAN, address=LaunchEnvironment(0, 1, 0, 1, 1, "none", "localhost", 1), resumed=state)
    set_aside_later(folder.checkpoints, 0 if state is None else state.step)
    set_aside(folder.checkpoints)
    forget_old(folder.checkpoints, Retention(1), Evaluations(folder.checkpoints).losses, trusted=set())


@fuzzed("manifests")
@given(
    changes=edits(CHECKPOINT_KEYS, FILES.map(lambda files: ("files", files))),
    run=edits(RUN_KEYS, ATTEMPTS.map(lambda attempts: ("attempts", attempts))) | st.just([]),
    losses=hostile.values | st.dictionaries(st.sampled_from(["3", "-1", "x", "9" * 5000, "nan"]), hostile.scalars),
    damage=st.sampled_from([None, None, None, "[" * 5000, "\ud800", "{}", '{"a":' * 99, "9" * 5000]),
)
def test_hostile_manifests_end_a_resume_well(
    place: Path, changes: Changes, run: Changes, losses: Any, damage: str | None
) -> None:
    folder = empty(place / "run")
    recorded = {"mathematics": STATE.mathematics, "plan_hash": STATE.plan_hash}
    older, newer = (checkpoint_folder(folder / "checkpoints" / f"step-0000000{n}", n, **recorded) for n in (2, 3))
    (newer / "loop").symlink_to("loop")
    (newer / "folder").mkdir()
    os.mkfifo(newer / "pipe")
    sign(newer / MANIFEST, hostile.mutated(json.loads((newer / MANIFEST).read_text()), changes))
    if damage is not None:
        (older / MANIFEST).write_bytes(damage.encode("utf-8", "surrogatepass"))
    manifest = {"mathematics": STATE.mathematics, "attempts": [{"asked": asdict(ResumeRequest("auto", "job"))}]}
    (folder / "manifest.json").write_text(json.dumps(hostile.mutated(manifest, run)))
    (folder / "checkpoints" / "evaluations.json").write_text(json.dumps(losses))
    refuses_clearly(lambda: read_whole(newer))
    refuses_clearly(lambda: resume(folder))
    assert all(isinstance(inspect(path), Listing) for path in survey(folder / "checkpoints").whole)


STORE_KEYS = [
    *("fingerprint", "identity", "identity.tokenizer", "token_dtype", "facts", "names", "files", "format", "version"),
    *(f"facts.{name}" for name in ("documents", "tokens", "supervised_tokens", "longest", "dropped", "truncated")),
    *(f"facts.{name}" for name in ("fingerprint", "parts", "records", "split", "max_seq_length", "vocab_size")),
    *("facts.eos_id", "dropped_first", "zzz"),
]
NAMED = st.sampled_from([[[0, "a"]], [[0, "a"], [1, "\x1b[2J"]], [[1, "a"]], [[0, "a"], [0, "b"]], [[0, "x" * 10**6]]])
# Files of a store as arrays, and values that they were not made for.
ARRAYS = {
    "tokens.bin": np.uint16,
    "supervised.bin": np.uint8,
    "turn_start.bin": np.uint8,
    "weights.bin": np.float32,
    "offsets.bin": np.int64,
    "lengths.bin": np.int32,
    "totals.bin": np.int32,
    "counted.bin": np.int32,
    "rows.bin": np.int64,
}
NUMBERS = st.sampled_from([-(2**63), -(2**31), -1, 0, 1, 2, 3, 5, 8, 255, 299, 300, 65535, 2**31 - 1, 2**40, 2**63 - 1])
WRITTEN = st.lists(
    st.tuples(
        st.sampled_from([*ARRAYS, "offsets.bin", "counted.bin"]),
        st.integers(0, 40),
        NUMBERS | st.sampled_from([float("nan"), float("inf"), -0.5, 1e38]),
    ),
    max_size=4,
)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with weights and a piece of a document that was split."""
    split = Counted(3, 7, 2, 9, 20, 5, 6)
    documents = [document(5), document(6, seed=1), document(7, seed=2, weighted=True, counted=split), document(3)]
    return write(tmp_path_factory.mktemp("written") / "store", documents)


# Of the demo, as many steps as a small store has.
SHORT_RUN = [
    *("train_configs/demo.yaml", "--set=dataset.name=store", "--set=training.schedule.warmup_steps=0"),
    "--set=training.schedule.global_batch_size=2",
]


def use(path: Path) -> None:
    """Read a store as a run does; nothing may be wrong with one that was verified."""
    opened = TokenStore.open(path)
    opened.verify_once()
    ids = np.arange(len(opened))
    opened.documents(ids)
    for positions in ("supervised", "sequence", "turn"):
        rows = RowFormat(128, packed=True, positions=positions, on_split="continue", pad_id=0)
        rank_batches(opened, ids, rows=rows, rank=0, size=2)
    for index in range(len(opened)):
        opened.document(index)
        opened.name(index)
    for block in opened.blocks():
        assert len(block.tokens) == block.lengths.sum()


def put(values: np.ndarray, at: int, value: float) -> None:
    with np.errstate(all="ignore"):
        values[at % len(values)] = np.array([value]).astype(values.dtype)[0]


def change_store(path: Path, written: list[tuple[str, int, float]], changes: Changes, *, cut: str | None) -> None:
    """Put values into a store's files, cut one off, and sign the manifest again."""
    manifest = json.loads((path / STORE_MANIFEST).read_text())
    for name, at, value in written:
        values = np.fromfile(path / name, dtype=ARRAYS[name])
        put(values, at, value)
        values.tofile(path / name)
    if cut is not None:
        (path / cut).write_bytes((path / cut).read_bytes()[:-1])
    for name in ARRAYS:
        content = (path / name).read_bytes()
        manifest["files"][name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    manifest = json.loads(json.dumps(hostile.mutated(manifest, changes)))
    (path / STORE_MANIFEST).write_text(json.dumps(manifest | {"checksum": manifest_checksum(manifest)}))


@fuzzed("stores")
@given(
    written=WRITTEN,
    changes=edits(STORE_KEYS, NAMED.map(lambda names: ("names", names)), FILES.map(lambda files: ("files", files)))
    | st.just([]),
    cut=st.none() | st.none() | st.sampled_from(list(ARRAYS)),
)
def test_a_hostile_store_is_read_or_refused(
    place: Path, store: Path, written: list[tuple[str, int, float]], changes: Changes, cut: str | None
) -> None:
    path = place / "store"
    shutil.rmtree(path, ignore_errors=True)
    shutil.copytree(store, path)
    change_store(path, written, changes, cut=cut)
    refuses_clearly(lambda: use(path))
    ends_well(launcher.train.app, [*SHORT_RUN, "--dry-run"])
    ends_well(launcher.plan.app, [*SHORT_RUN, "--gpus=2"])


@pytest.mark.parametrize("changes", [None, *corpus("stores")], ids=lambda path: path.stem if path else "as written")
def test_stores_that_once_failed(place: Path, store: Path, changes: Path | None) -> None:
    """A plan lays documents out without reading their tokens; the store as it was written is planned and read."""
    path = place / "store"
    shutil.rmtree(path, ignore_errors=True)
    shutil.copytree(store, path)
    change_store(path, [] if changes is None else json.loads(changes.read_text()), [], cut=None)
    assert refuses_clearly(lambda: use(path)) == (changes is None)
    for shown in (
        ends_well(launcher.train.app, [*SHORT_RUN, "--dry-run"]),
        ends_well(launcher.plan.app, [*SHORT_RUN, "--gpus=2"]),
    ):
        assert ("is corrupt" in shown) == ("error: " in shown) == (changes is not None), shown
