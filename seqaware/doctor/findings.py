"""What the doctor finds, and checks that can neither hang nor end it."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from enum import IntEnum

from seqaware.errors import SeqawareError

_LONGEST_TEXT = 400
_THREAD = "doctor: "


class Level(IntEnum):
    """How bad it is."""

    OK = 0
    WARNING = 1
    ERROR = 2


@dataclass(frozen=True)
class Finding:
    """One line of the table.

    Attributes:
        subject: what was looked at, in a word or two. found: what is there. do: what to do about it, if anything.
        hosts: where it is so; empty for this host alone.
    """

    level: Level
    subject: str
    found: str
    do: str = ""
    hosts: tuple[str, ...] = ()


def ok(subject: str, found: str) -> Finding:
    return Finding(Level.OK, subject, found)


def warning(subject: str, found: str, do: str = "") -> Finding:
    return Finding(Level.WARNING, subject, found, do)


def error(subject: str, found: str, do: str = "") -> Finding:
    return Finding(Level.ERROR, subject, found, do)


def of_error(subject: str, trouble: SeqawareError) -> Finding:
    """An error for people as a line of the table."""
    got = "" if trouble.got is None else f": {trouble.got}"
    return error(subject, _short(f"{trouble.what}{got}"), trouble.do or "")


@dataclass(frozen=True)
class Check:
    """Something to look at.

    Attributes:
        subject: of the finding where the check itself fails. seconds: how long it may take.
        run: yields findings as it comes to them.
    """

    subject: str
    run: Callable[[], Iterable[Finding]]
    seconds: float = 10.0


def examine(checks: Iterable[Check]) -> list[Finding]:
    """The findings of all checks, in their order. A check that breaks or hangs is a finding, and the next begins."""
    return [finding for check in checks for finding in _bounded(check)]


def _bounded(check: Check) -> list[Finding]:
    found: list[Finding] = []

    def work() -> None:
        try:
            for finding in check.run():
                found.append(finding)
        except SeqawareError as trouble:
            found.append(of_error(check.subject, trouble))
        # Whatever breaks in one check must not keep a person from the other findings.
        except Exception as trouble:  # noqa: BLE001
            found.append(error(check.subject, _short(f"this check broke: {type(trouble).__name__}: {trouble}")))

    thread = threading.Thread(target=work, name=f"{_THREAD}{check.subject}", daemon=True)
    thread.start()
    thread.join(check.seconds)
    if thread.is_alive():
        hangs = f"no answer within {check.seconds:g} s"
        return [*found, error(check.subject, hangs, "see whether a disk, a host or a driver hangs")]
    return found


def _short(text: str) -> str:
    """On one line, and not a page."""
    line = " ".join(text.split())
    return line if len(line) <= _LONGEST_TEXT else line[: _LONGEST_TEXT - 3] + "..."


def some_hang() -> bool:
    """Whether a check of this process has not come back yet."""
    return any(thread.name.startswith(_THREAD) for thread in threading.enumerate())


def of_hosts(findings: Sequence[tuple[str, Sequence[Finding]]]) -> list[Finding]:
    """The findings of several hosts as one list.

    A trouble that is the same on several hosts is said once, with their names. Of what is well, the first host's words
    stand for all: speeds and sizes differ a little everywhere, and what must not differ is compared elsewhere.

    Args:
        findings: host -> its findings, in the hosts' order; one entry a host.
    """
    lines: dict[object, tuple[Finding, list[str]]] = {}
    for host, found in findings:
        seen: Counter[str] = Counter()
        for finding in found:
            seen[finding.subject] += finding.level is Level.OK
            key = (finding.subject, seen[finding.subject]) if finding.level is Level.OK else finding
            lines.setdefault(key, (finding, []))[1].append(host)
    merged = [replace(finding, hosts=tuple(hosts)) for finding, hosts in lines.values()]
    # What belongs together stays together, in the order in which it first came up.
    order = {subject: place for place, subject in reversed(list(enumerate(each.subject for each in merged)))}
    return sorted(merged, key=lambda each: order[each.subject])
