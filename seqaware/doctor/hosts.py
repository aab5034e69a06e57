"""The hosts of a hostfile, asked over ssh as the deepspeed launcher will start its ranks there."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from seqaware.config.loading import REPOSITORY
from seqaware.doctor import host_probe
from seqaware.doctor.findings import Finding, error, ok, warning
from seqaware.doctor.network import Listener, address_towards
from seqaware.doctor.shared_disk import Note
from seqaware.errors import ConfigError
from seqaware.files import MalformedError, parse_json, read_text

_HOSTFILE_BYTES = 2**23
_CONNECT_SECONDS = 5
ANSWER_SECONDS = 30.0
_AT_ONCE = 32
_SKEW_SECONDS = 1.0
_ENTRY = re.compile(r"(\S+)\s+slots=(\d{1,9})(\s.*)?")
# Of what ssh says, what a person can do about it.
_ADVICE = {
    "Permission denied": "put your public key into ~/.ssh/authorized_keys there: ssh-copy-id {host}",
    "Host key verification failed": "ssh-keyscan {host} >> ~/.ssh/known_hosts",
    "Could not resolve": "correct the name in the hostfile, or /etc/hosts",
    "Connection refused": "start sshd there, or correct the port in ~/.ssh/config",
    "timed out": "see that the host is up and that no firewall stands between",
    "No route": "see that the host is up and in the same network",
}


@dataclass(frozen=True)
class HostAnswer:
    """What came back from a host: a report, or why there is none. skew: seconds its clock is off, at least."""

    host: str
    report: Mapping[str, Any] | None
    trouble: str = ""
    do: str = ""
    skew: float = 0.0


def read_hostfile(path: Path) -> dict[str, int]:
    """Host -> slots, as the deepspeed launcher reads it.

    Raises:
        ConfigError: missing, empty, a line that is no entry, or a host twice.
    """
    try:
        lines = read_text(path, limit=_HOSTFILE_BYTES).splitlines()
    except (OSError, MalformedError) as trouble:
        reason = trouble.strerror if isinstance(trouble, OSError) else trouble
        raise ConfigError("the hostfile cannot be read", got=f"{path} ({reason})") from trouble
    found: dict[str, int] = {}
    for number, line in enumerate(lines, 1):
        entry = line.strip()
        if not entry or entry.startswith("#"):
            continue
        match = _ENTRY.fullmatch(entry)
        if match is None or int(match[2]) == 0:
            raise ConfigError(
                f"{path}, line {number}: not a host", got=repr(entry), do="write for example: node1 slots=8"
            )
        if match[1] in found:
            raise ConfigError(f"{path}, line {number}: {match[1]} stands there twice", do="keep one of the lines")
        found[match[1]] = int(match[2])
    if not found:
        raise ConfigError("the hostfile names no host", got=path, do="write for example: node1 slots=8")
    return found


def ask_hosts(hosts: Mapping[str, int], *, folder: Path, packages: Sequence[str], port: int) -> list[Finding]:
    """Ask every host, all at once, and judge the answers.

    Args:
        hosts: name -> slots. folder: of the run, or what exists of the way there. port: of rank 0.
    """
    if shutil.which("ssh") is None:
        return [error("ssh", "not found on this host", "apt-get install openssh-client")]
    with Note.written(folder) as note, Listener.on(port) as listener, ThreadPoolExecutor(_AT_ONCE) as pool:
        asked = {"packages": list(packages), "note": str(note.path), "port": listener.port}
        answers = list(pool.map(lambda host: _ask(host, asked), hosts))
        here = host_probe.report({**asked, "port": None})
    return [*_reached(answers, hosts), *judge(answers, here=here, note=note.text)]


def _ask(host: str, asked: Mapping[str, Any]) -> HostAnswer:
    """One host. Called in a thread of its own."""
    try:
        address = address_towards(host)
    except OSError as trouble:
        return HostAnswer(host, None, f"the name leads nowhere: {trouble.strerror}", _ADVICE["Could not resolve"])
    argument = shlex.quote(json.dumps({**asked, "address": address}))
    remote = f"cd {shlex.quote(str(REPOSITORY))} && exec {shlex.quote(sys.executable)} - {argument}"
    command = ["ssh", "-o", "BatchMode=yes", "-o", f"ConnectTimeout={_CONNECT_SECONDS}", host, remote]
    source = Path(host_probe.__file__).read_text(encoding="utf-8")
    begun = time.time()
    try:
        done = subprocess.run(
            command, input=source, capture_output=True, text=True, timeout=ANSWER_SECONDS - 5, check=False
        )
    except subprocess.TimeoutExpired:
        return HostAnswer(host, None, "no answer over ssh", "see whether a disk or the login hangs there")
    ended = time.time()
    line = next((line for line in done.stdout.splitlines() if line.startswith(host_probe.MARK)), None)
    if done.returncode != 0 or line is None:
        return _no_report(host, done)
    try:
        report = parse_json(line.removeprefix(host_probe.MARK))
        return HostAnswer(host, report, skew=max(0.0, begun - report["time"], report["time"] - ended))
    except (MalformedError, KeyError, TypeError):  # a login that prints into the report
        return _no_report(host, done)


def _no_report(host: str, done: subprocess.CompletedProcess[str]) -> HostAnswer:
    said = [line.strip() for line in done.stderr.splitlines() if line.strip()] or [f"exit code {done.returncode}"]
    if done.returncode == 255:  # of ssh itself
        advice = next((do for words, do in _ADVICE.items() if any(words in line for line in said)), "try: ssh {host}")
        return HostAnswer(host, None, f"ssh: {said[-1]}", advice.format(host=host))
    do = f"install it there at the same path: {sys.executable} in {REPOSITORY}"
    return HostAnswer(host, None, f"this Python does not run there: {said[-1]}", do)


def _reached(answers: Sequence[HostAnswer], hosts: Mapping[str, int]) -> Iterator[Finding]:
    reached = [answer.host for answer in answers if answer.report is not None]
    if len(reached) == len(answers):
        yield ok("hosts", f"{len(hosts)} with {sum(hosts.values())} slots; all answer over ssh without a password")
    for answer in answers:
        if answer.report is None:
            yield error(f"host {answer.host}", answer.trouble, answer.do)
        elif 0 < answer.report["gpus"] < hosts[answer.host]:
            found = f"{hosts[answer.host]} slots in the hostfile, and {answer.report['gpus']} GPUs"
            yield error(f"host {answer.host}", found, f"write {answer.host} slots={answer.report['gpus']}")
    if len(hosts) > 1 and shutil.which("pdsh") is None:
        do = "apt-get install pdsh, or start with --launcher openmpi, mpich, slurm or impi"
        yield warning("pdsh", "not found; deepspeed --hostfile starts ranks with it", do)


def judge(answers: Sequence[HostAnswer], *, here: Mapping[str, Any], note: str) -> Iterator[Finding]:
    """What the hosts that answered see, against what this one sees."""
    told = {answer.host: answer.report for answer in answers if answer.report is not None}
    if not told:
        return
    among_them = any(report["host"] == here["host"] for report in told.values())
    yield from same_software(told if among_them else {**told, f"{here['host']} (this host)": here})
    yield from same_folder(told, note)
    cut_off = {host: report["unreachable"] for host, report in told.items() if report.get("unreachable")}
    for host, reason in cut_off.items():
        do = "open the port between the hosts; every rank has to reach rank 0's host"
        yield error(f"host {host}", f"does not reach a port of this host: {reason}", do)
    if not cut_off:
        yield ok("ports", f"{_all(len(told))} reach this one")
    yield from same_time({answer.host: answer.skew for answer in answers if answer.report is not None})


def same_software(reports: Mapping[str, Mapping[str, Any]]) -> Iterator[Finding]:
    """Python, libraries and this program, on all hosts alike. reports: host -> what `probe.report` told."""
    facts = {host: {**report["versions"], "seqaware's sources": report["program"]} for host, report in reports.items()}
    differing = False
    for name in next(iter(facts.values())):
        values = {host: fact[name] for host, fact in facts.items()}
        usual = Counter(values.values()).most_common(1)[0][0]
        others = {host: value for host, value in values.items() if value != usual}
        if others:
            differing = True
            found = f"{usual}, but " + ", ".join(f"{value} on {host}" for host, value in others.items())
            yield error(name, found, "make the environment alike on every host, or put it on a shared disk")
    if not differing:
        yield ok("same software", f"Python, libraries and program are alike on {_all(len(reports))}")


def same_folder(reports: Mapping[str, Mapping[str, Any]], note: str) -> Iterator[Finding]:
    """Whether all hosts see the run's folder, and its locks, as one."""
    blind = {host: report for host, report in reports.items() if report["note"] != note}
    for host, report in blind.items():
        reason = report.get("note_trouble") or "another file is there"
        do = "put output.dir on a disk that all hosts share, at the same path"
        yield error("run folder", f"{host} does not see this host's files there: {reason}", do)
    if blind:
        return
    yield ok("run folder", f"one and the same on {_all(len(reports))}")
    unlocked = [host for host, report in reports.items() if not report["lock_is_seen"]]
    if unlocked:
        do = "mount it with locks (Lustre: flock; NFS: not nolock), and start no run twice"
        yield warning("file locks", f"those of one host are not seen on {', '.join(unlocked)}", do)


def same_time(skews: Mapping[str, float]) -> Iterator[Finding]:
    """Clocks. skews: host -> seconds by which its clock is off, at least."""
    worst = max(skews, key=lambda host: skews[host])
    if skews[worst] > _SKEW_SECONDS:
        found = f"{worst} is {skews[worst]:.1f} s off: logs of the hosts cannot be laid side by side"
        yield warning("clocks", found, "run chrony or ntpd on every host")
    else:
        yield ok("clocks", f"alike on {_all(len(skews))} (within {_SKEW_SECONDS:g} s)")


def _all(count: int) -> str:
    return "1 host" if count == 1 else f"all {count} hosts"
