"""Hostfiles as the deepspeed launcher reads them, and what the hosts' answers come to."""

from __future__ import annotations

import fcntl
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from deepspeed.launcher.runner import _parse_hostfile

from seqaware.doctor import host_probe
from seqaware.doctor.findings import Finding, Level
from seqaware.doctor.hosts import HostAnswer, judge, read_hostfile
from seqaware.doctor.shared_disk import Note
from seqaware.errors import ConfigError


def test_a_hostfile_is_read_as_deepspeed_reads_it(tmp_path: Path) -> None:
    text = "# the big ones\nnode1 slots=8\n\nnode2   slots=4 # half\n10.0.0.3 slots=16\n"
    (tmp_path / "hosts").write_text(text)
    assert read_hostfile(tmp_path / "hosts") == {"node1": 8, "node2": 4, "10.0.0.3": 16}
    assert read_hostfile(tmp_path / "hosts") == dict(_parse_hostfile(text.splitlines()))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("node1 slots=8\nnode2\n", r"line 2: not a host; got 'node2'"),
        ("node1 slots=8\nnode1 slots=8\n", r"line 2: node1 stands there twice"),
        ("node1 slots=0\n", r"line 1: not a host"),
        ("node1 slot=8\n", r"line 1: not a host"),
        ("node1 slots=8x\n", r"line 1: not a host"),
        (f"node1 slots={'9' * 5000}\n", r"line 1: not a host"),
        ("node1 \0 slots=1\n" * 2**20, r"cannot be read; got .*larger than"),
        ("# nothing\n\n", r"names no host"),
        (None, r"cannot be read; got .*No such file"),
    ],
)
def test_hostfiles_that_name_no_hosts(tmp_path: Path, text: str | None, said: str) -> None:
    if text is not None:
        (tmp_path / "hosts").write_text(text)
    with pytest.raises(ConfigError, match=said):
        read_hostfile(tmp_path / "hosts")


HERE: dict[str, Any] = {
    "host": "login",
    "versions": {"python": "3.11.7", "torch": "2.13.0"},
    "program": "abc",
    "gpus": 0,
    "note": "seen",
    "lock_is_seen": True,
    "unreachable": None,
}


def _judged(skew: float = 0.0, **changes: Any) -> list[Finding]:
    """Of two hosts, the second of which tells something else."""
    good = {**HERE, "host": "n1"}
    answers = [
        HostAnswer("n1", good),
        HostAnswer("n2", {**good, "host": "n2", **changes}, skew=skew),
        HostAnswer("n3", None),
    ]
    return [each for each in judge(answers, here=HERE, note="seen") if each.level is not Level.OK]


def test_hosts_that_are_alike() -> None:
    assert _judged() == []


@pytest.mark.parametrize(
    ("changes", "level", "said"),
    [
        ({"versions": {"python": "3.11.7", "torch": "2.12.0"}}, Level.ERROR, "2.13.0, but 2.12.0 on n2"),
        ({"versions": {"python": "3.12.1", "torch": "2.13.0"}}, Level.ERROR, "3.11.7, but 3.12.1 on n2"),
        ({"program": "old"}, Level.ERROR, "abc, but old on n2"),
        ({"note": None, "note_trouble": "No such file"}, Level.ERROR, "n2 does not see .*: No such file"),
        ({"note": "of another disk"}, Level.ERROR, "n2 does not see .*: another file is there"),
        ({"lock_is_seen": False}, Level.WARNING, "are not seen on n2"),
        ({"unreachable": "Connection refused"}, Level.ERROR, "does not reach a port of this host: Connection refused"),
        ({"skew": 7.4}, Level.WARNING, "n2 is 7.4 s off"),
    ],
)
def test_a_host_that_differs_is_named(changes: dict[str, Any], level: Level, said: str) -> None:
    (told,) = _judged(**changes)
    assert told.level is level and re.search(said, told.found) and told.do


def test_the_probe_is_a_program_of_its_own(tmp_path: Path) -> None:
    """As ssh runs it: from standard input, without this repository."""
    with Note.written(tmp_path) as note:
        asked = {"packages": ["torch", "no-such-thing"], "note": str(note.path), "address": "127.0.0.1", "port": 1}
        done = subprocess.run(
            [sys.executable, "-", json.dumps(asked)],
            input=Path(host_probe.__file__).read_text(),
            capture_output=True,
            text=True,
            cwd=tmp_path,
            check=True,
        )
        told = json.loads(done.stdout.removeprefix(host_probe.MARK))
        assert told["note"] == note.text and told["lock_is_seen"]
        assert told["versions"]["no-such-thing"] == "not installed"
        assert told["versions"]["torch"] == host_probe.version_of("torch")
        assert told["program"] == host_probe.program_digest() != "not installed"
        assert told["unreachable"] == "Connection refused"
    assert list(tmp_path.iterdir()) == []


def test_a_lock_that_is_not_held_is_seen_not_to_be(tmp_path: Path) -> None:
    (tmp_path / "note").write_text("text")
    assert host_probe.read_note(tmp_path / "note") == {"note": "text", "lock_is_seen": False}
    with (tmp_path / "note").open() as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert host_probe.read_note(tmp_path / "note")["lock_is_seen"]
