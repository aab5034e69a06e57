"""Where compiled operators are kept: one folder per environment, whatever the environment's path.

torch keeps a build.ninja beside each operator, whose commands hold the absolute paths of the installed packages: ninja
builds it again for each virtual environment. Here an operator counts as built if its sources, its flags and the
compiler are those it was built with; the versions and the CPU are in the folder's name.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import subprocess
import sys
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from seqaware.compat.build_lock import KernelLock, listener

_PACKAGES = ("torch", "deepspeed")


def operators_folder(variables: Mapping[str, str]) -> Path | None:
    """The folder for the operators of this environment; None if torch's default has to do. Imports without torch.

    Args:
        variables: the process's.
    """
    for folder in (_caches(variables), Path(sys.prefix)):
        if folder is not None and folder.is_absolute() and _can_be_written(folder):
            return folder / "seqaware" / "operators" / _environment()
    return None


def _caches(variables: Mapping[str, str]) -> Path | None:
    try:
        return Path(variables.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except RuntimeError:
        return None  # a user without a home


def _can_be_written(folder: Path) -> bool:
    there = next(each for each in (folder, *folder.parents) if each.exists())
    return os.access(there, os.W_OK)


def _environment() -> str:
    """What a compiled operator depends on besides its sources, its flags and the compiler."""
    names = [f"{package}-{_version(package)}" for package in _PACKAGES]
    # DeepSpeed compiles for the processor at hand (-march=native): another one may lack its instructions.
    details = (platform.machine(), platform.libc_ver(), _cpu_features())
    return "-".join([*names, str(sys.implementation.cache_tag), _digest(details)[:12]])


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"


def _cpu_features() -> str:
    try:
        with Path("/proc/cpuinfo").open(encoding="utf-8", errors="replace") as lines:
            return next((line for line in lines if line.startswith(("flags", "Features"))), "")
    except OSError:
        return ""


def build_each_once() -> None:
    """Let torch build operators in this process under `KernelLock`, and DeepSpeed's only if they are not built yet."""
    from torch.utils import cpp_extension

    modules: Any = cpp_extension
    modules.FileBaton = _lock_beside
    if getattr(modules._write_ninja_file_and_build_library, "seqaware", False):
        return
    build = modules._write_ninja_file_and_build_library

    def build_once(**wanted: Any) -> None:
        # What else torch builds may have headers of the user's own: ninja knows them.
        _build_once(build, wanted) if _is_deepspeeds(wanted["sources"]) else _say_and_build(build, wanted)

    build_once.seqaware = True  # type: ignore[attr-defined]
    modules._write_ninja_file_and_build_library = build_once


def _lock_beside(lock_file_path: str, wait_seconds: float = 0.1) -> KernelLock:
    """In a file of its own: a process with torch's lock in the same folder removes that file, and fails if it is gone.

    Args: those of torch's FileBaton.
    """
    return KernelLock(str(Path(lock_file_path).with_name("build.lock")), wait_seconds)


def _is_deepspeeds(sources: list[str]) -> bool:
    return all(f"{os.sep}deepspeed{os.sep}" in source for source in sources)


def _build_once(build: Any, wanted: dict[str, Any]) -> None:
    folder = Path(wanted["build_directory"])
    library, record = folder / f"{wanted['name']}.so", folder / f"{wanted['name']}.built"
    inputs = _digest(_inputs(wanted))
    if library.exists() and record.exists() and record.read_bytes() == inputs.encode():
        return
    record.unlink(missing_ok=True)
    listener().builds(f"compiling DeepSpeed's {wanted['name']} operator (once, about 2 min)")
    build(**wanted)
    record.write_text(inputs, encoding="ascii")


def _say_and_build(build: Any, wanted: dict[str, Any]) -> None:
    if not Path(wanted["build_directory"], f"{wanted['name']}.so").exists():
        listener().builds(f"compiling the operator {wanted['name']} (once)")
    build(**wanted)


def _inputs(wanted: dict[str, Any]) -> dict[str, Any]:
    """What decides the operator. Headers and libraries belong to the packages, whose versions are known."""
    from torch.utils import cpp_extension

    compiler = cpp_extension.get_cxx_compiler()
    about = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=False).stdout
    flags = {key: value for key, value in wanted.items() if key.startswith(("with_", "is_"))}
    for key in ("extra_cflags", "extra_cuda_cflags", "extra_sycl_cflags", "extra_ldflags"):
        flags[key] = [flag for flag in wanted[key] if not flag.startswith(("-L", "-I"))]
    sources = [(Path(path).name, hashlib.sha256(Path(path).read_bytes()).hexdigest()) for path in wanted["sources"]]
    return {"compiler": about, "sources": sources, **flags}


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
