"""Versions, ports, disks and settings of one host."""

from __future__ import annotations

import fcntl
import os
import socket
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from seqaware.config.loading import load_config
from seqaware.doctor import config_checks, gpus, host_probe, network, shared_disk, software
from seqaware.doctor.findings import Finding, Level
from seqaware.doctor.shared_disk import disk, file_system, nearest_existing
from seqaware.errors import ConfigError
from seqaware.locks import lease_of
from tests.launch import free_port
from tests.unit.plan.test_plan import plan


def levels(found: list[Finding]) -> list[tuple[str, Level]]:
    return [(each.subject, each.level) for each in found]


def test_this_environment_is_what_is_asked_for() -> None:
    told = list(software.packages())
    assert {each.level for each in told} == {Level.OK}, told
    assert [each.subject for each in told] == ["seqaware", "python", "torch", "deepspeed", "transformers", "libraries"]


def test_libraries_that_do_not_fit() -> None:
    wanted = [Requirement("torch>=99"), Requirement("no-such-library"), Requirement("numpy>=1")]
    torch, absent, others = software.libraries(wanted)
    assert torch.level is Level.ERROR and f"{metadata.version('torch')}; wanted: >=99" in torch.found
    assert absent.level is Level.ERROR and "not installed" in absent.found
    assert others.level is Level.OK and "1 more" in others.found


def test_what_torch_was_built_for_is_read_without_it() -> None:
    import torch

    assert software.torch_cuda() == torch.version.cuda


def test_without_compilers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(software, "find_library", lambda name: None)
    told = list(software.compilers(nvme=True))
    assert levels(told) == [("compiler", Level.WARNING), ("ninja", Level.WARNING), ("libaio", Level.ERROR)]
    assert levels(list(software.cuda_compiler(torch_cuda="13.0"))) == [("nvcc", Level.WARNING)]
    assert list(software.cuda_compiler(torch_cuda=None)) == []


def test_nvcc_of_another_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "nvcc").write_text("#!/bin/sh\necho 'Cuda compilation tools, release 12.4, V12.4.131'\n")
    (tmp_path / "nvcc").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    assert levels(list(software.cuda_compiler(torch_cuda="13.0"))) == [("nvcc", Level.WARNING)]
    assert levels(list(software.cuda_compiler(torch_cuda="12.8"))) == [("nvcc", Level.OK)]


def test_gpus_that_torch_cannot_use() -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("this torch can use them")
    (told,) = gpus.torch_sees(8, hidden=False)
    assert told.level is Level.ERROR and told.do


def test_ports() -> None:
    with socket.create_server(("", 0)) as server:
        port = server.getsockname()[1]
        assert levels(list(network.master_port(port, chosen=False))) == [("master port", Level.WARNING)]
        assert levels(list(network.master_port(port, chosen=True))) == [("master port", Level.ERROR)]
        assert host_probe.why_unreachable("127.0.0.1", port) is None
        with network.Listener.on(port) as other:  # in use: on another one
            assert other.port != port
            assert host_probe.why_unreachable("127.0.0.1", other.port) is None
    port = free_port()
    assert levels(list(network.master_port(port, chosen=True))) == [("master port", Level.OK)]
    assert host_probe.why_unreachable("127.0.0.1", port) == "Connection refused"
    assert network.address_towards("127.0.0.1") == "127.0.0.1"


def test_a_name_that_is_loopback_matters_to_others_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "gethostbyname", lambda name: "127.0.1.1")
    assert levels(list(network.host_name(hosts=1))) == [("host name", Level.OK)]
    assert levels(list(network.host_name(hosts=2))) == [("host name", Level.WARNING)]

    def nowhere(name: str) -> str:
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "gethostbyname", nowhere)
    assert levels(list(network.host_name(hosts=1))) == [("host name", Level.WARNING)]
    assert levels(list(network.host_name(hosts=2))) == [("host name", Level.ERROR)]


@pytest.fixture
def quick_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_disk, "_MOST_BYTES", 2**23)
    monkeypatch.setattr(shared_disk, "_SLOW_MEGABYTES", 0)
    monkeypatch.setattr(shared_disk, "_SLOW_SYNC_SECONDS", 1e9)


def test_a_disk_that_does_what_a_run_needs(tmp_path: Path, quick_disk: None) -> None:
    told = list(disk(tmp_path, "run folder"))
    assert levels(told) == [("run folder speed", Level.OK), ("run folder", Level.OK)]
    assert f"{tmp_path} on {file_system(tmp_path)}" in told[1].found and "unknown" not in told[1].found
    assert list(tmp_path.iterdir()) == []


def test_a_slow_disk(tmp_path: Path, quick_disk: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_disk, "_SLOW_MEGABYTES", 10**9)
    assert levels(list(disk(tmp_path, "drive")))[0] == ("drive speed", Level.WARNING)


def test_a_disk_without_locks(tmp_path: Path, quick_disk: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(file: object, operation: int) -> None:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", refused)
    told = list(disk(tmp_path, "run folder"))
    assert ("file locks", Level.WARNING) in levels(told)
    monkeypatch.setattr(fcntl, "flock", lambda file, operation: None)
    (locks,) = (each for each in disk(tmp_path, "run folder") if each.level is Level.ERROR)
    assert locks.found == "two processes both get the same lock"


def test_leases_are_listed_with_their_owners(tmp_path: Path) -> None:
    runs, stores = tmp_path / "run", tmp_path / "stores"
    (stores / "rows").mkdir(parents=True)
    runs.mkdir()
    assert list(shared_disk.leases([runs, stores])) == []
    foreign = stores / "rows" / "verified.lease"
    foreign.write_text("filelock/2\npid=7\nhost=other\nmode=lease\ntoken=0123\nduration=180.0\n")
    os.utime(foreign, (1e9, 1e9))
    with lease_of(runs / ".lock"):
        mine, other = shared_disk.leases([runs, stores])
    assert mine.level is Level.OK and f"process {os.getpid()} on host {socket.gethostname()}" in mine.found
    assert other.level is Level.WARNING and "process 7 on host other" in other.found and "expired" in other.found


def test_a_folder_that_cannot_be_written() -> None:
    (told,) = disk(Path("/proc"), "run folder")
    assert told.level is Level.ERROR and "/proc cannot be written" in told.found and told.do


def test_an_output_folder_that_is_a_file() -> None:
    written = load_config(None, ["output.dir=/dev/null/x", "dataset.name=gsm8k"])
    with pytest.raises(ConfigError, match=r"output\.dir is not a folder"):
        list(config_checks.run_folder(plan(written)))


def test_the_way_to_a_folder_that_is_not_there(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert nearest_existing(tmp_path / "a" / "b") == tmp_path
    assert nearest_existing(tmp_path / "file" / "b") == tmp_path


def test_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    env = {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1", "HF_ENDPOINT": f"http://127.0.0.1:{free_port()}"}
    offline = config_checks.Hub.of(env)
    assert offline.cache == tmp_path / "hub"
    (told,) = config_checks._of_hub("model", "someone/model", "model", offline)
    assert told.level is Level.ERROR and "HF_HUB_OFFLINE is set" in told.found
    (told,) = config_checks._of_hub(
        "model", "someone/model", "model", config_checks.Hub.of({**env, "HF_HUB_OFFLINE": "0"})
    )
    assert told.level is Level.ERROR and "the hub does not answer: " in told.found
    (tmp_path / "hub" / "models--someone--model" / "snapshots").mkdir(parents=True)
    (told,) = config_checks._of_hub("model", "someone/model", "model", offline)
    assert told.level is Level.OK
    monkeypatch.setattr(config_checks, "_SLOW_MEGABYTES", 0)
    assert levels(list(config_checks.cache(offline))) == [("hub cache", Level.OK)]
    monkeypatch.setattr(config_checks, "_SLOW_MEGABYTES", 10**9)
    assert levels(list(config_checks.cache(offline))) == [("hub cache", Level.WARNING)]
    monkeypatch.setattr(config_checks, "_CACHE_BYTES", 10**30)
    assert levels(list(config_checks.cache(offline))) == [("hub cache", Level.WARNING)]
    (told,) = config_checks.cache(config_checks.Hub.of({"HF_HUB_CACHE": "/proc/hub"}))
    assert told.level is Level.WARNING and "/proc/hub cannot be written" in told.found
