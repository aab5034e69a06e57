"""The doctor among hosts: over real ssh between them, and started on both as a run is."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from tests import launch
from tests.cluster.hosts import Cluster
from tests.patience import communicate

pytestmark = pytest.mark.distributed

CONFIG = "train_configs/demo.yaml"


def _doctor(cluster: Cluster, command: list[str]) -> tuple[int, str]:
    """On h1, in lines so long that none is broken; pdsh's names of hosts before them are cut off."""
    env = launch.environment(COLUMNS="300")
    process = cluster.start("h1", command, cwd=launch.ROOT, env=env)
    output, _ = communicate(process)
    return process.returncode, re.sub(r"(?m)^h[12]: ", "", output)


@pytest.fixture
def hostfile(tmp_path: Path) -> str:
    (tmp_path / "hosts").write_text("h1 slots=1\nh2 slots=1\n")
    return str(tmp_path / "hosts")


def test_hosts_of_a_hostfile_are_asked_over_ssh(cluster: Cluster, tmp_path: Path, hostfile: str) -> None:
    command = [sys.executable, "launcher/doctor.py", CONFIG, "--hostfile", hostfile]
    code, output = _doctor(cluster, [*command, "--set", f"output.dir={tmp_path}/run"])
    assert code == 0, output
    assert re.search(r"ok +hosts +2 with 2 slots; all answer over ssh without a password", output)
    assert re.search(r"ok +run folder +one and the same on all 2 hosts", output)
    assert re.search(r"ok +ports +all 2 hosts reach this one", output)
    assert re.search(r"ok +same software +Python, libraries and program are alike on all 2 hosts", output)
    assert re.search(r"ok +clocks +alike on all 2 hosts", output)


def test_ranks_on_two_hosts_that_share_no_folder(cluster: Cluster, hostfile: str) -> None:
    """/run is each host's own: a run could not write its checkpoints there together."""
    program = str(Path(sys.executable).parent / "deepspeed")
    command = [program, "--hostfile", hostfile, "--master_port", str(launch.free_port()), "launcher/doctor.py", CONFIG]
    code, output = _doctor(cluster, [*command, "--set", "output.dir=/run/doctor"])
    assert code == 2, output
    assert re.search(r"ok +ranks +all 2 meet, on 2 hosts", output)
    assert re.search(r"ok +all-reduce +gloo: \d", output)
    assert re.search(r"ERROR +run folder +h2 does not see this host's files there: No such file", output)
    assert "output.dir on a disk that all hosts share" in output
    assert re.search(r"(?m)^1 error, ", output)


def test_a_host_that_cannot_be_reached(cluster: Cluster, tmp_path: Path) -> None:
    (tmp_path / "hosts").write_text("h2 slots=1\n10.77.8.99 slots=1\n")
    command = [sys.executable, "launcher/doctor.py", "--hostfile", str(tmp_path / "hosts")]
    code, output = _doctor(cluster, command)
    assert code == 2, output
    assert re.search(r"ERROR +host 10\.77\.8\.99 +ssh: .*(No route|timed out)", output)
    assert "see that" in output
