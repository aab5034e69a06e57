"""Who started this process, which rank it is, and where the ranks meet: read out of the variables that launchers leave.

Imports without torch: a rank can tell who it is before the slow imports.
"""

from __future__ import annotations

import fcntl
import itertools
import re
import shutil
import socket
import struct
import subprocess
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass

from seqaware.distributed.mpi import load_mpi
from seqaware.errors import ConfigError

LAUNCHERS = ("torchrun", "deepspeed", "variables", "srun", "mpirun", "none")
_MPI_SIZE_VARIABLES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE")
_DEFAULT_PORT = 29500
_LAST_PORT = 65_535
_SIOCGIFADDR = 0x8915  # linux/sockios.h: the address of an interface
_SCONTROL_SECONDS = 10.0


@dataclass(frozen=True)
class LaunchEnvironment:
    """One process among those of the run, and where they meet.

    Attributes:
        rank, size: global; local_rank, local_size: on this host; nodes: number of hosts.
        launcher: which of LAUNCHERS started the process; "variables": something else that sets torch's variables.
        master_address, master_port: where rank 0's store listens.
        job: the batch system's number for the job, if there is one.
        job_began, job_ends: since when the job runs and when the batch system will end it, in seconds since 1970 by the
            batch system's clock; None where it has not said.
        alone: why one rank is probably not what was meant; None where nothing speaks against it.
    """

    rank: int
    size: int
    local_rank: int
    local_size: int
    nodes: int
    launcher: str
    master_address: str
    master_port: int
    job_began: float | None = None
    job_ends: float | None = None
    job: str | None = None
    alone: str | None = None


def read_launch_environment(env: Mapping[str, str]) -> LaunchEnvironment:
    """Which launcher set these variables, and which rank they make of this process.

    Raises:
        ConfigError: they contradict each other, or mpirun's library cannot be loaded.
        ValueError: one that counts is no number.
    """
    if "RANK" in env and "WORLD_SIZE" in env:
        return _from_torch_variables(env)
    # SLURM_STEP_ID tells srun's tasks from the batch script, which carries SLURM_PROCID and SLURM_NTASKS as well.
    if "SLURM_STEP_ID" in env and "SLURM_PROCID" in env:
        return _from_slurm(env)
    if any(int(env.get(name, "1")) > 1 for name in _MPI_SIZE_VARIABLES):
        return _from_mpi(env)
    return LaunchEnvironment(0, 1, 0, 1, 1, "none", "127.0.0.1", free_port())


def check_variables(env: Mapping[str, str], address: LaunchEnvironment) -> None:
    """Refuse variables of torch that say otherwise than the launcher that was found.

    `WORLD_SIZE=8` without `RANK` is the common case: every process would take itself for the only one.

    Raises:
        ConfigError: RANK or WORLD_SIZE differs from the rank or size in `address`, or MASTER_PORT is not a port.
        ValueError: one of them is no number.
    """
    for name, value in (("WORLD_SIZE", address.size), ("RANK", address.rank)):
        if int(env.get(name, value)) == value:
            continue
        if address.launcher == "none":
            missing = "RANK" if name == "WORLD_SIZE" else "WORLD_SIZE"
            raise ConfigError(
                f"{name} is set without {missing}: this process would train alone",
                got=f"{name}={env[name]}",
                do="start the ranks with torchrun, deepspeed, srun or mpirun; "
                f"or set RANK, WORLD_SIZE, LOCAL_RANK and LOCAL_WORLD_SIZE; or unset {name}",
            )
        raise ConfigError(
            f"{name} contradicts the variables of {address.launcher}",
            got=f"{name}={env[name]} on rank {address.rank} of {address.size}",
            do=f"unset {name}",
        )
    # 0: rank 0 takes a free one and tells the others.
    if not 0 <= address.master_port <= _LAST_PORT:
        do = f"set it to a free port of the first host, at most {_LAST_PORT:,}"
        raise ConfigError("MASTER_PORT is not a port", got=address.master_port, do=do)


def why_alone(env: Mapping[str, str], address: LaunchEnvironment) -> str | None:
    """Why this one rank is probably not the whole run: its SLURM job has several tasks. None where nothing says so.

    The usual causes are `python` without `srun` in a batch script, and a launcher of one rank under `srun`.
    """
    tasks = max(int(env.get(name, "1")) for name in ("SLURM_NTASKS", "SLURM_STEP_NUM_TASKS"))
    if address.size > 1 or tasks == 1:
        return None
    return f"this rank runs alone, but its SLURM job has {tasks} tasks; start one rank per task with srun"


def _from_torch_variables(env: Mapping[str, str]) -> LaunchEnvironment:
    rank, size = int(env["RANK"]), int(env["WORLD_SIZE"])
    if not 0 <= rank < size:
        raise ConfigError("RANK must lie in [0, WORLD_SIZE)", got=f"RANK={rank}, WORLD_SIZE={size}")
    master = env.get("MASTER_ADDR", "127.0.0.1")
    local_size = _local_size(env, size, master=master)
    by_torchrun, by_deepspeed = "TORCHELASTIC_RUN_ID" in env, "CROSS_SIZE" in env
    # Hosts may have different numbers of ranks, so the launcher's own count of hosts comes first.
    nodes = env.get("GROUP_WORLD_SIZE", env.get("CROSS_SIZE", max(1, size // local_size)))
    return LaunchEnvironment(
        rank=rank,
        size=size,
        local_rank=int(env.get("LOCAL_RANK", rank % local_size)),
        local_size=local_size,
        nodes=int(nodes),
        launcher="torchrun" if by_torchrun else "deepspeed" if by_deepspeed else "variables",
        master_address=master,
        master_port=int(env.get("MASTER_PORT", _DEFAULT_PORT)),
    )


def _local_size(env: Mapping[str, str], size: int, *, master: str) -> int:
    for name in ("LOCAL_WORLD_SIZE", "LOCAL_SIZE"):
        if name in env:
            return int(env[name])
    if size == 1 or master == "localhost" or master.startswith("127."):
        return size
    # No guess: ranks that took those of another host for their own would wait for its memory for ever.
    raise ConfigError(
        "RANK and WORLD_SIZE are set, but not how many of the ranks are on this host",
        got=f"WORLD_SIZE={size}, MASTER_ADDR={master}",
        do="set LOCAL_WORLD_SIZE, and LOCAL_RANK from 0 on; torchrun and deepspeed do",
    )


def _from_slurm(env: Mapping[str, str]) -> LaunchEnvironment:
    size = int(env.get("SLURM_STEP_NUM_TASKS", env.get("SLURM_NTASKS", "1")))
    nodes = int(env.get("SLURM_STEP_NUM_NODES", env.get("SLURM_NNODES", "1")))
    hosts = hostnames(env.get("SLURM_STEP_NODELIST", env.get("SLURM_NODELIST", "localhost")))
    # Every task derives the same port from the job, and two jobs on one host get different ones.
    port = 20000 + (int(env.get("SLURM_JOB_ID", "0")) * 7 + int(env["SLURM_STEP_ID"])) % 20000
    return LaunchEnvironment(
        rank=int(env["SLURM_PROCID"]),
        size=size,
        local_rank=int(env.get("SLURM_LOCALID", "0")),
        local_size=_tasks_here(env, size, nodes=nodes),
        nodes=nodes,
        launcher="srun",
        master_address=env.get("MASTER_ADDR", hosts[0]),
        master_port=int(env.get("MASTER_PORT", port)),
        job_began=_seconds(env, "SLURM_JOB_START_TIME"),
        job_ends=_seconds(env, "SLURM_JOB_END_TIME"),
    )


def _tasks_here(env: Mapping[str, str], size: int, *, nodes: int) -> int:
    """Tasks of the step on this node, of a list such as `2(x3),1`: two on each of three nodes, then one."""
    written = env.get("SLURM_STEP_TASKS_PER_NODE")
    if written is None or "SLURM_NODEID" not in env:
        return max(1, size // nodes)
    runs = [re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part.strip()) for part in written.split(",")]
    counts = [int(run[1]) for run in runs if run for _ in range(int(run[2] or 1))]
    node = int(env["SLURM_NODEID"])
    if None in runs or sum(counts) != size or not 0 <= node < len(counts):
        raise ConfigError(
            "SLURM_STEP_TASKS_PER_NODE contradicts the step's other variables",
            got=f"SLURM_STEP_TASKS_PER_NODE={written}, {size} tasks, SLURM_NODEID={node}",
        )
    return counts[node]


def _seconds(env: Mapping[str, str], name: str) -> float | None:
    return float(env[name]) if name in env else None


def hostnames(hostlist: str) -> Sequence[str]:
    """The names in SLURM's compressed host list, as `scontrol show hostnames` prints them where it can be run."""
    if "[" in hostlist and shutil.which("scontrol"):
        with suppress(OSError, subprocess.TimeoutExpired):
            command = ["scontrol", "show", "hostnames", hostlist]
            done = subprocess.run(command, capture_output=True, text=True, timeout=_SCONTROL_SECONDS, check=False)
            if done.returncode == 0 and done.stdout.strip():
                return done.stdout.split()
    return expand_hostlist(hostlist)


def expand_hostlist(hostlist: str) -> list[str]:
    """SLURM's compressed host list as names: `n[1-3,7],a[1-2]b[3-4]` becomes n1, n2, n3, n7, a1b3, a1b4, a2b3, a2b4.

    For containers, in which there is no `scontrol`. With three brackets in a name, `scontrol` has another order.
    """
    hosts: list[str] = []
    for name in re.findall(r"(?:[^,\[\]]|\[[^\]]*\])+", hostlist):
        pieces = re.split(r"\[([^\]]*)\]", name)  # every second one stood in brackets
        choices = [_numbers(piece) if place % 2 else [piece] for place, piece in enumerate(pieces)]
        hosts += map("".join, itertools.product(*choices))
    return hosts


def _numbers(ranges: str) -> list[str]:
    """The numbers of `08-10,12`, as wide as the first of their range: 08, 09, 10, 12."""
    found: list[str] = []
    for piece in ranges.split(","):
        first, _, last = piece.partition("-")
        found += [f"{number:0{len(first)}d}" for number in range(int(first), int(last or first) + 1)]
    return found


def _from_mpi(env: Mapping[str, str]) -> LaunchEnvironment:
    started = max(int(env.get(name, "1")) for name in _MPI_SIZE_VARIABLES)
    mpi = load_mpi(started)
    world = mpi.COMM_WORLD
    local = world.Split_type(mpi.COMM_TYPE_SHARED)
    leader = (socket.gethostname(), free_port()) if world.rank == 0 else None
    host, port = world.bcast(leader, root=0)
    nodes = world.allreduce(1 if local.rank == 0 else 0)
    same_host = nodes == 1
    return LaunchEnvironment(
        rank=world.rank,
        size=world.size,
        local_rank=local.rank,
        local_size=local.size,
        nodes=nodes,
        launcher="mpirun",
        master_address=env.get("MASTER_ADDR", "127.0.0.1" if same_host else host),
        master_port=int(env.get("MASTER_PORT", port)),
    )


def interface_towards(host: str) -> str | None:
    """The name of the network interface that leads to `host`; None if this host has nothing but its loopback.

    For the host itself, any name of which may stand for its loopback: its first interface.
    """
    own = _interfaces()
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((host, 9))  # sends nothing: it only chooses the way
            chosen = probe.getsockname()[0]
        except OSError:
            chosen = ""
    return own.get(chosen, next(iter(own.values()), None))


def _interfaces() -> dict[str, str]:
    """Names of this host's interfaces by their IPv4 address, without its loopback."""
    found = {}
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            request = struct.pack("256s", name.encode())
            try:
                answer = fcntl.ioctl(probe.fileno(), _SIOCGIFADDR, request)
            except OSError:
                continue  # no IPv4 address
            address = socket.inet_ntoa(answer[20:24])
            if not address.startswith("127."):
                found[address] = name
    return found


def free_port() -> int:
    """A port of this host that nothing listens on now."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])
