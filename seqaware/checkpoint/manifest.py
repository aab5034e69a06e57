"""A checkpoint's folder as anybody may read it, without torch: what is in it, whether it is whole, where its run stood.

    checkpoints/step-00000120/           what DeepSpeed writes, rng-<rank>.pt, and seqaware.json, written last
    checkpoints/latest                   the name of the newest complete one

A folder whose `seqaware.json` is missing or disagrees with the files is not a checkpoint, whatever its name. Which one
is the newest is told by the step, never by a clock: the hosts of a run may disagree about the time.
"""

from __future__ import annotations

import hashlib
import json
import re
import stat
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from seqaware.data.file_records import Count, FileRecord, Text, first_problem, inside
from seqaware.data.store.store_writer import sync_to_disk
from seqaware.errors import CheckpointError
from seqaware.files import MalformedError, read_json

if TYPE_CHECKING:
    from seqaware.plan.plan import Plan

MANIFEST = "seqaware.json"
LATEST = "latest"
FORMAT = "seqaware checkpoint"
FORMAT_VERSION = 2
PARTIAL = ".partial"
# A file of a checkpoint takes about 150 bytes here: room for 200,000 files.
_MANIFEST_BYTES = 32 * 2**20
_NAME = re.compile(r"step-(\d{8,})")
_SET_ASIDE = re.compile(r"abandoned-(\d{4,})-step-(\d{8,})")
_OWNER = re.compile(r"(?:zero_pp_rank_|rng-)(\d+)")
_PASSING = re.compile(r"(abandoned-\d{4,}-)?step-\d{8,}\.(partial|replaced|deleting)")


@dataclass(frozen=True)
class RunState:
    """Where a run stands after an optimizer step: enough to go on, because a step's examples follow from its number.

    Attributes:
        mathematics: `Plan.mathematics()`, with objective, data, tokenizer and schedule; plan_hash: its SHA-256.
        passed_over: steps whose update was left out, after a loss that was not finite or a spike.
    """

    step: int
    epoch: int
    data_fingerprint: str
    mathematics: Mapping[str, Any]
    plan_hash: str
    passed_over: tuple[int, ...] = ()

    @classmethod
    def of(cls, plan: Plan, *, step: int, epoch: int, passed_over: tuple[int, ...] = ()) -> RunState:
        """The state of a run of `plan` after `step`."""
        assert plan.data is not None, "a run knows its data"
        mathematics, plan_hash = plan.mathematics(), plan.mathematics_hash()
        return cls(step, epoch, plan.data.fingerprint, mathematics, plan_hash, passed_over)


class Topology(BaseModel):
    """The ranks and the ZeRO stage that wrote a checkpoint."""

    model_config = ConfigDict(frozen=True, extra="allow")

    ranks: Annotated[Count, Field(ge=1)]
    zero_stage: Annotated[Count, Field(le=3)]

    def is_of(self, ranks: int, *, zero_stage: int, dtype: str) -> bool:
        """Return whether DeepSpeed's own loader reads the files on this topology. Elsewhere they are resharded."""
        # ZeRO-1 and 2 write the same files; in bfloat16 DeepSpeed makes them from other classes.
        alike = {self.zero_stage, zero_stage} == {1, 2} and dtype != "bfloat16"
        return self.ranks == ranks and (self.zero_stage == zero_stage or alike)


class Manifest(BaseModel):
    """What `seqaware.json` holds. Its checksum detects accidents only: whoever edits a manifest can sign it again.

    Keys that are not named here are kept: they inform people, and nothing is computed from them.
    """

    model_config = ConfigDict(frozen=True, extra="allow")

    step: Count
    epoch: Count
    passed_over: tuple[Count, ...]
    data_fingerprint: Text
    plan_hash: Text
    mathematics: dict[str, Any]
    topology: Topology
    files: dict[str, FileRecord]
    checksum: Text


@dataclass(frozen=True)
class Listing:
    """A checkpoint whose manifest and file sizes are valid. Its hashes have not been compared."""

    path: Path
    manifest: Manifest

    @property
    def state(self) -> RunState:
        manifest = self.manifest
        return RunState(
            step=manifest.step,
            epoch=manifest.epoch,
            data_fingerprint=manifest.data_fingerprint,
            mathematics=manifest.mathematics,
            plan_hash=manifest.plan_hash,
            passed_over=manifest.passed_over,
        )

    def share(self, rank: int, *, size: int) -> list[str]:
        """The names of the files that `rank` of `size` compares: each file is in one share.

        What a rank has written is in the share of the same rank, which reads it anyway.
        """
        owners = ((name, _OWNER.search(name)) for name in sorted(self.manifest.files))
        return [
            name
            for number, (name, owner) in enumerate(owners)
            if (int(owner[1]) if owner is not None else number) % size == rank
        ]


@dataclass(frozen=True)
class Damage:
    """A folder with a checkpoint's name that is none, and what is wrong with it."""

    path: Path
    problem: str


@dataclass(frozen=True)
class Survey:
    """The checkpoints of a folder, by their manifests and sizes: whole ones and damaged ones, each newest first."""

    whole: tuple[Path, ...]
    damaged: tuple[Damage, ...]


def survey(folder: Path, trusted: Collection[Path] = ()) -> Survey:
    """Look through a run's `checkpoints` folder; one that is not there holds none.

    Args:
        trusted: checkpoints that this process has written or found valid; only their manifests are looked for.
    """
    whole, damaged = [], []
    for path in named_checkpoints(folder):
        known = path in trusted and (path / MANIFEST).is_file()
        problem = None if known else what_is_wrong(path)
        if problem is None:
            whole.append(path)
        else:
            damaged.append(Damage(path, problem))
    return Survey(tuple(whole), tuple(damaged))


def named_checkpoints(folder: Path) -> list[Path]:
    """The folders that have a checkpoint's name, valid or not, newest first."""
    return _named(folder, _NAME)


def checkpoint_name(step: int) -> str:
    return f"step-{step:08d}"


def step_of(path: Path) -> int:
    """The step in a checkpoint's name, also of one that was set aside."""
    return int(path.name.rpartition("-")[2])


def what_is_wrong(checkpoint: Path) -> str | None:
    """Why the folder is no complete checkpoint, in words that name the file; None where manifest and sizes agree."""
    found = inspect(checkpoint)
    return found if isinstance(found, str) else None


def inspect(checkpoint: Path) -> Listing | str:
    """Compare the manifest of a checkpoint with its files' sizes; returns the problem where they disagree.

    It stats every file. In a run rank 0 does it, and sends the listing to the other ranks.
    """
    try:
        manifest = read_manifest(checkpoint)
        if _NAME.fullmatch(checkpoint.name) and step_of(checkpoint) != manifest.step:
            return f"{MANIFEST} is that of step {manifest.step}"
        for name, record in manifest.files.items():
            status = inside(checkpoint, name, error=CheckpointError).stat()
            if not stat.S_ISREG(status.st_mode):  # a pipe would be waited for
                return f"{name} is not a regular file"
            if status.st_size != record.bytes:
                return f"{name} has {status.st_size:,} bytes instead of {record.bytes:,}"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except OSError as error:
        return f"{Path(error.filename or checkpoint).name} cannot be read ({error.strerror})"
    except CheckpointError as error:
        return str(error)
    return Listing(checkpoint, manifest)


def read_manifest(checkpoint: Path) -> Manifest:
    """The manifest of a checkpoint, checked by its own checksum and for the type of every value that is used.

    Raises:
        CheckpointError: it is damaged, or of another version of this program.
        OSError: it is not there, or cannot be read.
    """
    try:
        manifest = read_json(checkpoint / MANIFEST, limit=_MANIFEST_BYTES)
    except MalformedError as error:
        raise CheckpointError(f"{MANIFEST} is damaged: {error}") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise CheckpointError(f"{MANIFEST} is not a manifest of this program's checkpoints")
    if manifest.get("version") != FORMAT_VERSION:
        raise CheckpointError(
            f"{MANIFEST} is of another version", got=f"{manifest.get('version')}, this program reads {FORMAT_VERSION}"
        )
    if manifest.get("checksum") != _checksum(manifest):
        raise CheckpointError(f"{MANIFEST} is damaged: its checksum is another one")
    try:
        return Manifest.model_validate(manifest)
    except ValidationError as error:
        raise CheckpointError(f"{MANIFEST} is invalid: {first_problem(error)}") from error


def sealed(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """A manifest as it reads back from a file, with its checksum."""
    as_read: dict[str, Any] = json.loads(json.dumps({"format": FORMAT, "version": FORMAT_VERSION, **manifest}))
    return as_read | {"checksum": _checksum(as_read)}


def first_wrong_hash(listing: Listing, *, rank: int, size: int) -> str | None:
    """What is wrong with the first file of this rank's share whose bytes are not those that were written; or None."""
    for name in listing.share(rank, size=size):
        record = listing.manifest.files[name]
        try:
            with (listing.path / name).open("rb") as file:
                found = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            return f"{name} cannot be read ({error.strerror}) on rank {rank}"
        if found != record.sha256:
            return f"{name} is damaged: its SHA-256 is {found[:12]}… instead of {record.sha256[:12]}…"
    return None


def read_listing(checkpoint: Path) -> Listing:
    """The listing of a complete checkpoint.

    Raises:
        CheckpointError: it is not complete: which file, and what is wrong with it.
    """
    found = inspect(checkpoint)
    if isinstance(found, str):
        raise CheckpointError(
            "not a complete checkpoint", got=f"{checkpoint}, where {found}", do="name another, or write --resume auto"
        )
    return found


@contextmanager
def told_if_removed(checkpoint: Path) -> Iterator[None]:
    """Inside, a file that is gone becomes an error for a person: a run that goes on removes its older checkpoints.

    Raises:
        CheckpointError: the checkpoint has been removed, or a file of it.
    """
    try:
        yield
    except FileNotFoundError as error:
        got = checkpoint if not checkpoint.is_dir() else error.filename
        do = "name a newer one, or raise the run's output.keep_last; what a run keeps longer: output.keep_every"
        raise CheckpointError("the checkpoint was removed while it was being read", got=got, do=do) from error


def read_whole(checkpoint: Path) -> RunState:
    """The run's state in a checkpoint, every byte of which has been compared with what was written.

    Raises:
        CheckpointError: it is not complete, or damaged, or was removed meanwhile.
    """
    with told_if_removed(checkpoint):
        listing = read_listing(checkpoint)
        problem = first_wrong_hash(listing, rank=0, size=1)
        (checkpoint / MANIFEST).stat()  # fails where a run has deleted the checkpoint meanwhile
    if problem is not None:
        raise CheckpointError("the checkpoint is damaged", got=f"{checkpoint}: {problem}", do="name another")
    return listing.state


def set_aside(folder: Path) -> list[Path]:
    """The checkpoints that runs have left behind when they went back, the last ones first."""
    return sorted(_named(folder, _SET_ASIDE), key=lambda path: (set_aside_number(path), step_of(path)), reverse=True)


def write_durably(path: Path, text: str) -> None:
    """Replace a small file so that a crash leaves the old one or the new one, never a torn one."""
    partial = path.with_name(path.name + PARTIAL)
    partial.write_text(text, encoding="utf-8")
    sync_to_disk(partial)
    partial.replace(path)
    sync_to_disk(path.parent)


def _named(folder: Path, pattern: re.Pattern[str]) -> list[Path]:
    """The children whose whole name the pattern describes, the highest step first."""
    children = folder.iterdir() if folder.is_dir() else ()
    return sorted((child for child in children if pattern.fullmatch(child.name)), key=step_of, reverse=True)


def is_passing(name: str) -> bool:
    """Whether it is a checkpoint on its way in or out: whatever a crash leaves of one holds nothing that is needed."""
    return _PASSING.fullmatch(name) is not None


def set_aside_number(path: Path) -> int:
    match = _SET_ASIDE.fullmatch(path.name)
    assert match is not None
    return int(match[1])


def _checksum(manifest: Mapping[str, Any]) -> str:
    body = {key: value for key, value in manifest.items() if key != "checksum"}
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
