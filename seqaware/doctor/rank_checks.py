"""What only all ranks together can tell: whether they meet, on which hosts, with what clocks, and how fast."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from seqaware.distributed.launch_environment import LaunchEnvironment
from seqaware.distributed.process_group import Ranks, connect, disconnect
from seqaware.distributed.rendezvous import Patience
from seqaware.doctor import host_probe
from seqaware.doctor.findings import Finding, error, of_hosts, ok, warning
from seqaware.doctor.hosts import same_folder, same_software, same_time
from seqaware.doctor.shared_disk import Note
from seqaware.errors import SeqawareError

MEETING_SECONDS = 60.0
SECONDS = 200.0
_LATENCY_ROUNDS = 10
_BANDWIDTH_SECONDS = 1.0
_MOST_ROUNDS = 20
# NCCL needs large messages to show its speed; gloo shows it at a few MiB, and takes seconds for more.
_FLOATS = {"cuda": 2**26, "cpu": 2**21}
_SLOW_GIGABYTES = 2.0


@dataclass(frozen=True)
class _Heard:
    """What one rank tells the others of its host.

    Attributes:
        report: of the first rank of each host alone. time: of its clock, in seconds since 1970, when it left a barrier
            that it had waited so long for.
    """

    host: str
    report: Mapping[str, Any] | None
    findings: Sequence[Finding]
    time: float
    waited: float


def together(
    address: LaunchEnvironment, local: Sequence[Finding], *, folder: Path, packages: Sequence[str]
) -> Iterator[Finding]:
    """Meet all ranks, and yield what they find together, on every rank the same but for speeds.

    Where they do not meet, that alone is yielded.

    Args:
        local: what this rank found on its host; empty but for the first rank of a host. folder: of the run, or what
            exists of the way there.
    """
    minutes = MEETING_SECONDS / 60
    try:
        ranks = connect(address, timeout_minutes=minutes, patience=Patience(minutes))
    except SeqawareError as trouble:
        yield _not_met(address, f"{trouble.what}: {trouble.got}")
        return
    except (RuntimeError, OSError, ValueError) as trouble:  # of gloo and NCCL
        yield _not_met(address, (str(trouble).strip().splitlines() or [type(trouble).__name__])[0][:200])
        return
    heard, place = _hear(ranks, local, folder=folder, packages=packages)
    yield from _of_hosts(heard, place)
    yield from all_reduce(ranks)
    disconnect()


def _not_met(address: LaunchEnvironment, reason: str) -> Finding:
    place = f"{address.master_address}:{address.master_port}"
    do = f"see that all {address.size} ranks were started, and that every host reaches {place}"
    return error("ranks", f"rank {address.rank} of {address.size} did not meet the others at {place}: {reason}", do)


def _hear(ranks: Ranks, local: Sequence[Finding], *, folder: Path, packages: Sequence[str]) -> tuple[list[_Heard], str]:
    """What every rank tells, and the text of the note that rank 0 has written for the hosts to read."""
    with ExitStack() as stack:
        note = None
        if ranks.is_first:
            with suppress(OSError):  # a folder that cannot be written was found by the check of the disk
                note = stack.enter_context(Note.written(folder))
        path, text = ranks.agree((str(note.path), note.text) if note else ("", ""))
        asked = {"packages": list(packages), "note": path}
        report = host_probe.report(asked) if ranks.address.local_rank == 0 else None
        began = time.monotonic()
        ranks.barrier()
        heard = _Heard(socket.gethostname(), report, local, time.time(), waited=time.monotonic() - began)
        return ranks.gather(heard), text


def _of_hosts(heard: Sequence[_Heard], note: str) -> Iterator[Finding]:
    """What is known of all hosts."""
    firsts = {each.host: each for each in heard if each.report is not None}
    yield from of_hosts([(host, each.findings) for host, each in firsts.items()])
    yield ok("ranks", f"all {len(heard)} meet, on {len(firsts)} host{'s' * (len(firsts) != 1)}")
    if len(firsts) == 1:
        return
    reports = {host: each.report for host, each in firsts.items() if each.report is not None}
    yield from same_software(reports)
    if note:
        yield from same_folder(reports, note)
    middle = sorted(each.time for each in firsts.values())[len(firsts) // 2]
    # All left one barrier: the last to come waited least, and within that time it let everybody go.
    slack = min(each.waited for each in heard)
    yield from same_time({host: max(0.0, abs(each.time - middle) - slack) for host, each in firsts.items()})


def all_reduce(ranks: Ranks) -> Iterator[Finding]:
    """Add up numbers over all ranks: is the sum right, how long does a small one take, how fast is a large one?"""
    import torch

    backend = "NCCL" if ranks.device.type == "cuda" else "gloo"
    total = ranks.sum(torch.full((1024,), float(ranks.rank + 1), device=ranks.device))
    wanted = ranks.size * (ranks.size + 1) / 2
    if not all(ranks.gather(bool((total == wanted).all()))):
        found = f"{backend} adds 1 to {ranks.size} up to {total[0].item():g}"
        yield error("all-reduce", found, "do not train on these hosts: test GPUs and network")
        return
    small = _seconds_each(ranks, torch.zeros(1, device=ranks.device), rounds=_LATENCY_ROUNDS)
    large = torch.zeros(_FLOATS[ranks.device.type], device=ranks.device)
    once = ranks.agree(_seconds_each(ranks, large, rounds=1))
    rounds = max(1, min(_MOST_ROUNDS, int(_BANDWIDTH_SECONDS / max(once, 1e-6))))
    seconds = _seconds_each(ranks, large, rounds=rounds)
    moved = large.numel() * large.element_size()
    # What each rank's link carries in a ring, so that figures of other numbers of ranks compare: NCCL's bus bandwidth.
    bus = 2 * (ranks.size - 1) / ranks.size * moved / seconds / 1e9
    found = f"{backend}: {bus:.2f} GB/s over each link ({moved / 2**20:.0f} MiB), {small * 1e6:,.0f} us for a number"
    if backend == "NCCL" and bus < _SLOW_GIGABYTES:
        do = "see NCCL_DEBUG=INFO for the way it took: sockets instead of InfiniBand or NVLink?"
        yield warning("all-reduce", found, do)
    else:
        yield ok("all-reduce", found)


def _seconds_each(ranks: Ranks, tensor: Any, *, rounds: int) -> float:
    import torch

    ranks.sum(tensor)  # the first one sets up the connections
    ranks.barrier()
    if ranks.device.type == "cuda":
        torch.cuda.synchronize()
    begun = time.monotonic()
    for _ in range(rounds):
        ranks.sum(tensor)
    if ranks.device.type == "cuda":
        torch.cuda.synchronize()
    return (time.monotonic() - begun) / rounds
