"""The doctor: every check of this host, of the hosts in a hostfile, and of all ranks together, as one list."""

from __future__ import annotations

import os
import shlex
import socket
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Literal

from packaging.requirements import Requirement

from seqaware.config.loading import load_config
from seqaware.config.schema import Config
from seqaware.data.store.store_index import store_folder
from seqaware.distributed.launch_environment import LaunchEnvironment
from seqaware.distributed.process_group import gpu_is_visible
from seqaware.doctor import config_checks, environment, gpus, host_probe, network, software
from seqaware.doctor.findings import Check, Finding, Level, examine, of_error, ok
from seqaware.doctor.hosts import ANSWER_SECONDS, ask_hosts, read_hostfile
from seqaware.doctor.rank_checks import SECONDS as TOGETHER_SECONDS
from seqaware.doctor.rank_checks import together
from seqaware.doctor.shared_disk import disk, leases, nearest_existing
from seqaware.errors import SeqawareError
from seqaware.plan.plan import Plan
from seqaware.plan.specs import World


@dataclass(frozen=True)
class DoctorRequest:
    """What the command line asks for.

    Attributes:
        config_path: None to look at the machine alone. ranks: of the run that is meant; None: as many as seem likely.
        environment: as it was when the program started.
    """

    config_path: Path | None
    overrides: Sequence[str]
    deepspeed_path: Path | None
    hostfile: Path | None
    ranks: int | None
    environment: Mapping[str, str]


@dataclass(frozen=True)
class Diagnosis:
    """What was found, on how many hosts. met: all ranks met, so that rank 0 speaks for all of them."""

    findings: Sequence[Finding]
    hosts: int
    met: bool

    @property
    def holds(self) -> bool:
        """Nothing has to be mended before a run."""
        return all(finding.level is not Level.ERROR for finding in self.findings)


@dataclass(frozen=True)
class _Patient:
    """What the checks look at.

    Attributes:
        config, plan: None where there is none, or it is at fault. hosts: of the hostfile. world: of the run.
    """

    request: DoctorRequest
    config: Config | None
    plan: Plan | None
    hosts: Mapping[str, int]
    world: World
    gpus: int

    @property
    def folder(self) -> Path:
        """The run's, or what exists of the way there."""
        return nearest_existing(Path(self.config.output_dir if self.config else "runs"))


def diagnose(request: DoctorRequest, address: LaunchEnvironment) -> Diagnosis:
    """Look at everything. Every rank calls it; the first rank of each host looks at the host."""
    local: list[Finding] = []
    first_of_host = address.local_rank == 0
    patient, written = _admit(request, address)
    if first_of_host:
        local = [*written, *examine(_checks(patient, address))]
    if patient.hosts and address.rank == 0:
        port = address.master_port if address.size > 1 else _port(request)[0]
        asked = partial(ask_hosts, patient.hosts, folder=patient.folder, packages=_packages(), port=port)
        local += examine([Check("hosts", asked, seconds=ANSWER_SECONDS + 5)])
    if address.size == 1:
        return Diagnosis(local, max(1, len(patient.hosts)), met=True)
    meeting = partial(together, address, local, folder=patient.folder, packages=_packages())
    joint = examine([Check("ranks", meeting, seconds=TOGETHER_SECONDS)])
    met = any(finding.subject == "ranks" and finding.level is Level.OK for finding in joint)
    return Diagnosis(joint if met else [*local, *joint], address.nodes, met=met)


def _admit(request: DoctorRequest, address: LaunchEnvironment) -> tuple[_Patient, list[Finding]]:
    """Read what was written: hostfile, config, plan. Whatever cannot be read is a finding."""
    findings: list[Finding] = []
    hosts: Mapping[str, int] = {}
    config, plan = None, None
    if request.hostfile is not None:
        with _told("hostfile", findings):
            hosts = read_hostfile(request.hostfile)
    listed = host_probe.gpus_here()
    world = _world(request, address, hosts=hosts, gpus=listed)
    if request.config_path is not None:
        with _told("config", findings):
            config = load_config(request.config_path, request.overrides)
            findings.append(ok("config", str(request.config_path)))
    if config is not None:
        with _told("plan", findings):
            plan = config_checks.plan_of(config, world=world, deepspeed_path=request.deepspeed_path)
            findings += config_checks.planned(plan)
    return _Patient(request, config, plan, hosts, world, listed), findings


@contextmanager
def _told(subject: str, findings: list[Finding]) -> Iterator[None]:
    try:
        yield
    except SeqawareError as trouble:
        findings.append(of_error(subject, trouble))


def _world(request: DoctorRequest, address: LaunchEnvironment, *, hosts: Mapping[str, int], gpus: int) -> World:
    """The ranks that are meant: those that were started, or those of the hostfile, the job or this host."""
    env = request.environment
    if address.size > 1:
        size, nodes = address.size, address.nodes
    elif hosts:
        size, nodes = sum(hosts.values()), len(hosts)
    else:
        nodes = _number(env.get("SLURM_NNODES"))
        size = nodes * gpus if gpus else max(nodes, _number(env.get("SLURM_NTASKS")))
    size = request.ranks or size
    nodes = nodes if size % nodes == 0 else 1
    device: Literal["cpu", "cuda"] = "cuda" if gpu_is_visible() else "cpu"
    return World(size=size, local_size=size // nodes, nodes=nodes, device=device, bf16=True)


def _number(text: str | None) -> int:
    return int(text) if text and text.isdecimal() and int(text) else 1


def _port(request: DoctorRequest) -> tuple[int, bool]:
    """Where rank 0 will listen, and whether a person has written it."""
    written = request.environment.get("MASTER_PORT", "")
    return (int(written), True) if written.isdecimal() else (network.DEFAULT_PORT, False)


def _packages() -> list[str]:
    """Libraries whose versions must be alike on all hosts."""
    try:
        wanted = [Requirement(line) for line in metadata.requires("seqaware") or ()]
    except metadata.PackageNotFoundError:
        return []
    return [each.name for each in wanted if each.marker is None]


def _checks(patient: _Patient, address: LaunchEnvironment) -> Iterator[Check]:
    """The checks of one host, in the order of the table."""
    env, world = patient.request.environment, patient.world
    torch_cuda = software.torch_cuda()
    nvme = patient.plan is not None and bool(config_checks.drives(patient.plan))
    yield Check("packages", software.packages)
    yield Check("compiler", partial(software.compilers, nvme=nvme))
    if patient.gpus:
        yield Check("nvcc", partial(software.cuda_compiler, torch_cuda=torch_cuda))
    yield Check("GPU", gpus.gpus, seconds=45)
    if patient.gpus and gpu_is_visible():
        hidden = "CUDA_VISIBLE_DEVICES" in env
        yield Check("torch.cuda", partial(gpus.torch_sees, patient.gpus, hidden=hidden), seconds=90)
    slots = patient.hosts.get(socket.gethostname(), max(patient.hosts.values(), default=world.local_size))
    host = environment.HostFacts(
        ranks=address.local_size if address.size > 1 else slots,
        cores=len(os.sched_getaffinity(0)),
        gpus=patient.gpus,
        interfaces=environment.interfaces(),
    )
    yield Check("variables", partial(environment.variables, env, host))
    yield Check("limits", partial(environment.limits, infiniband=Path("/sys/class/infiniband").is_dir()))
    yield Check("host name", partial(network.host_name, hosts=world.nodes))
    if address.size == 1:
        port, chosen = _port(patient.request)
        yield Check("master port", partial(network.master_port, port, chosen=chosen))
    yield Check("run folder", partial(disk, patient.folder, "run folder"), seconds=20)
    yield from _checks_of_config(patient)


def _checks_of_config(patient: _Patient) -> Iterator[Check]:
    config, plan, env = patient.config, patient.plan, patient.request.environment
    hub = config_checks.Hub.of(env)
    yield Check("hub cache", partial(config_checks.cache, hub))
    if config is not None:
        yield Check("model", partial(config_checks.model, config, hub), seconds=90)
        sets = [config.dataset, *([config.evaluation.dataset] if config.evaluation.dataset else [])]
        folders = [Path(config.output_dir), *(store_folder(each) for each in sets)]
        yield Check("lease", partial(leases, folders))
        command = shlex.join(["python", "launcher/prepare.py", str(patient.request.config_path)])
        yield Check("dataset", partial(config_checks.data, config, hub, command=command), seconds=30)
    if plan is not None:
        yield Check("disk", partial(config_checks.run_folder, plan))
        for folder in config_checks.drives(plan):
            yield Check("drive", partial(disk, folder, "drive"), seconds=20)
        yield Check("operators", partial(config_checks.operators, plan, env), seconds=90)
