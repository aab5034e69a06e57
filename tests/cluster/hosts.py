"""Hosts on one machine: namespaces with a network, processes, a name, mounts and /dev/shm of their own; sshd is PID 1.

Each has been up for another time, so that clocks that count from there (time.monotonic) differ between them as between
real hosts.

`with hosts("h1", "h2") as cluster:` makes them, joined by a switch that no other network is joined to. They know each
other from their own /etc/hosts and reach each other by ssh without a password; there is no DNS. Files are those of this
machine, as on a cluster with a shared file system. Nothing is left behind: every namespace lives as long as its first
process, and those end with the `with` block or with this process, whichever comes first.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from tests.patience import wait, wait_for

PROGRAMS = ("ip", "nsenter", "setpriv", "ssh-keygen", "sshd", "unshare")
_APART = ("unshare", "--net", "--uts", "--ipc", "--pid", "--time", "--mount", "--fork")
_DAY = 86_400
# Administrators' programs, which a login of a plain user does not look for.
_PATH = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"

# $1: the host's name. $2: the folder of files that it sees in place of this machine's.
_BOOT = """
hostname "$1"
mount -t tmpfs tmpfs /dev/shm
mount -t tmpfs tmpfs /run
mkdir /run/sshd
mount --bind "$2/ssh" /etc/ssh
mount --bind "$2/$1.hosts" /etc/hosts
[ ! -e /etc/nsswitch.conf ] || mount --bind "$2/nsswitch.conf" /etc/nsswitch.conf
[ ! -d /root/.ssh ] || mount -t tmpfs tmpfs /root/.ssh
exec "$3" -D -e
"""

_SSHD = """
HostKey /etc/ssh/host_key
AuthorizedKeysFile /etc/ssh/id.pub
StrictModes no
UsePAM no
PasswordAuthentication no
PermitRootLogin prohibit-password
MaxStartups 100
PidFile none
"""

_SSH = """
Host *
  IdentityFile /etc/ssh/id
  IdentitiesOnly yes
  StrictHostKeyChecking no
  UserKnownHostsFile /dev/null
  LogLevel ERROR
  BatchMode yes
  ConnectTimeout 5
  ServerAliveInterval 3
  ServerAliveCountMax 3
"""


def what_is_missing(*programs: str) -> str | None:
    """Why hosts, or `programs` beside them, cannot be had on this machine; None where they can."""
    absent = [name for name in (*PROGRAMS, *programs) if shutil.which(name, path=_PATH) is None]
    if absent:
        return f"not installed: {', '.join(absent)} (Debian: iproute2, openssh-server, pdsh, util-linux)"
    if os.geteuid() != 0:
        return "namespaces with networks of their own need root"
    trial = subprocess.run(
        [*_APART, "mount", "-t", "tmpfs", "tmpfs", "/run"],
        capture_output=True,
        text=True,
        check=False,
    )
    return f"no namespaces here: {trial.stderr.strip()}" if trial.returncode else None


@dataclass(frozen=True)
class Host:
    """One host: its name, its address, and its PID 1 as this machine counts."""

    name: str
    address: str
    pid: int


class Cluster:
    """The hosts that `hosts` made, by name."""

    def __init__(self, members: Sequence[Host]) -> None:
        self._members = {host.name: host for host in members}
        self.names = tuple(self._members)

    def __getitem__(self, name: str) -> Host:
        return self._members[name]

    def start(self, name: str, command: Sequence[str], *, cwd: Path, env: Mapping[str, str]) -> subprocess.Popen[str]:
        """Start a command on a host, as from its console; standard output and error come through one pipe.

        Killing what is returned kills the command too, but not the command's own children; no other signal is
        passed on (see `processes`).
        """
        enter = ["nsenter", "-t", str(self[name].pid), "-n", "-u", "-i", "-p", "-T", "-m", f"--wd={cwd}", "--"]
        return subprocess.Popen(
            [*enter, "setpriv", "--pdeathsig", "KILL", "--", *command],
            env=dict(env),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def processes(self, name: str) -> dict[int, list[str]]:
        """The words of the command lines of a host's live processes, by this machine's pid, without its sshd's."""
        namespace = Path(f"/proc/{self[name].pid}/ns/pid").readlink()
        found = {}
        for folder in Path("/proc").glob("[0-9]*"):
            # A process may end while we look, and a zombie has no command line.
            with suppress(OSError):
                words = (folder / "cmdline").read_bytes().rstrip(b"\0").decode(errors="replace").split("\0")
                here = (folder / "ns" / "pid").readlink() == namespace
                if here and words[0] and "sshd" not in words[0]:
                    found[int(folder.name)] = words
        return found


@contextmanager
def hosts(*names: str) -> Iterator[Cluster]:
    """Make hosts with these names, of at most 10 characters each; all of them end with the block."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="seqaware-hosts-")))
        _write_files(folder, names)
        switch = stack.enter_context(_first_process(["unshare", "--net", "sleep", "infinity"], folder / "switch.log"))
        wait_for("the switch", lambda: _namespace(switch.pid) != _namespace(os.getpid()))
        _ip(switch.pid, "link add lan type bridge", "link set lan up")
        members = []
        for number, name in enumerate(names, start=1):
            first = stack.enter_context(_booted(name, folder, days_ago=number))
            _plug_in(switch.pid, first, name=name, number=number)
            members.append(Host(name, _address(number), first))
        for name in names:
            log = folder / f"{name}.log"
            wait_for(f"{name}'s sshd, see {log}", lambda log=log: "Server listening" in log.read_text())
        yield Cluster(members)


def _address(number: int) -> str:
    return f"10.77.8.{number}"


def _write_files(folder: Path, names: Sequence[str]) -> None:
    ssh = folder / "ssh"
    ssh.mkdir()
    for key in ("id", "host_key"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", ssh / key], check=True)
    (ssh / "sshd_config").write_text(_SSHD)
    (ssh / "ssh_config").write_text(_SSH)
    for own in names:
        # As Debian and Ubuntu write it: a host's own name stands for an address where nobody else can reach it.
        others = [f"{_address(number)} {name}" for number, name in enumerate(names, start=1) if name != own]
        (folder / f"{own}.hosts").write_text("\n".join(["127.0.0.1 localhost", f"127.0.1.1 {own}", *others, ""]))
    (folder / "nsswitch.conf").write_text("hosts: files\n")


@contextmanager
def _first_process(command: Sequence[str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A process in a session of its own, which ends with the block, or with this process if that is killed."""
    with log.open("wb") as output:
        process = subprocess.Popen(
            ["setpriv", "--pdeathsig", "KILL", "--", *command],
            env={**os.environ, "PATH": _PATH},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
    try:
        yield process
    finally:
        process.kill()
        process.wait()


@contextmanager
def _booted(name: str, folder: Path, *, days_ago: int) -> Iterator[int]:
    """A host without a network; yields its PID 1."""
    sshd = shutil.which("sshd", path=_PATH)
    assert sshd is not None
    up = [word for clock in ("--monotonic", "--boottime") for word in (clock, str(days_ago * _DAY))]
    apart = [*_APART, *up, "--kill-child", "--mount-proc"]
    boot = ["sh", "-eu", "-c", _BOOT, "boot", name, str(folder), sshd]
    with _first_process([*apart, *boot], folder / f"{name}.log") as parent:
        children = Path(f"/proc/{parent.pid}/task/{parent.pid}/children")
        wait_for(f"{name}'s first process", lambda: children.read_text().strip() != "")
        first = int(children.read_text())
        try:
            yield first
        finally:
            # The kernel ends every process of a namespace with its PID 1, and `parent` returns once all are gone.
            with suppress(ProcessLookupError):
                os.kill(first, signal.SIGKILL)
            wait(parent)


def _plug_in(switch: int, host: int, *, name: str, number: int) -> None:
    _ip(switch, f"link add {name} type veth peer name eth0 netns {host}", f"link set {name} master lan up")
    _ip(host, "link set lo up", f"address add {_address(number)}/24 dev eth0", "link set eth0 up")


def _ip(pid: int, *commands: str) -> None:
    """Run `ip` in the network namespace of a process."""
    enter = ["nsenter", f"--net=/proc/{pid}/ns/net", "--", "ip", "-batch", "-"]
    subprocess.run(enter, input="\n".join(commands), env={**os.environ, "PATH": _PATH}, text=True, check=True)


def _namespace(pid: int) -> Path:
    return Path(f"/proc/{pid}/ns/net").readlink()
