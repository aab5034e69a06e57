"""Variables, limits and memory of this host that make a run slow, silent or hang. Values of secrets are never shown."""

from __future__ import annotations

import re
import resource
import shutil
import socket
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from seqaware.doctor.findings import Finding, error, ok, warning

_SECRETS = ("HF_TOKEN", "WANDB_API_KEY")
_FLAGS_OFF = ("", "0", "false", "no", "off")
# What is set for a moment's search of an error and then stays in a profile, and what it costs.
_COSTLY = {
    "CUDA_LAUNCH_BLOCKING": "every kernel is waited for: training is several times slower",
    "NCCL_P2P_DISABLE": "GPUs of one host talk through its memory, not over NVLink",
    "NCCL_SHM_DISABLE": "ranks of one host talk over the network",
    "NCCL_IB_DISABLE": "InfiniBand is not used: hosts talk over sockets",
    "PYTORCH_NO_CUDA_MEMORY_CACHING": "every tensor is allocated anew: training is several times slower",
    "TORCH_NCCL_DESYNC_DEBUG": "NCCL keeps a log of every collective",
}
_ALLOCATOR = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")
_ALLOCATOR_KEYS = {
    "backend",
    "expandable_segments",
    "garbage_collection_threshold",
    "graph_capture_record_stream_reuse",
    "large_segment_size_mb",
    "max_non_split_rounding_mb",
    "max_split_size_mb",
    "per_process_memory_fraction",
    "pinned_max_cached_size_mb",
    "pinned_max_power2_size_mb",
    "pinned_max_round_threshold_mb",
    "pinned_num_register_threads",
    "pinned_reserve_segment_size_mb",
    "pinned_use_background_threads",
    "pinned_use_cuda_host_register",
    "pinned_use_hip_host_register",
    "release_lock_on_cudamalloc",
    "release_lock_on_hipmalloc",
    "roundup_power2_divisions",
    "throw_on_cudamalloc_oom",
    "use_cuda_host_register",
}
_MOST_FILES = 4096
_SHARED_MEMORY_BYTES = 2**30


@dataclass(frozen=True)
class HostFacts:
    """What the variables are judged by.

    Attributes:
        ranks: of this host, in the run. cores: that this process may use. gpus: that nvidia-smi lists.
        interfaces: names of the network's.
    """

    ranks: int
    cores: int
    gpus: int
    interfaces: tuple[str, ...]


def interfaces() -> tuple[str, ...]:
    """Names of this host's network interfaces."""
    return tuple(name for _, name in socket.if_nameindex())


def is_on(value: str | None) -> bool:
    """Whether a variable is set to something that means yes."""
    return value is not None and value.strip().lower() not in _FLAGS_OFF


def variables(env: Mapping[str, str], host: HostFacts) -> Iterator[Finding]:
    """Everything about the environment's variables."""
    troubles = [
        *_costly(env),
        *_gpus(env, host),
        *_threads(env, host),
        *_sockets(env, host),
        *_allocator(env),
        *_tokenizers(env),
        *_left_over(env),
    ]
    yield from troubles
    if not any(finding.level for finding in troubles):
        yield ok("variables", "none that bites is set")
    states = ", ".join(f"{name} {'set' if env.get(name) else 'not set'}" for name in _SECRETS)
    yield ok("secrets", states)
    if is_on(env.get("HF_HUB_OFFLINE")):
        yield ok("HF_HUB_OFFLINE", "set: models and data come from this machine alone")


def _costly(env: Mapping[str, str]) -> Iterator[Finding]:
    for name, cost in _COSTLY.items():
        if is_on(env.get(name)):
            yield warning(name, f"is set: {cost}", f"unset {name}")
    if env.get("TORCH_DISTRIBUTED_DEBUG", "").upper() == "DETAIL":
        do = "unset TORCH_DISTRIBUTED_DEBUG"
        yield warning("TORCH_DISTRIBUTED_DEBUG", "DETAIL: every collective is checked by another one", do)
    if env.get("NCCL_DEBUG", "").upper() == "TRACE":
        yield warning("NCCL_DEBUG", "TRACE: a line for every collective", "export NCCL_DEBUG=WARN")
    if env.get("TORCH_NCCL_ASYNC_ERROR_HANDLING") == "0":
        do = "unset TORCH_NCCL_ASYNC_ERROR_HANDLING"
        yield warning("TORCH_NCCL_ASYNC_ERROR_HANDLING", "0: after a rank is lost, the others wait for ever", do)
    if "NVIDIA_TF32_OVERRIDE" in env:
        do = "unset NVIDIA_TF32_OVERRIDE"
        yield warning("NVIDIA_TF32_OVERRIDE", "overrides the precision of matrix products: other numbers", do)


def _gpus(env: Mapping[str, str], host: HostFacts) -> Iterator[Finding]:
    visible = env.get("CUDA_VISIBLE_DEVICES")
    name = "CUDA_VISIBLE_DEVICES"
    if visible is None or not host.gpus:
        return
    numbers = [part.strip() for part in visible.split(",") if part.strip()]
    absent = [number for number in numbers if number.isdecimal() and int(number) >= host.gpus]
    if not numbers or numbers[0] == "-1":
        yield warning(name, f"hides all {host.gpus} GPUs of this host", f"unset {name}")
    elif absent:
        yield error(name, f"{visible}: this host's GPUs are 0 to {host.gpus - 1}", f"correct or unset {name}")
    elif len(numbers) < host.ranks:
        do = f"start {len(numbers)} ranks a host, or unset {name}"
        yield error(name, f"{visible}: {len(numbers)} GPUs for {host.ranks} ranks of this host", do)
    if env.get("DS_ACCELERATOR") == "cpu":
        yield warning("DS_ACCELERATOR", "cpu: the GPUs of this host are not used", "unset DS_ACCELERATOR")


def _threads(env: Mapping[str, str], host: HostFacts) -> Iterator[Finding]:
    if host.cores < host.ranks:
        do = "ask the scheduler for more (--cpus-per-task), or start fewer ranks"
        yield warning("cores", f"{host.cores} for {host.ranks} ranks of this host", do)
    name = "OMP_NUM_THREADS"
    share = max(1, host.cores // host.ranks)
    written = env.get(name)
    if written is None:
        if host.ranks > 1:
            found = f"not set: each of {host.ranks} ranks of this host starts {host.cores} threads"
            yield warning(name, found, f"export {name}={share}")
    elif not written.isdecimal() or int(written) == 0:
        yield error(name, f"{written!r} is no number of threads", f"export {name}={share}")
    elif int(written) * host.ranks > host.cores and host.ranks > 1:
        found = f"{written} for each of {host.ranks} ranks, and {host.cores} cores"
        yield warning(name, found, f"export {name}={share}")


def _sockets(env: Mapping[str, str], host: HostFacts) -> Iterator[Finding]:
    there = ", ".join(host.interfaces)
    for name in ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME", "TP_SOCKET_IFNAME"):
        written = env.get(name)
        if written and not matching_interfaces(written, host.interfaces, exact=name != "NCCL_SOCKET_IFNAME"):
            yield error(name, f"{written}: this host has no such interface, only {there}", f"correct or unset {name}")
    devices = env.get("NCCL_IB_HCA", "").lstrip("^=")
    folder = Path("/sys/class/infiniband")
    here = [device.name for device in folder.iterdir()] if folder.is_dir() else []
    if devices and not any(each.startswith(part.partition(":")[0]) for each in here for part in devices.split(",")):
        found = f"{env['NCCL_IB_HCA']}: this host has {', '.join(here) or 'no InfiniBand device'}"
        yield warning("NCCL_IB_HCA", found, "correct or unset NCCL_IB_HCA")


def matching_interfaces(written: str, there: tuple[str, ...], *, exact: bool) -> list[str]:
    """The interfaces that a list such as `eth,ib`, `=eth0` or `^docker,lo` chooses.

    Args:
        exact: gloo's way: whole names and no signs. NCCL's are beginnings, whole names behind `=`, and all but these
            behind `^`.
    """
    excluded = written.startswith("^") and not exact
    signs = "" if exact else "^="
    whole = exact or "=" in written[:2]
    names = [name.strip() for name in written.lstrip(signs).split(",") if name.strip()]
    chosen = [each for each in there if any(each == name if whole else each.startswith(name) for name in names)]
    return [each for each in there if each not in chosen] if excluded else chosen


def _allocator(env: Mapping[str, str]) -> Iterator[Finding]:
    for name in _ALLOCATOR:
        for entry in re.split(r",(?![^\[]*\])", env.get(name, "")):
            key, colon, value = entry.partition(":")
            if not entry.strip():
                continue
            if not (colon and value.strip()):
                yield error(name, f"{entry.strip()!r} is not key:value; torch refuses it", f"correct or unset {name}")
            elif key.strip() not in _ALLOCATOR_KEYS:
                yield warning(name, f"{key.strip()} is no key that torch is known to take", f"correct or unset {name}")


def _tokenizers(env: Mapping[str, str]) -> Iterator[Finding]:
    name = "TOKENIZERS_PARALLELISM"
    if name in env and not is_on(env[name]):
        yield warning(name, f"{env[name]}: data is tokenised in one thread", f"unset {name}")


def _left_over(env: Mapping[str, str]) -> Iterator[Finding]:
    """What a shell keeps of a launcher: a plain command would wait for ranks that never come."""
    if "RANK" in env and "WORLD_SIZE" in env and not any(name in env for name in ("LOCAL_RANK", "MASTER_PORT")):
        found = f"RANK={env['RANK']} and WORLD_SIZE={env['WORLD_SIZE']} are set, but no launcher set them"
        yield warning("RANK", found, "unset RANK WORLD_SIZE")
    if "WORLD_SIZE" in env and "RANK" not in env and "SLURM_STEP_ID" not in env and env["WORLD_SIZE"] != "1":
        found = f"WORLD_SIZE={env['WORLD_SIZE']} is set, but not RANK: a plain command refuses to train alone"
        yield warning("WORLD_SIZE", found, "start the ranks with a launcher, or unset WORLD_SIZE")


def limits(*, infiniband: bool) -> Iterator[Finding]:
    """Open files, locked memory and shared memory, which containers and login shells cut short."""
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if 0 <= files < _MOST_FILES:
        yield warning("open files", f"at most {files}", f"ulimit -n {_MOST_FILES} (or more)")
    locked, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if infiniband and locked != resource.RLIM_INFINITY:
        do = "ulimit -l unlimited, in the daemon that starts the ranks too"
        yield warning("locked memory", f"at most {locked:,} bytes; InfiniBand needs more", do)
    memory = Path("/dev/shm")
    free = shutil.disk_usage(memory).free if memory.is_dir() else 0
    if free < _SHARED_MEMORY_BYTES:
        found = f"{free / 2**20:,.0f} MiB free in /dev/shm; ranks of one host talk through it"
        yield warning("shared memory", found, "give the container more: --shm-size 16g, or --ipc host")
