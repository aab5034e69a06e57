"""What computes a run: the versions of Python and the libraries, and this program's own revision."""

from __future__ import annotations

import subprocess
import sys
from importlib import metadata
from pathlib import Path

_VERSIONS_OF = ("torch", "deepspeed", "transformers", "peft", "datasets", "numpy", "numba", "pydantic")


def versions() -> dict[str, str]:
    """The versions of Python and of the libraries that decide what a run computes."""
    return {"python": sys.version.split()[0], **{name: metadata.version(name) for name in _VERSIONS_OF}}


def git_revision() -> str | None:
    """The revision of the source tree this package runs from, if it is one."""
    here = Path(__file__).parent
    answer = subprocess.run(["git", "-C", str(here), "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    return answer.stdout.strip() or None
