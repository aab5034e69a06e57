"""GPUs and the links between them, as nvidia-smi and torch see them."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

from seqaware.doctor.findings import Finding, error, ok, warning

_QUERY = ("name", "memory.total", "memory.used", "driver_version", "ecc.errors.uncorrected.volatile.total")
_SMI_SECONDS = 20
_BUSY = 0.05
# What nvidia-smi calls the ways between two GPUs, the slow ones: through the host's memory or between its sockets.
_SLOW_LINKS = {"SYS": "between the host's sockets", "NODE": "over the host's memory", "PHB": "over the host's bridge"}


@dataclass(frozen=True)
class Gpu:
    """One line of nvidia-smi. Memory in MiB; uncorrected: memory errors since the driver started."""

    name: str
    memory: int
    used: int
    driver: str
    uncorrected: int


def gpus() -> Iterator[Finding]:
    """The GPUs of this host; a host without says so."""
    there = Path("/proc/driver/nvidia/version").exists()
    if shutil.which("nvidia-smi") is None:
        if there:
            yield warning("GPU", "a driver is loaded, but nvidia-smi is not found", "put nvidia-smi into PATH")
        else:
            yield ok("GPU", "no NVIDIA GPU on this host: ranks compute on the CPU and talk over gloo")
        return
    said = _smi(f"--query-gpu={','.join(_QUERY)}", "--format=csv,noheader,nounits")
    if said.returncode != 0:
        reason = (said.stdout + said.stderr).strip().splitlines() or [f"exit code {said.returncode}"]
        yield error("GPU", f"nvidia-smi fails: {reason[0]}", "see dmesg, and load the driver again or restart the host")
        return
    found = parse_gpus(said.stdout)
    yield from judge(found)
    if len(found) > 1:
        yield from links(parse_links(_smi("topo", "-m").stdout))


def _smi(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["nvidia-smi", *arguments], capture_output=True, text=True, timeout=_SMI_SECONDS, check=False)


def parse_gpus(text: str) -> list[Gpu]:
    """From `nvidia-smi --query-gpu=… --format=csv,noheader,nounits`; what a card does not tell counts as 0."""
    found = []
    for line in text.strip().splitlines():
        name, memory, used, driver, uncorrected = (part.strip() for part in line.rsplit(",", len(_QUERY) - 1))
        found.append(Gpu(name, _number(memory), _number(used), driver, _number(uncorrected)))
    return found


def _number(text: str) -> int:
    return int(text) if text.isdecimal() else 0  # [N/A], [Not Supported]


def judge(found: Sequence[Gpu]) -> Iterator[Finding]:
    """What the GPUs are, and which of them are in use or broken."""
    if not found:
        yield warning("GPU", "nvidia-smi lists none", "see that the job was given GPUs (--gres, --gpus-per-node)")
        return
    kinds = Counter(f"{gpu.name}, {gpu.memory / 1024:.0f} GiB" for gpu in found)
    described = "; ".join(f"{count} x {kind}" for kind, count in kinds.items())
    yield ok("GPU", f"{described}, driver {found[0].driver}")
    if len(kinds) > 1:
        yield warning("GPU", "the GPUs of this host differ", "the slowest and smallest one decides; hide the others")
    for number, gpu in enumerate(found):
        if gpu.memory and gpu.used > _BUSY * gpu.memory:
            share = f"{gpu.used / 1024:.1f} of {gpu.memory / 1024:.0f} GiB"
            yield warning(f"GPU {number}", f"{share} are in use by others", "see nvidia-smi for the process")
        if gpu.uncorrected:
            found_errors = f"{gpu.uncorrected} memory errors that were not corrected"
            yield error(f"GPU {number}", found_errors, "take the GPU out of service: nvidia-smi -q -d ECC")


def parse_links(text: str) -> dict[tuple[int, int], str]:
    """From `nvidia-smi topo -m`: how each two GPUs are joined (NV18, PIX, PXB, PHB, NODE, SYS)."""
    rows: dict[int, list[str]] = {}
    # Underlined on a terminal, and so in some drivers' pipes too.
    for line in re.sub(r"\x1b\[[0-9;]*m", "", text).splitlines():
        match = re.match(r"GPU(\d+)\s+(.*)", line)
        if match:
            rows[int(match[1])] = match[2].split()
    return {
        (first, second): rows[first][second]
        for first, second in combinations(sorted(rows), 2)
        if second < len(rows[first])
    }


def links(between: dict[tuple[int, int], str]) -> Iterator[Finding]:
    """Which ways the GPUs of this host have to one another."""
    kinds = Counter(between.values())
    if not kinds:
        return
    described = ", ".join(f"{count} pairs by {kind}" for kind, count in kinds.most_common())
    slow = [kind for kind in _SLOW_LINKS if kind in kinds]
    if not slow:
        yield ok("GPU links", described)
        return
    first = next(pair for pair, kind in between.items() if kind == slow[0])
    found = f"{described}; GPUs {first[0]} and {first[1]} talk {_SLOW_LINKS[slow[0]]}"
    if all(kind in _SLOW_LINKS for kind in kinds):
        yield ok("GPU links", f"{found}: no NVLink on this host")
    else:
        yield warning("GPU links", found, "keep ranks that talk much (parallel.sequence) on GPUs with NVLink")


def torch_sees(listed: int, *, hidden: bool) -> Iterator[Finding]:
    """What torch can use of them, and whether they reach each other's memory. Imports torch.

    Args:
        listed: GPUs that nvidia-smi lists. hidden: CUDA_VISIBLE_DEVICES hides some.
    """
    import torch

    if torch.version.cuda is None:
        do = "./install.sh on this host, or pip install a build of torch for CUDA"
        yield error("torch.cuda", f"{listed} GPUs here, but this torch is built for the CPU alone", do)
        return
    if not torch.cuda.is_available():
        yield error("torch.cuda", _why_not(), f"update the driver to one that knows CUDA {torch.version.cuda}")
        return
    seen = torch.cuda.device_count()
    if seen < listed and not hidden:
        yield error("torch.cuda", f"sees {seen} of {listed} GPUs", "see dmesg for the others")
    else:
        bfloat16 = "with" if torch.cuda.is_bf16_supported() else "without"
        yield ok("torch.cuda", f"sees {seen} GPU{'s' * (seen != 1)}, CUDA {torch.version.cuda}, {bfloat16} bfloat16")
    apart = [pair for pair in combinations(range(seen), 2) if not torch.cuda.can_device_access_peer(*pair)]
    if apart:
        pairs = ", ".join(f"{first}-{second}" for first, second in apart[:4])
        do = "turn off ACS in the BIOS or the hypervisor, or expect slow links"
        yield warning("GPU links", f"no access to each other's memory: {pairs} ({len(apart)} pairs)", do)


def _why_not() -> str:
    import torch

    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        return f"torch cannot use them: {str(error).strip().splitlines()[0]}"
    return "torch cannot use them"
