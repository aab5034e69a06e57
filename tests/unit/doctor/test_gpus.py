"""What nvidia-smi prints, read as a person reads it. The texts are in its format; no GPU is needed."""

from __future__ import annotations

from pathlib import Path

import pytest

from seqaware.doctor.findings import Level
from seqaware.doctor.gpus import Gpu, gpus, judge, links, parse_gpus, parse_links

TWO = """NVIDIA H100 80GB HBM3, 81559, 4, 570.124.06, 0
NVIDIA H100 80GB HBM3, 81559, 40211, 570.124.06, 2
"""
OLD = "Tesla T4, 15360, 0, 535.104.05, [N/A]\n"
NVLINK = """\t\x1b[4mGPU0\tGPU1\tGPU2\tCPU Affinity\tNUMA Affinity\x1b[0m
GPU0\t X \tNV18\tNV18\t0-51\t0
GPU1\tNV18\t X \tNV18\t0-51\t0
GPU2\tNV18\tNV18\t X \t52-103\t1

Legend:

  X    = Self
  SYS  = Connection traversing PCIe as well as the SMP interconnect between NUMA nodes
"""
MIXED = """\tGPU0\tGPU1\tGPU2\tGPU3\tNIC0
GPU0\t X \tNV4\tSYS\tSYS\tPXB
GPU1\tNV4\t X \tSYS\tSYS\tPXB
GPU2\tSYS\tSYS\t X \tNV4\tSYS
GPU3\tSYS\tSYS\tNV4\t X \tSYS
NIC0\tPXB\tPXB\tSYS\tSYS\t X
"""


def test_cards_in_use_and_with_errors() -> None:
    found = parse_gpus(TWO)
    assert found[1] == Gpu("NVIDIA H100 80GB HBM3", 81559, 40211, "570.124.06", 2)
    told = list(judge(found))
    assert told[0].level is Level.OK and "2 x NVIDIA H100 80GB HBM3, 80 GiB, driver 570.124.06" in told[0].found
    assert [(each.level, each.subject) for each in told[1:]] == [(Level.WARNING, "GPU 1"), (Level.ERROR, "GPU 1")]


def test_cards_that_do_not_tell_their_errors() -> None:
    assert parse_gpus(OLD) == [Gpu("Tesla T4", 15360, 0, "535.104.05", 0)]
    assert [each.level for each in judge(parse_gpus(OLD))] == [Level.OK]


def test_cards_of_two_kinds_and_none() -> None:
    assert [each.level for each in judge(parse_gpus(TWO.splitlines()[0] + "\n" + OLD))] == [Level.OK, Level.WARNING]
    assert [each.level for each in judge([])] == [Level.WARNING]


def test_links() -> None:
    assert parse_links(NVLINK) == {(0, 1): "NV18", (0, 2): "NV18", (1, 2): "NV18"}
    assert [(each.level, each.found) for each in links(parse_links(NVLINK))] == [(Level.OK, "3 pairs by NV18")]
    (mixed,) = links(parse_links(MIXED))
    assert mixed.level is Level.WARNING and "4 pairs by SYS, 2 pairs by NV4; GPUs 0 and 2" in mixed.found
    (slow,) = links({(0, 1): "PHB"})
    assert slow.level is Level.OK and "no NVLink" in slow.found
    assert list(links({})) == []


def _smi(folder: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    (folder / "nvidia-smi").write_text(f"#!/bin/sh\n{script}\n")
    (folder / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")


def test_a_driver_that_does_not_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _smi(tmp_path, monkeypatch, "echo 'NVIDIA-SMI has failed: no communication with the driver.'; exit 9")
    (told,) = gpus()
    assert told.level is Level.ERROR and "no communication with the driver" in told.found


def test_the_program_is_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "query").write_text(TWO)
    (tmp_path / "topo").write_text(NVLINK)
    _smi(tmp_path, monkeypatch, f'case "$1" in topo) cat {tmp_path}/topo;; *) cat {tmp_path}/query;; esac')
    assert [each.subject for each in gpus()] == ["GPU", "GPU 1", "GPU 1", "GPU links"]


def test_a_host_without_gpus_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if Path("/proc/driver/nvidia/version").exists():
        pytest.skip("this host has an NVIDIA driver")
    monkeypatch.setenv("PATH", str(tmp_path))
    (told,) = gpus()
    assert told.level is Level.OK and "no NVIDIA GPU" in told.found and "gloo" in told.found
