"""Names of files that were read from a manifest: they may name what lies in their folder, and nothing else.

A manifest comes with the data or the checkpoint, so anybody may have written it. A name in it that is absolute, climbs
with `..`, or goes through a link that leaves the folder would make us read, or overwrite, any file of the machine.
"""

from __future__ import annotations

from pathlib import Path, PurePosixPath

from seqaware.errors import DataError, SeqawareError


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
        if not _resolved(path, name, error=error).is_relative_to(folder.resolve()):
            reason = "it leaves the folder by a symbolic link"
        else:
            return path
    raise error(
        f"a file named in the manifest of {folder} does not lie in that folder",
        got=f"{name!r}: {reason}",
        do="do not use this folder unless you know who made it; make or copy it again",
    )


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
