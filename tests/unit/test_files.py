"""Files and paths from elsewhere: read within bounds, or refused with a reason."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from seqaware.files import (
    JSON_BYTES,
    MAX_DEPTH,
    DuplicateKeyError,
    MalformedError,
    checked_path,
    local_path,
    parse_json,
    parse_yaml,
    read_json,
    read_text,
)

LAUGHS = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{name}: &{name} [{','.join([f'*{before}'] * 9)}]\n" for before, name in zip("abcdef", "bcdefg", strict=True)
)
MERGES = "m0: &m0 {x: 1}\n" + "".join(
    f"m{n}: &m{n}\n  <<: [{','.join([f'*m{n - 1}'] * 20)}]\n  k{n}: 1\n" for n in range(1, 9)
)
CHAIN = "a0: &a0 [1]\n" + "".join(f"a{n}: &a{n} [*a{n - 1}]\n" for n in range(1, MAX_DEPTH + 1))


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        pytest.param(LAUGHS, "aliases expanded", id="aliases"),
        pytest.param(MERGES, "aliases expanded", id="merges"),
        pytest.param(CHAIN, "levels deep", id="chain"),
        pytest.param("a: [" + "1," * 60_000 + "1]", "values", id="many"),
        pytest.param("a: &a\n  b: *a", "contains itself", id="cycle"),
        pytest.param("a: " + "[" * 2000, "levels deep", id="brackets"),
        pytest.param("{a: " * 1500, "levels deep", id="braces"),
        pytest.param("- " * 100_000, "levels deep", id="dashes"),
        pytest.param("- " * 200_000, "larger than 256 KiB", id="size"),
        pytest.param("a: !!int llama", "line 1, column 4: this value is not of type int", id="int"),
        pytest.param("!!int ''", "not of type int", id="no-int"),
        pytest.param("!!int {=: x}", "not of type int", id="int-mapping"),
        pytest.param("!!bool maybe", "not of type bool", id="bool"),
        pytest.param("!!float x", "not of type float", id="float"),
        pytest.param("a: " + "9" * 5000, "308 digits", id="digits"),
        pytest.param("a: 0x" + "f" * 300, "308 digits", id="hexadecimal"),
        pytest.param("a: " + "1:" * 50_000 + "1", "308 digits", id="base-60"),
        pytest.param("a: 2024-13-45", "type timestamp is not supported", id="no-date"),
        pytest.param("!!timestamp z", "type timestamp is not supported", id="timestamp"),
        pytest.param("!!binary /w==", "type binary is not supported", id="binary"),
        pytest.param("!!set {a}", "type set is not supported", id="set"),
        pytest.param('a: "\\UFFFFFFFF"', "out of range", id="character"),
        pytest.param('a: "\\ud800"', "lone surrogate", id="surrogate"),
        pytest.param("%YAML " + "9" * 5000 + ".1\n---\na", "out of range", id="version"),
        pytest.param("? [a]\n: b", "a key must be plain text", id="key"),
        pytest.param("a: !!python/object/apply:os.system [id]", "could not determine a constructor", id="tag"),
    ],
)
def test_yaml_out_of_bounds_is_refused_with_a_reason(text: str, reason: str) -> None:
    with pytest.raises(MalformedError, match=reason):
        parse_yaml(text)


def test_yaml_within_bounds_is_read() -> None:
    merged = parse_yaml("a: &a {x: 1}\nb: {<<: *a, y: 2}\nc: [*a, *a]\n1: null\n")
    assert merged == {"a": {"x": 1}, "b": {"x": 1, "y": 2}, "c": [{"x": 1}, {"x": 1}], 1: None}
    assert parse_yaml("9" * 308) == int("9" * 308)


def test_a_doubled_key_of_yaml_names_both_lines() -> None:
    with pytest.raises(DuplicateKeyError) as caught:
        parse_yaml("a: 1\nb: 2\na: 3\n")
    assert (caught.value.key, caught.value.first, caught.value.second) == ("a", 1, 3)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("[" * 100_000, "levels deep"),
        ("[" * (MAX_DEPTH + 1) + "]" * (MAX_DEPTH + 1), "levels deep"),
        ("9" * 309, "308 digits"),
        ("9" * 5000, "308 digits"),
        ('{"a": "\\ud800"}', "lone surrogate"),
        ("{", "line 1 column 2"),
        (b"\xff", "utf-8"),
    ],
)
def test_json_out_of_bounds_is_refused_with_a_reason(text: str | bytes, reason: str) -> None:
    with pytest.raises(MalformedError, match=reason):
        parse_json(text)


def test_json_within_bounds_is_read() -> None:
    deep: object = []
    for _ in range(MAX_DEPTH - 1):
        deep = [deep]
    assert parse_json("[" * MAX_DEPTH + "]" * MAX_DEPTH) == deep
    assert parse_json("9" * 308) == int("9" * 308)
    assert parse_json(b'"\\ud83d\\ude00"') == "😀"
    assert parse_json("[" + "[]," * 100 + "1]") == [[]] * 100 + [1]


def test_integers_of_rows_may_be_larger() -> None:
    assert parse_json("9" * 400, large_integers=True) == int("9" * 400)
    with pytest.raises(MalformedError, match="4300 digits"):
        parse_json("9" * 5000, large_integers=True)


def test_a_device_and_a_large_file_are_refused(tmp_path: Path) -> None:
    for path in (Path("/dev/zero"), Path("/dev/null")):
        with pytest.raises(MalformedError, match="not a regular file"):
            read_text(path, limit=10)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(MalformedError, match="not a regular file"):  # opening it would wait for ever
        read_text(tmp_path / "pipe", limit=10)
    with pytest.raises(IsADirectoryError):
        read_text(tmp_path, limit=10)
    large = tmp_path / "large.json"
    with large.open("wb") as file:
        file.truncate(JSON_BYTES + 1)  # sparse: takes no space
    with pytest.raises(MalformedError, match="larger than 16 MiB"):
        read_json(large)


@pytest.mark.parametrize("name", ["x" * 256, "a\0b", "~nouser-here/x", "x/" * 1500, "a\ud800b", "é" * 128])
def test_a_name_that_no_file_system_takes_is_refused(name: str) -> None:
    with pytest.raises(MalformedError):
        local_path(name)


def test_a_usable_path_is_expanded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/someone")
    assert local_path("~/x") == Path("/home/someone/x")
    assert checked_path(Path("~/x")) == Path("~/x")
    assert local_path("x" * 255) == Path("x" * 255)
