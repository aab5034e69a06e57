"""Names from manifests stay in their folder."""

from __future__ import annotations

from pathlib import Path

import pytest

from seqaware.data.file_records import inside
from seqaware.errors import CheckpointError, DataError


def test_names_of_files_in_the_folder_are_theirs(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    (tmp_path / "real" / "a.bin").touch()
    (tmp_path / "real" / "again.bin").symlink_to("a.bin")
    for folder in (tmp_path / "real", tmp_path / "link"):
        for name in ("a.bin", "again.bin", "not-there.bin", "deep/er/..x.bin", "..bin"):
            assert inside(folder, name) == folder / name


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("/etc/passwd", "absolute"),
        ("//etc/passwd", "absolute"),
        ("../outside", "climbs"),
        ("deep/../../outside", "climbs"),
        ("..", "climbs"),
        ("", "not a file's name"),
        (".", "not a file's name"),
        (None, "not a file's name"),
        (7, "not a file's name"),
        ("a\0b", "character"),
        ("..\\outside", "character"),
        ("leaves", "symbolic link"),
        ("out/secret", "symbolic link"),
        ("dangling", "symbolic link"),
    ],
)
def test_other_names_are_refused_and_named(tmp_path: Path, name: str, why: str) -> None:
    folder = tmp_path / "store"
    folder.mkdir()
    (tmp_path / "secret").touch()
    (folder / "leaves").symlink_to(tmp_path / "secret")
    (folder / "out").symlink_to(tmp_path)
    (folder / "dangling").symlink_to("../made-later")
    with pytest.raises(DataError, match=why) as refused:
        inside(folder, name)
    assert str(folder) in str(refused.value) and repr(name) in str(refused.value)


def test_a_folder_whose_name_begins_alike_is_outside(tmp_path: Path) -> None:
    for name in ("store", "store-2"):
        (tmp_path / name).mkdir()
    (tmp_path / "store" / "link").symlink_to(tmp_path / "store-2")
    with pytest.raises(CheckpointError, match="symbolic link"):
        inside(tmp_path / "store", "link/x", error=CheckpointError)


def test_links_in_a_circle_end(tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    with pytest.raises(DataError, match="cannot be followed"):
        inside(tmp_path, "a")
