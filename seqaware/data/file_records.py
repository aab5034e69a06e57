"""What the manifests of checkpoints and token stores have in common: file records, and names that stay in their folder.

A manifest comes with the data or the checkpoint, so anybody may have written it. A name in it that is absolute, climbs
with `..`, or goes through a link that leaves the folder would make us read, or overwrite, any file of the machine.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Annotated

from pydantic import Field, ValidationError

from seqaware.errors import DataError, SeqawareError

# Larger than any count of ours, small enough for int64 and for a file's size.
_LARGEST_COUNT = 2**53
_LONGEST_PROBLEM = 300
Count = Annotated[int, Field(strict=True, ge=0, le=_LARGEST_COUNT)]
Text = Annotated[str, Field(strict=True)]


@dataclass(frozen=True)
class FileRecord:
    """What was written into a file: its size in bytes and its SHA-256."""

    bytes: Count
    sha256: Annotated[Text, Field(pattern=r"^[0-9a-f]{64}$")]


def first_problem(error: ValidationError) -> str:
    """The first value of a manifest that is not what it must be, by its key."""
    first = error.errors(include_url=False, include_context=False)[0]
    more = f" ({error.error_count() - 1} more)" if error.error_count() > 1 else ""
    return f"{'.'.join(map(str, first['loc']))}: {first['msg']}"[:_LONGEST_PROBLEM] + more


def inside(folder: Path, name: str, *, error: type[SeqawareError] = DataError) -> Path:
    """The path of the file `name` of `folder`, which need not exist.

    Args:
        folder: may be a link itself, as /scratch often is.
        name: as a manifest has it, with / between folders.
        error: the kind that is raised, such as CheckpointError.

    Raises:
        SeqawareError: (of the kind `error`) the name is no text, empty, absolute, holds `..`, a backslash or a NUL, or
            leads out of the folder by a link.
    """
    reason = _refused(name)
    if reason is None:
        path = folder / name
        if _is_child(path, name):
            return path
        if not _resolved(path, name, error=error).is_relative_to(folder.resolve()):
            reason = "it leaves the folder by a symbolic link"
        else:
            return path
    raise error(
        f"a file named in the manifest of {folder} does not lie in that folder",
        got=f"{name!r}: {reason}",
        do="do not use this folder unless you know who made it; make or copy it again",
    )


def _is_child(path: Path, name: str) -> bool:
    """Whether the name is of a child that is no link: one system call, where resolving takes one for every folder."""
    try:
        return "/" not in name and not path.is_symlink()
    except OSError:
        return False


def _refused(name: object) -> str | None:
    """Why the name cannot be one of a file in a folder; None where it can."""
    if not isinstance(name, str) or name in ("", "."):
        return "it is not a file's name"
    if "\0" in name or "\\" in name:
        return "it holds a character that no name of ours has"
    pure = PurePosixPath(name)
    if pure.is_absolute():
        return "it is absolute"
    return "it climbs out of the folder" if ".." in pure.parts else None


def _resolved(path: Path, name: str, *, error: type[SeqawareError]) -> Path:
    try:
        return path.resolve()
    except (OSError, RuntimeError) as cause:  # links that go round in a circle; a name that is too long
        raise error(f"{path} cannot be followed", got=f"{name!r}: {cause}") from cause
