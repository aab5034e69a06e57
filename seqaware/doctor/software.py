"""Versions and builds: Python, the libraries, compilers. Read from metadata: nothing slow is imported."""

from __future__ import annotations

import platform
import re
import runpy
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from ctypes.util import find_library
from importlib import metadata, util
from pathlib import Path

from packaging.requirements import Requirement

from seqaware.doctor.findings import Finding, error, ok, warning
from seqaware.engine.versions import git_revision

_SHOWN = ("torch", "deepspeed", "transformers")
_PACKAGE = "seqaware"
_PROGRAM_SECONDS = 5


def program_line(*command: str) -> str | None:
    """The first line that a program says; None where it is missing, fails or hangs."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_PROGRAM_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    lines = done.stdout.strip().splitlines()
    return lines[0] if done.returncode == 0 and lines else None


def packages() -> Iterator[Finding]:
    """Python and every library that pyproject.toml asks for, against what is installed."""
    here = platform.python_version()
    try:
        own = metadata.metadata(_PACKAGE)
        wanted = [Requirement(line) for line in metadata.requires(_PACKAGE) or ()]
    except metadata.PackageNotFoundError:
        yield error(_PACKAGE, "not installed in this Python", "pip install -e . in the repository, or ./install.sh")
        return
    yield ok(_PACKAGE, f"{own['Version']}, revision {git_revision() or 'unknown'}")
    allowed = Requirement(f"python{own['Requires-Python'] or ''}")
    if allowed.specifier.contains(here, prereleases=True):
        yield ok("python", f"{here}, {sys.executable}")
    else:
        yield error("python", f"{here}; wanted: {allowed.specifier}", "make the environment anew with ./install.sh")
    yield from libraries([each for each in wanted if each.marker is None or each.marker.evaluate({"extra": ""})])


def libraries(wanted: list[Requirement]) -> Iterator[Finding]:
    """One line for each of the large ones and for each that does not fit, and one for all the others."""
    fitting = 0
    for requirement in wanted:
        name = requirement.name
        try:
            version = metadata.version(name)
        except metadata.PackageNotFoundError:
            yield error(name, f"not installed; wanted: {requirement.specifier}", "./install.sh")
            continue
        # A local build such as 2.13.0+cu130 is that version.
        if not requirement.specifier.contains(version.partition("+")[0], prereleases=True):
            do = f"pip install '{requirement.name}{requirement.specifier}', or ./install.sh"
            yield error(name, f"{version}; wanted: {requirement.specifier}", do)
        elif name == "torch":
            yield ok(name, f"{version}, {torch_build()}")
        elif name in _SHOWN:
            yield ok(name, version)
        else:
            fitting += 1
    if fitting:
        yield ok("libraries", f"{fitting} more, all of the versions that are asked for")


def torch_build() -> str:
    """What torch was built for, from its version file: torch itself takes seconds to import."""
    cuda = torch_cuda()
    return f"built for CUDA {cuda}" if cuda else "built for the CPU alone"


def torch_cuda() -> str | None:
    """The CUDA version that torch was built for; None for a build without."""
    found = util.find_spec("torch")
    if found is None or found.origin is None:
        return None
    version: Mapping[str, object] = runpy.run_path(str(Path(found.origin).parent / "version.py"))
    return str(version["cuda"]) if version.get("cuda") else None


def compilers(*, nvme: bool) -> Iterator[Finding]:
    """What DeepSpeed's operators are built with.

    Args:
        nvme: the config offloads to a drive.
    """
    compiler = program_line("c++", "--version") or program_line("g++", "--version")
    do = "apt-get install g++, or load the compiler's module; not needed for operators that are built already"
    yield ok("compiler", compiler) if compiler else warning("compiler", "no c++ and no g++ is found", do)
    ninja = program_line("ninja", "--version")
    if ninja:
        yield ok("ninja", f"{ninja}, {shutil.which('ninja')}")
    else:
        yield warning("ninja", "not found, so no operator can be built", "pip install ninja")
    if nvme:
        library = find_library("aio")
        do = "apt-get install libaio-dev"
        yield ok("libaio", library) if library else error("libaio", "missing; offloading to nvme needs it", do)


def cuda_compiler(*, torch_cuda: str | None) -> Iterator[Finding]:
    """nvcc, where torch is built for CUDA: operators for GPUs need it, of the same major version."""
    if torch_cuda is None:
        return
    said = program_line("nvcc", "--version") and _nvcc_release()
    if said is None:
        do = "load the CUDA module if fused_adam, lion or ZeRO++ is wanted; nothing else needs it"
        yield warning("nvcc", "not found: operators for GPUs cannot be built", do)
    elif said.partition(".")[0] != torch_cuda.partition(".")[0]:
        yield warning("nvcc", f"CUDA {said}, torch is built for {torch_cuda}", f"load CUDA {torch_cuda}")
    else:
        yield ok("nvcc", f"CUDA {said}")


def _nvcc_release() -> str | None:
    done = subprocess.run(["nvcc", "--version"], capture_output=True, text=True, timeout=_PROGRAM_SECONDS, check=False)
    match = re.search(r"release (\d+\.\d+)", done.stdout)
    return match[1] if match else None
