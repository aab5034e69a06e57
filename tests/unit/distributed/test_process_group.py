"""Which launcher started us, told from the environment each of them leaves."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from seqaware.distributed.launch_environment import expand_hostlist, hostnames
from seqaware.distributed.process_group import find_address
from seqaware.errors import ConfigError


def test_nothing_started_us() -> None:
    address = find_address({})
    assert (address.rank, address.size, address.launcher) == (0, 1, "none")


def test_torchrun() -> None:
    env = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4", "MASTER_ADDR": "n1"}
    address = find_address({**env, "MASTER_PORT": "1234"})
    assert (address.rank, address.size, address.local_rank, address.local_size, address.nodes) == (5, 8, 1, 4, 2)
    assert (address.master_address, address.master_port) == ("n1", 1234)
    assert (address.launcher, find_address({**env, "TORCHELASTIC_RUN_ID": "none"}).launcher) == (
        "variables",
        "torchrun",
    )


def test_deepspeed_launcher_says_local_size() -> None:
    env = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    assert find_address(env).nodes == 1


def test_hosts_with_different_numbers_of_ranks() -> None:
    """Three ranks on one host and one on the other: both count two hosts."""
    env = {"WORLD_SIZE": "4", "MASTER_ADDR": "n1", "CROSS_SIZE": "2"}
    large = find_address({**env, "RANK": "2", "LOCAL_RANK": "2", "LOCAL_SIZE": "3"})
    small = find_address({**env, "RANK": "3", "LOCAL_RANK": "0", "LOCAL_SIZE": "1"})
    assert (large.nodes, small.nodes) == (2, 2)
    assert (large.local_size, small.local_size, small.launcher) == (3, 1, "deepspeed")


def test_ranks_started_by_hand_on_several_hosts_say_how_many_are_here() -> None:
    env = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "n1", "LOCAL_RANK": "0"}
    with pytest.raises(ConfigError, match="LOCAL_WORLD_SIZE"):
        find_address(env)
    assert find_address({**env, "MASTER_ADDR": "127.0.0.1"}).local_size == 2


def test_rank_outside_the_world_is_refused() -> None:
    with pytest.raises(ConfigError, match="RANK"):
        find_address({"RANK": "2", "WORLD_SIZE": "2"})


SRUN = {
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_STEP_NUM_NODES": "2",
    "SLURM_STEP_NODELIST": "gpu[07-08]",
    "SLURM_JOB_ID": "4711",
    "SLURM_JOB_START_TIME": "1764000000",
    "SLURM_JOB_END_TIME": "1764003600",
}


def test_srun() -> None:
    address = find_address(SRUN)
    assert (address.rank, address.size, address.local_rank, address.nodes) == (3, 4, 1, 2)
    assert address.master_address == "gpu07"
    assert address.launcher == "srun"
    assert (address.job_began, address.job_ends) == (1764000000.0, 1764003600.0)


def test_srun_tasks_derive_the_same_port() -> None:
    other = find_address({**SRUN, "SLURM_PROCID": "0", "SLURM_LOCALID": "0"})
    assert other.master_port == find_address(SRUN).master_port


def test_batch_script_is_no_srun_task() -> None:
    batch = {key: value for key, value in SRUN.items() if key != "SLURM_STEP_ID"}
    assert find_address(batch).launcher == "none"


@pytest.mark.parametrize(
    ("tasks", "node", "size", "here"),
    [("2,1", "0", 3, 2), ("2,1", "1", 3, 1), ("2(x3),1", "2", 7, 2), ("2(x3),1", "3", 7, 1), ("4(x2)", "1", 8, 4)],
)
def test_srun_with_different_numbers_of_tasks_per_node(tasks: str, node: str, size: int, here: int) -> None:
    step = {"SLURM_STEP_NUM_TASKS": str(size), "SLURM_STEP_TASKS_PER_NODE": tasks, "SLURM_NODEID": node}
    assert find_address({**SRUN, **step}).local_size == here


@pytest.mark.parametrize("tasks", ["2,1", "2(x2", "", "4"])
def test_srun_with_tasks_that_do_not_add_up_is_refused(tasks: str) -> None:
    with pytest.raises(ConfigError, match="SLURM_STEP_TASKS_PER_NODE"):
        find_address({**SRUN, "SLURM_STEP_TASKS_PER_NODE": tasks, "SLURM_NODEID": "1"})


@pytest.mark.parametrize(
    "env",
    [
        {"WORLD_SIZE": "8"},
        {"WORLD_SIZE": "8", "LOCAL_RANK": "3", "MASTER_ADDR": "n1"},
        {"RANK": "3"},
        {**SRUN, "WORLD_SIZE": "2"},
        {**SRUN, "RANK": "0"},
    ],
)
def test_variables_that_contradict_each_other_are_refused(env: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match=r"RANK|WORLD_SIZE"):
        find_address(env)
    assert find_address(env, check=False).size == (4 if "SLURM_STEP_ID" in env else 1)


@pytest.mark.parametrize("port", ["-1", "65536", "99999"])
def test_a_port_beyond_the_last_one_is_refused(port: str) -> None:
    ranks = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    with pytest.raises(ConfigError, match="MASTER_PORT is not a port"):
        find_address({**ranks, "MASTER_PORT": port})


def test_variables_that_agree_with_the_launcher_are_let_through() -> None:
    assert find_address({**SRUN, "WORLD_SIZE": "4", "RANK": "3"}).size == 4
    assert find_address({**SRUN, "WORLD_SIZE": "4"}).launcher == "srun"
    assert find_address({"WORLD_SIZE": "1"}).size == 1


def test_one_rank_in_a_job_of_several_tasks_is_told_why_it_is_alone() -> None:
    batch = {"SLURM_JOB_ID": "4711", "SLURM_NTASKS": "8", "SLURM_PROCID": "0"}
    alone = find_address(batch).alone
    assert alone is not None and "8 tasks" in alone and "srun" in alone
    # Every task of the step starts a launcher of its own, each with one rank.
    each = find_address({**SRUN, "RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}, check=False)
    assert each.alone is not None and "4 tasks" in each.alone
    assert find_address(SRUN).alone is None
    assert find_address({**batch, "SLURM_NTASKS": "1"}).alone is None


@pytest.mark.parametrize(
    ("hostlist", "hosts"),
    [
        ("localhost", ["localhost"]),
        ("n1,n2", ["n1", "n2"]),
        ("n[1-3,7],gpu01", ["n1", "n2", "n3", "n7", "gpu01"]),
        ("a[009-011]-ib", ["a009-ib", "a010-ib", "a011-ib"]),
        ("rack[1-2]n[3-4]", ["rack1n3", "rack1n4", "rack2n3", "rack2n4"]),
        ("x[1,3]y[09-10],z", ["x1y09", "x1y10", "x3y09", "x3y10", "z"]),
    ],
)
def test_hostlists(hostlist: str, hosts: list[str]) -> None:
    assert expand_hostlist(hostlist) == hosts


def _range(first: int, length: int, width: int) -> str:
    return f"{first:0{width}d}" + (f"-{first + length:0{width}d}" if length else "")


_RANGES = st.builds(_range, st.integers(0, 120), st.integers(0, 12), st.integers(1, 4))
_BRACKETS = st.lists(_RANGES, min_size=1, max_size=3).map(lambda ranges: f"[{','.join(ranges)}]")
_LETTERS = st.text("abcxyz-", min_size=1, max_size=3).map(lambda text: f"n{text}")
_PLAIN = st.builds("{}{}".format, _LETTERS, st.sampled_from(["", "1", "007"]))


def _names(brackets: int) -> st.SearchStrategy[str]:
    """A prefix and so many brackets; `scontrol` takes nothing behind the last one."""
    numbered = st.lists(st.builds("{}{}".format, _LETTERS, _BRACKETS), min_size=1, max_size=brackets)
    return st.one_of(_PLAIN, numbered.map("".join))


@pytest.fixture(scope="module")
def scontrol(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A configuration with which `scontrol` expands names; it asks no daemon."""
    if shutil.which("scontrol") is None:
        pytest.skip("not installed: scontrol (Debian: slurm-wlm)")
    path = tmp_path_factory.mktemp("scontrol") / "slurm.conf"
    path.write_text("ClusterName=none\nSlurmctldHost=localhost\nNodeName=localhost\nPartitionName=p Nodes=ALL\n")
    return path


def _by_scontrol(hostlist: str, conf: Path) -> list[str]:
    command = ["scontrol", "show", "hostnames", hostlist]
    env = {"SLURM_CONF": str(conf), "PATH": "/usr/bin:/bin:/usr/local/bin"}
    return subprocess.run(command, env=env, capture_output=True, text=True, check=True).stdout.split()


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(names=st.lists(_names(brackets=2), min_size=1, max_size=4))
def test_hostlists_are_those_of_scontrol(scontrol: Path, names: list[str]) -> None:
    hostlist = ",".join(names)
    assert expand_hostlist(hostlist) == _by_scontrol(hostlist, scontrol)


@given(name=_names(brackets=4))
def test_hostlists_of_many_brackets_hold_the_names_of_scontrol(scontrol: Path, name: str) -> None:
    """SLURM 22.05 varies the second of three brackets slowest; the first host, where ranks meet, is the same."""
    ours, theirs = expand_hostlist(name), _by_scontrol(name, scontrol)
    assert (ours[0], sorted(ours)) == (theirs[0], sorted(theirs))


def test_hostnames_asks_scontrol_and_does_without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "scontrol"
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    program.write_text('#!/bin/sh\n[ "$*" = "show hostnames n[1-2]" ] && printf "of\\nscontrol\\n"\n')
    program.chmod(0o755)
    assert hostnames("n[1-2]") == ["of", "scontrol"]
    program.write_text("#!/bin/sh\nexit 1\n")
    assert hostnames("n[1-2]") == ["n1", "n2"]
    assert hostnames("n1,n2") == ["n1", "n2"]
