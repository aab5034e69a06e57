"""Operators are built once per environment, whatever its path. No compiler runs: torch's build is a fake."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from torch.utils import cpp_extension
from torch.utils.file_baton import FileBaton

from seqaware.compat import build_lock, operator_cache
from seqaware.compat.build_lock import BuildListener, KernelLock, listen
from seqaware.compat.operator_cache import build_each_once, operators_folder


class Builds(BuildListener):
    """Stands in for torch's build."""

    def __init__(self) -> None:
        super().__init__()
        self.built: list[str] = []
        self.said: list[str] = []

    def builds(self, text: str) -> None:
        self.said.append(text)

    def __call__(self, **wanted: Any) -> None:
        self.built.append(wanted["name"])
        Path(wanted["build_directory"], f"{wanted['name']}.so").touch()


@pytest.fixture
def builds(monkeypatch: pytest.MonkeyPatch) -> Iterator[Builds]:
    builds, before = Builds(), build_lock.listener()
    monkeypatch.setattr(cpp_extension, "FileBaton", cpp_extension.FileBaton)
    monkeypatch.setattr(cpp_extension, "_write_ninja_file_and_build_library", builds)
    listen(builds)
    build_each_once()
    yield builds
    listen(before)


def _environment(folder: Path, package: str = "deepspeed") -> Path:
    """Installed packages; returns the source of an operator."""
    source = folder / "site-packages" / package / "csrc" / "adam.cpp"
    source.parent.mkdir(parents=True)
    source.write_text("int adam();")
    return source


def _build(source: Path, folder: Path, **changes: Any) -> None:
    folder.mkdir(exist_ok=True)
    wanted = {
        "name": "cpu_adam",
        "sources": [str(source)],
        "extra_cflags": ["-O3", f"-I{source.parent}"],
        "extra_cuda_cflags": [],
        "extra_sycl_cflags": [],
        "extra_ldflags": [f"-L{source.parent}", "-lcurand"],
        "extra_include_paths": [str(source.parent)],
        "build_directory": str(folder),
        "verbose": False,
        "with_cuda": False,
        "with_sycl": False,
        "is_standalone": False,
    }
    cpp_extension._write_ninja_file_and_build_library(**wanted | changes)


def test_another_path_builds_nothing_again(tmp_path: Path, builds: Builds) -> None:
    kept = tmp_path / "kept"
    for name in ("one", "other"):
        _build(_environment(tmp_path / name), kept)
    assert builds.built == ["cpu_adam"]
    assert builds.said == ["compiling DeepSpeed's cpu_adam operator (once, about 2 min)"]


def test_what_decides_the_operator_builds_it_again(
    tmp_path: Path, builds: Builds, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, kept = _environment(tmp_path), tmp_path / "kept"
    _build(source, kept)
    _build(source, kept, extra_cflags=["-O2"])
    _build(source, kept, extra_ldflags=["-laio"])
    _build(source, kept, with_cuda=True)
    source.write_text("int adam() { return 1; }")
    _build(source, kept)
    monkeypatch.setenv("CXX", shutil.which("true") or "true")
    _build(source, kept)
    assert len(builds.built) == 6


def test_a_build_that_was_killed_is_repeated(tmp_path: Path, builds: Builds, monkeypatch: pytest.MonkeyPatch) -> None:
    source, kept = _environment(tmp_path), tmp_path / "kept"

    def killed(self: Builds, **wanted: Any) -> None:
        real(self, **wanted)  # a library that is cut short
        raise KeyboardInterrupt

    real = Builds.__call__
    with monkeypatch.context() as patch:
        patch.setattr(Builds, "__call__", killed)
        with pytest.raises(KeyboardInterrupt):
            _build(source, kept)
    _build(source, kept)
    assert builds.built == ["cpu_adam"] * 2


def test_another_ones_operator_is_left_to_ninja(tmp_path: Path, builds: Builds) -> None:
    """It may include headers that nobody but ninja knows."""
    source = _environment(tmp_path, package="mine")
    for _ in range(2):
        _build(source, tmp_path / "kept")
    assert builds.built == ["cpu_adam"] * 2
    assert builds.said == ["compiling the operator cpu_adam (once)"]


def test_torch_builds_under_our_lock(tmp_path: Path, builds: Builds) -> None:
    """It is not the file of torch's lock, which another process may hold, and removes when its own build has ended."""
    theirs = FileBaton(str(tmp_path / "lock"))
    assert theirs.try_acquire()
    lock = cpp_extension.FileBaton(str(tmp_path / "lock"), wait_seconds=0.01)
    assert isinstance(lock, KernelLock) and lock.try_acquire()
    lock.release()
    theirs.release()
    assert not list(tmp_path.iterdir())
    once = cpp_extension._write_ninja_file_and_build_library
    build_each_once()
    assert cpp_extension._write_ninja_file_and_build_library is once


def test_the_folder_is_that_of_the_versions_and_the_processor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    variables = {"XDG_CACHE_HOME": str(tmp_path)}
    folder = operators_folder(variables)
    assert folder is not None and folder.parent == tmp_path / "seqaware" / "operators"
    assert "torch-" in folder.name and "deepspeed-" in folder.name
    monkeypatch.setattr("sys.prefix", "/elsewhere")
    assert operators_folder(variables) == folder
    for name, value in (("version", lambda package: "0"), ("_cpu_features", lambda: "flags: none")):
        with monkeypatch.context() as patch:
            patch.setattr(operator_cache, name, value)
            assert operators_folder(variables) not in (folder, None)


def test_a_home_that_cannot_be_written_leaves_the_environment_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.prefix", str(tmp_path))
    monkeypatch.setattr(operator_cache.os, "access", lambda path, mode: str(path) != "/")
    folder = operators_folder({"XDG_CACHE_HOME": "/nowhere/at/all"})
    assert folder is not None and folder.is_relative_to(tmp_path)
    monkeypatch.setattr(operator_cache.os, "access", lambda path, mode: False)
    assert operators_folder({}) is None
