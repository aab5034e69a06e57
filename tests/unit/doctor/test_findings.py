"""One check's crash or hang is that check's finding, and no other's."""

from __future__ import annotations

import io
import threading
import time
from collections.abc import Iterator

from rich.console import Console

from seqaware.doctor.findings import Check, Finding, Level, error, examine, of_hosts, ok, some_hang, warning
from seqaware.doctor.findings_table import show, summary
from seqaware.errors import ConfigError


def _breaks() -> Iterator[Finding]:
    yield ok("one", "fine")
    raise ZeroDivisionError("a bug\nof ours")


def _refuses() -> Iterator[Finding]:
    yield from ()
    raise ConfigError("no such folder", got="/nowhere", do="make it")


def test_a_check_that_breaks_is_told_and_the_next_one_runs() -> None:
    found = examine([Check("first", _breaks), Check("second", _refuses), Check("third", lambda: [ok("third", "runs")])])
    assert found == [
        ok("one", "fine"),
        error("first", "this check broke: ZeroDivisionError: a bug of ours"),
        error("second", "no such folder: /nowhere", "make it"),
        ok("third", "runs"),
    ]


def test_a_check_that_hangs_is_left_alone_with_what_it_had_found() -> None:
    release = threading.Event()

    def hangs() -> Iterator[Finding]:
        yield ok("disk", "is there")
        release.wait()
        yield ok("disk", "too late")

    found = examine([Check("disk", hangs, seconds=0.2), Check("next", lambda: [ok("next", "runs")])])
    assert [finding.level for finding in found] == [Level.OK, Level.ERROR, Level.OK]
    assert found[1].subject == "disk" and "no answer within 0.2 s" in found[1].found
    assert some_hang()
    release.set()
    while some_hang():
        time.sleep(0.01)
    assert len(found) == 3  # what comes late changes nothing that was told


def test_hosts_that_are_alike_are_one_line() -> None:
    slow = warning("cores", "2 for 4 ranks", "ask for more")
    merged = of_hosts(
        [
            ("n1", [ok("torch", "2.13.0"), ok("disk", "500 MB/s"), slow]),
            ("n2", [ok("torch", "2.13.0"), ok("disk", "490 MB/s"), error("libaio", "missing", "install it")]),
            ("n3", [ok("torch", "2.13.0"), ok("disk", "510 MB/s"), slow]),
        ]
    )
    assert [(each.subject, each.found, each.hosts) for each in merged] == [
        ("torch", "2.13.0", ("n1", "n2", "n3")),
        ("disk", "500 MB/s", ("n1", "n2", "n3")),
        ("cores", "2 for 4 ranks", ("n1", "n3")),
        ("libaio", "missing", ("n2",)),
    ]


def test_several_lines_of_one_subject_stay_several() -> None:
    gpus = [ok("GPU", "first"), ok("GPU", "second")]
    assert [each.found for each in of_hosts([("n1", gpus), ("n2", gpus)])] == ["first", "second"]


def _shown(findings: list[Finding], *, width: int, hosts: int = 1) -> str:
    file = io.StringIO()
    show(findings, hosts=hosts, console=Console(file=file, width=width, highlight=False))
    return file.getvalue()


def test_a_log_file_of_60_columns_holds_every_word() -> None:
    path = "/a/very/long/path/" + "x" * 70
    findings = [ok("run folder speed", "writes 500 MB/s"), error("hostfile", f"cannot be read: {path}", "write it")]
    text = _shown(findings, width=60)
    assert "\x1b" not in text
    assert all(len(line) <= 60 and line == line.rstrip() for line in text.splitlines())
    assert path in "".join(text.split())
    assert "ERROR" in text and "-> write it" in text
    assert text.splitlines()[-1] == "1 error, 0 warnings, 1 ok"
    assert text.isascii()


def test_hosts_are_named_where_they_differ() -> None:
    some = Finding(Level.WARNING, "cores", "few", "", tuple(f"n{i}" for i in range(6)))
    every = Finding(Level.OK, "torch", "2.13.0", "", tuple(f"n{i}" for i in range(8)))
    text = _shown([some, every], width=100, hosts=8)
    assert "few [n0, n1, n2, n3 and 2 more]" in text
    assert "2.13.0\n" in text


def test_markup_is_text() -> None:
    assert "[bold]" in _shown([ok("x", "[bold] stays")], width=80)


def test_the_sum() -> None:
    assert summary([error("a", ""), error("b", ""), warning("c", ""), ok("d", "")]) == "2 errors, 1 warning, 1 ok"
