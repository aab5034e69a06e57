"""A private SLURM on this machine, thrown away after use: munged, slurmctld and several slurmd from Debian's packages.

`with slurm(nodes=3) as cluster:` starts one. All its files lie in one temporary folder, its ports are its own, and its
nodes are addresses of the loopback network (127.0.0.1, 127.0.0.2, …), so that their names need no resolver. Jobs are
not counted from 1: ranks meet at a port that follows from their job's number, and two clusters may be up. Nodes claim
more CPUs and GPUs than this machine has. Some of SLURM's patience is cut short: how long a silent node is waited for,
the time between SIGTERM and SIGKILL, and the life of a job's credential, which a job that was requeued has to wait for.
Nothing is left behind: the daemons end with the block, and every process of a job with them.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests import launch
from tests.patience import Patience

CPUS_OF_A_NODE = 64
GPUS_OF_A_NODE = 8
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "scancel", "sinfo", "setpriv")
# Administrators' programs, which a login of a plain user does not look for.
_PATH = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
_ALIVE = ("PENDING", "CONFIGURING", "RUNNING", "COMPLETING", "REQUEUED", "SUSPENDED")

_SETTINGS = """
ClusterName=private
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={base}/munge/socket,cred_expire=5
StateSaveLocation={base}/state
SlurmctldPidFile={base}/slurmctld.pid
SlurmdPidFile={base}/slurmd-%n.pid
SlurmdSpoolDir={base}/spool-%n
MailProg=/bin/true
MpiDefault=none
SwitchType=switch/none
FirstJobId={ports[0]}
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
SchedulerParameters=sched_interval=1,bf_interval=1,batch_sched_delay=1
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
GresTypes=gpu
ReturnToService=2
SlurmctldTimeout=10
SlurmdTimeout=8
MessageTimeout=5
KillWait=5
MinJobAge=3600
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def what_is_missing() -> str | None:
    """Why there can be no private SLURM on this machine; None where there can."""
    absent = [name for name in PROGRAMS if shutil.which(name, path=_PATH) is None]
    if absent:
        return f"not installed: {', '.join(absent)} (Debian: munge, slurm-wlm, util-linux)"
    return None if os.geteuid() == 0 else "a SLURM that starts jobs needs root"


def need_slurm() -> None:
    """Skip the test where there can be no private SLURM, and say why; where CI has promised one, fail."""
    missing = what_is_missing()
    if missing is not None and os.environ.get("CI"):
        pytest.fail(missing)
    if missing is not None:
        pytest.skip(missing)


def documented(start: str) -> str:
    """The one command of docs/slurm.md that starts so, without its comment."""
    found = [command for command in documented_commands() if command.startswith(start)]
    assert len(found) == 1, f"{start}: {found}"
    return found[0]


def documented_commands() -> list[str]:
    """The commands in docs/slurm.md: the lines of its blocks."""
    blocks = (launch.ROOT / "docs" / "slurm.md").read_text(encoding="utf-8").split("```")[1::2]
    return [line.partition("  #")[0].rstrip() for block in blocks for line in block.splitlines() if line]


@dataclass
class Slurm:
    """A running cluster.

    Attributes:
        base: the folder of all its files. nodes: their names, which are addresses.
    """

    base: Path
    nodes: tuple[str, ...]
    _daemons: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    @property
    def variables(self) -> dict[str, str]:
        """What a command needs in its environment to speak to this cluster."""
        return {"SLURM_CONF": str(self.base / "slurm.conf")}

    def command(self, *words: str, text: str | None = None, cwd: Path | None = None, **extra: str) -> str:
        """Run one of SLURM's commands and return what it printed.

        Args:
            text: its standard input. extra: variables of its environment.

        Raises:
            RuntimeError: it failed.
        """
        env = {**os.environ, "PATH": _PATH, **self.variables, **extra}
        done = subprocess.run(words, input=text, cwd=cwd, env=env, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise RuntimeError(f"{' '.join(words)} ended with {done.returncode}: {done.stderr}")
        return done.stdout.strip()

    def job(self, number: str) -> dict[str, str]:
        """What SLURM knows of a job, or of one task of an array (12_3)."""
        text = self.command("scontrol", "--oneliner", "show", "job", number)
        pairs = (word.partition("=") for word in text.splitlines()[0].split())
        return {name: value for name, _, value in pairs}

    def wait_for_end(self, number: str) -> dict[str, str]:
        """Wait until a job, or a task of an array, will run no more; returns what SLURM knows of it then."""
        self.wait_for(f"the end of job {number}", lambda: self.job(number)["JobState"] not in _ALIVE)
        return self.job(number)

    def wait_for(self, what: str, ready: Callable[[], bool]) -> None:
        """Look again and again.

        Raises:
            TimeoutError: it does not come; the jobs and the daemons' last lines are in the message.
        """
        patience = Patience()
        while not ready():
            if patience.is_over():
                raise TimeoutError(f"waited in vain for {what}\n{self._account()}")
            time.sleep(0.1)

    def _account(self) -> str:
        logs = [f"{log.name}:\n" + "\n".join(log.read_text().splitlines()[-12:]) for log in self.base.glob("*.log")]
        return "\n\n".join([self.command("scontrol", "show", "jobs"), *logs])

    def processes(self, node: str | None = None) -> list[int]:
        """Live processes of jobs, on one node or on all: slurmstepd and whatever it started."""
        ours = f"SLURM_CONF={self.base}/slurm.conf".encode()
        daemons = {daemon.pid for daemon in self._daemons.values()}
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            # A process may end while we look.
            with suppress(OSError):
                variables = (folder / "environ").read_bytes().split(b"\0")
                here = node is None or f"SLURMD_NODENAME={node}".encode() in variables
                if ours in variables and here and int(folder.name) not in daemons:
                    found.append(int(folder.name))
        return found

    def cut_power(self, node: str) -> None:
        """Kill everything of a node at once: slurmd, slurmstepd and the tasks."""
        daemon = self._daemons.pop(f"slurmd-{node}")
        for pid in (daemon.pid, *self.processes(node)):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        daemon.wait()

    def switch_on(self, node: str) -> None:
        # slurmstepd inherits the variable, as the tasks have it from SLURM: `processes` tells the nodes apart by it.
        self._start(f"slurmd-{node}", "slurmd", "-D", "-N", node, SLURMD_NODENAME=node)

    def _start(self, name: str, *command: str, **extra: str) -> None:
        """A daemon in the foreground, which ends with this process if that is killed."""
        with (self.base / f"{name}.log").open("ab") as log:
            self._daemons[name] = subprocess.Popen(
                ["setpriv", "--pdeathsig", "KILL", "--", *command],
                env={**os.environ, "PATH": _PATH, **self.variables, **extra},
                cwd=self.base,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def start(self) -> None:
        """Start the daemons and wait until every node is free."""
        munge = self.base / "munge"
        files = [f"--{kind}-file={munge / kind}" for kind in ("key", "pid", "seed", "log")]
        self._start("munged", "munged", "--foreground", "--force", f"--socket={munge / 'socket'}", *files)
        self.wait_for("munged", (munge / "socket").exists)
        self._start("slurmctld", "slurmctld", "-D")
        for node in self.nodes:
            self.switch_on(node)
        self.wait_until_free()

    def wait_until_free(self) -> None:
        """Wait until every node is up and has no job."""

        def free() -> bool:
            with suppress(RuntimeError):  # slurmctld does not answer before it has read its files
                states = self.command("sinfo", "--noheader", "--Node", "--format=%T").splitlines()
                return states == ["idle"] * len(self.nodes)
            return False

        self.wait_for("free nodes", free)

    def stop(self) -> None:
        """Kill the daemons, then whatever is left of the jobs; the folder stays."""
        for daemon in self._daemons.values():
            daemon.kill()
        for daemon in self._daemons.values():
            daemon.wait()
        while left := self.processes():
            for pid in left:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.05)


@contextmanager
def slurm(nodes: int) -> Iterator[Slurm]:
    """A cluster of so many nodes, ready for jobs; it ends with the block."""
    with ExitStack() as stack:
        # Not below a test's own folder: the path of munged's socket must be short.
        base = Path(
            stack.enter_context(tempfile.TemporaryDirectory(prefix="seqaware-slurm-", ignore_cleanup_errors=True))
        )
        cluster = Slurm(base, tuple(f"127.0.0.{number}" for number in range(1, nodes + 1)))
        _write_files(cluster)
        stack.callback(cluster.stop)
        cluster.start()
        yield cluster


def _write_files(cluster: Slurm) -> None:
    base, host = cluster.base, socket.gethostname().partition(".")[0]
    ports = _free_ports(len(cluster.nodes) + 1)
    settings = _SETTINGS.format(base=base, host=host, ports=ports, user="root")
    size = f"CPUs={CPUS_OF_A_NODE} RealMemory=4000 Gres=gpu:{GPUS_OF_A_NODE} State=UNKNOWN"
    for node, port in zip(cluster.nodes, ports[1:], strict=True):
        settings += f"NodeName={node} NodeHostname={host} NodeAddr={node} Port={port} {size}\n"
        (base / f"spool-{node}").mkdir()
    (base / "slurm.conf").write_text(settings)
    # Not used, but slurmd dies without it where no cgroups are mounted.
    (base / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")
    # A GPU must be a device: each is another name of the one that takes everything and gives nothing.
    (base / "gres.conf").write_text(f"Name=gpu File={base}/gpu[0-{GPUS_OF_A_NODE - 1}]\n")
    for number in range(GPUS_OF_A_NODE):
        (base / f"gpu{number}").symlink_to("/dev/null")
    (base / "state").mkdir()
    munge = base / "munge"
    munge.mkdir()
    key = munge / "key"
    key.touch(mode=0o600)
    key.write_bytes(os.urandom(128))
    for folder in (base, munge):
        folder.chmod(0o711)


def _free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [int(probe.getsockname()[1]) for probe in probes]
