"""Variables that bite, and nothing said about those that do not."""

from __future__ import annotations

import pytest

from seqaware.doctor import environment
from seqaware.doctor.environment import HostFacts, limits, matching_interfaces, variables
from seqaware.doctor.findings import Level

HOST = HostFacts(ranks=4, cores=32, gpus=8, interfaces=("lo", "eth0", "eth1", "ib0"))
GOOD = {"OMP_NUM_THREADS": "8"}
SECRET = "hf_QQsecretQQ"


def found(env: dict[str, str], host: HostFacts = HOST) -> dict[str, Level]:
    """Subject -> level of whatever is not well."""
    return {each.subject: each.level for each in variables({**GOOD, **env}, host) if each.level is not Level.OK}


@pytest.mark.parametrize(
    ("env", "level"),
    [
        ({"CUDA_LAUNCH_BLOCKING": "1"}, Level.WARNING),
        ({"NCCL_P2P_DISABLE": "1"}, Level.WARNING),
        ({"NCCL_IB_DISABLE": "true"}, Level.WARNING),
        ({"NCCL_DEBUG": "trace"}, Level.WARNING),
        ({"TORCH_DISTRIBUTED_DEBUG": "DETAIL"}, Level.WARNING),
        ({"TORCH_NCCL_ASYNC_ERROR_HANDLING": "0"}, Level.WARNING),
        ({"NVIDIA_TF32_OVERRIDE": "1"}, Level.WARNING),
        ({"CUDA_VISIBLE_DEVICES": ""}, Level.WARNING),
        ({"CUDA_VISIBLE_DEVICES": "-1"}, Level.WARNING),
        ({"CUDA_VISIBLE_DEVICES": "0,1,2,8"}, Level.ERROR),
        ({"CUDA_VISIBLE_DEVICES": "0,1"}, Level.ERROR),
        ({"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "0,1,2,3"}, Level.WARNING),
        ({"OMP_NUM_THREADS": "16"}, Level.WARNING),
        ({"OMP_NUM_THREADS": "all"}, Level.ERROR),
        ({"NCCL_SOCKET_IFNAME": "ens"}, Level.ERROR),
        ({"NCCL_SOCKET_IFNAME": "=eth"}, Level.ERROR),
        ({"GLOO_SOCKET_IFNAME": "eth"}, Level.ERROR),
        ({"NCCL_IB_HCA": "mlx9_0"}, Level.WARNING),
        ({"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments"}, Level.ERROR),
        ({"PYTORCH_CUDA_ALLOC_CONF": "expandable_segment:True"}, Level.WARNING),
        ({"PYTORCH_ALLOC_CONF": "max_split_size_mb:"}, Level.ERROR),
        ({"TOKENIZERS_PARALLELISM": "false"}, Level.WARNING),
    ],
)
def test_what_bites_is_told(env: dict[str, str], level: Level) -> None:
    subject = next(iter(env))
    assert found(env) == {subject: level}
    told = next(each for each in variables({**GOOD, **env}, HOST) if each.subject == subject)
    assert told.do, "a person is told what to do"


@pytest.mark.parametrize(
    "env",
    [
        {},
        {"CUDA_LAUNCH_BLOCKING": "0", "NCCL_P2P_DISABLE": "0"},
        {"NCCL_DEBUG": "INFO", "TORCH_DISTRIBUTED_DEBUG": "OFF"},
        {"CUDA_VISIBLE_DEVICES": "0,1,2,3"},
        {"CUDA_VISIBLE_DEVICES": "GPU-8a2c,GPU-8a2d,GPU-8a2e,GPU-8a2f"},
        {"NCCL_SOCKET_IFNAME": "eth"},
        {"NCCL_SOCKET_IFNAME": "^docker,lo"},
        {"NCCL_SOCKET_IFNAME": "=ib0,eth0"},
        {"GLOO_SOCKET_IFNAME": "ib0"},
        {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True,roundup_power2_divisions:[256:1,512:2,>:8]"},
        {"RANK": "0", "WORLD_SIZE": "4", "LOCAL_RANK": "0", "MASTER_PORT": "1"},
    ],
)
def test_what_does_not_bite_is_not_told(env: dict[str, str]) -> None:
    assert found(env) == {}


def test_many_ranks_without_a_number_of_threads() -> None:
    told = [each for each in variables({}, HOST) if each.subject == "OMP_NUM_THREADS"]
    assert [each.do for each in told] == ["export OMP_NUM_THREADS=8"]
    alone = HostFacts(ranks=1, cores=32, gpus=0, interfaces=())
    assert not [each for each in variables({}, alone) if each.level is not Level.OK]


def test_more_ranks_than_cores() -> None:
    crowded = HostFacts(ranks=4, cores=2, gpus=0, interfaces=())
    assert found({"OMP_NUM_THREADS": "1"}, crowded) == {"cores": Level.WARNING, "OMP_NUM_THREADS": Level.WARNING}


def test_what_a_shell_keeps_of_a_launcher() -> None:
    assert found({"RANK": "0", "WORLD_SIZE": "4"}) == {"RANK": Level.WARNING}


def test_secrets_are_set_or_not_set() -> None:
    env = {**GOOD, "HF_TOKEN": SECRET, "HF_HUB_OFFLINE": "1", "WANDB_API_KEY": ""}
    text = "".join(f"{each.found} {each.do}" for each in variables(env, HOST))
    assert "HF_TOKEN set, WANDB_API_KEY not set" in text
    assert SECRET not in text


@pytest.mark.parametrize(
    ("written", "exact", "chosen"),
    [
        ("eth", False, ["eth0", "eth1"]),
        ("=eth0", False, ["eth0"]),
        ("^eth", False, ["lo", "ib0"]),
        ("^=eth0", False, ["lo", "eth1", "ib0"]),
        ("eth1,ib", False, ["eth1", "ib0"]),
        ("eth0,ib0", True, ["eth0", "ib0"]),
        ("eth", True, []),
    ],
)
def test_lists_of_interfaces(written: str, exact: bool, chosen: list[str]) -> None:
    assert matching_interfaces(written, HOST.interfaces, exact=exact) == chosen


def test_limits_of_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment.resource, "getrlimit", lambda which: (1024, 1024))
    monkeypatch.setattr(environment, "_SHARED_MEMORY_BYTES", 2**60)
    assert [each.subject for each in limits(infiniband=True)] == ["open files", "locked memory", "shared memory"]
    monkeypatch.setattr(environment.resource, "getrlimit", lambda which: (-1, -1))
    monkeypatch.setattr(environment, "_SHARED_MEMORY_BYTES", 0)
    assert list(limits(infiniband=True)) == []
