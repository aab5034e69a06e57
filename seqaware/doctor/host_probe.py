"""What one host tells about itself. Of the standard library alone: ssh sends this file to hosts that may have no more.

    python - '{"packages": ["torch"], "note": "/runs/x/.doctor/note", "address": "10.0.0.1", "port": 29500}' < probe.py

Prints one line, MARK and a report as JSON; whatever else a login shell prints stands on other lines.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import platform
import socket
import subprocess
import sys
import time
from importlib import metadata, util
from pathlib import Path
from typing import Any

MARK = "seqaware-doctor "
_REACH_SECONDS = 3.0
_SMI_SECONDS = 15


def report(asked: dict[str, Any]) -> dict[str, Any]:
    """This host's name, versions, program, GPUs, and what it sees of the others.

    Args:
        asked: `packages` whose versions are wanted; `note`, a file that the asking host has written and holds the lock
            of; `address` and `port` where it listens, or no port.
    """
    told: dict[str, Any] = {
        "host": socket.gethostname(),
        "versions": {"python": platform.python_version(), **{name: version_of(name) for name in asked["packages"]}},
        "program": program_digest(),
        "gpus": gpus_here(),
        **read_note(Path(asked["note"])),
    }
    if asked.get("port"):
        told["unreachable"] = why_unreachable(asked["address"], asked["port"])
    return {**told, "time": time.time()}  # last: it is compared with the moment at which the answer came


def version_of(package: str) -> str:
    """The installed version."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def program_digest() -> str:
    """SHA-256 of all sources of the seqaware that this Python imports, shortened."""
    found = util.find_spec("seqaware")
    if found is None or found.origin is None:
        return "not installed"
    digest = hashlib.sha256()
    folder = Path(found.origin).parent
    for file in sorted(folder.rglob("*.py")):
        digest.update(file.relative_to(folder).as_posix().encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()[:12]


def gpus_here() -> int:
    """How many GPUs nvidia-smi lists; 0 without it."""
    try:
        said = subprocess.run(
            ["nvidia-smi", "-L"], capture_output=True, text=True, timeout=_SMI_SECONDS, check=False
        ).stdout
    except (OSError, subprocess.TimeoutExpired):
        return 0
    return sum(line.startswith("GPU ") for line in said.splitlines())


def read_note(note: Path) -> dict[str, Any]:
    """What stands in the note (None if it cannot be read, and why), and whether its lock is seen to be held."""
    try:
        with note.open() as file:
            text = file.read()
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                return {"note": text, "lock_is_seen": True}
            return {"note": text, "lock_is_seen": False}
    except OSError as trouble:
        return {"note": None, "note_trouble": trouble.strerror or str(trouble), "lock_is_seen": False}


def why_unreachable(address: str, port: int) -> str | None:
    """None if something answers there, else why not."""
    try:
        with socket.create_connection((address, port), timeout=_REACH_SECONDS):
            return None
    except OSError as trouble:
        return trouble.strerror or str(trouble)


if __name__ == "__main__":
    print(MARK + json.dumps(report(json.loads(sys.argv[1]))))
