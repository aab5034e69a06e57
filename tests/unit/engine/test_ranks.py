"""Which launcher started us, told from the environment each of them leaves."""

from __future__ import annotations

import pytest

from seqaware.engine.address import expand_hostlist
from seqaware.engine.ranks import find_address
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
    ("hostlist", "hosts"),
    [
        ("localhost", ["localhost"]),
        ("n1,n2", ["n1", "n2"]),
        ("n[1-3,7],gpu01", ["n1", "n2", "n3", "n7", "gpu01"]),
        ("a[009-011]-ib", ["a009-ib", "a010-ib", "a011-ib"]),
    ],
)
def test_hostlists(hostlist: str, hosts: list[str]) -> None:
    assert expand_hostlist(hostlist) == hosts
