"""The connected ranks of a run, and the few collectives the trainer needs.

The only module that names `torch.distributed`, and the only one that reads the environment. Nothing here imports
torch before `connect`, so that a rank can tell who it is before the slow imports.
"""

from __future__ import annotations

import importlib
import logging
import os
import shutil
import sys
from collections.abc import Mapping
from dataclasses import replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from seqaware.compat.operator_cache import build_each_once, operators_folder
from seqaware.distributed.launch_environment import (
    LaunchEnvironment,
    check_variables,
    interface_towards,
    read_launch_environment,
    why_alone,
)
from seqaware.distributed.rendezvous import Patience, Waiting, agree_on_port, listen, reach, wait_for_all
from seqaware.errors import ConfigError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

# Of torch's store, to whoever connects to its port.
_STORE_ANSWERS = timedelta(seconds=10)


def find_address(environment: Mapping[str, str] | None = None, *, check: bool = True) -> LaunchEnvironment:
    """Find out which launcher started this process and which rank it is.

    Args:
        check: refuse variables that contradict the launcher. A command that only plans or inspects may be run beside
            the launcher, in a batch script that sets them for it.

    Raises:
        ConfigError: the launcher's variables contradict each other.
    """
    env = os.environ if environment is None else environment
    try:
        address = read_launch_environment(env)
        if check:
            check_variables(env, address)
        return replace(address, job=env.get("SLURM_JOB_ID"), alone=why_alone(env, address))
    except ValueError as error:
        raise ConfigError("the launcher's variables are no numbers", got=error) from error


def gpu_is_visible() -> bool:
    """Whether an NVIDIA driver is here and not hidden, told without importing torch."""
    if os.environ.get("CUDA_VISIBLE_DEVICES", "all") in ("", "-1") or os.environ.get("DS_ACCELERATOR") == "cpu":
        return False
    return Path("/proc/driver/nvidia/version").exists() or shutil.which("nvidia-smi") is not None


class Ranks:
    """The connected ranks of a run. Every method that communicates must be called by all of them."""

    def __init__(self, address: LaunchEnvironment, device: torch.device) -> None:
        self.address = address
        self.device = device
        self.rank = address.rank
        self.size = address.size
        self.is_first = address.rank == 0

    def agree(self, value: Any) -> Any:
        """Rank 0's `value`, on every rank. Pickled: for small things."""
        import torch.distributed as dist

        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def sum(self, tensor: Tensor) -> Tensor:
        """Add `tensor` over all ranks, in place; returns it."""
        import torch.distributed as dist

        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def barrier(self) -> None:
        import torch.distributed as dist

        if self.size > 1:
            dist.barrier()

    def gather(self, value: Any) -> list[Any]:
        """`value` of every rank, in the order of the ranks, on every rank. Pickled: for small things."""
        import torch.distributed as dist

        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def sequence_group(self, size: int) -> SequenceGroup | None:
        """The `size` neighbouring ranks that share each sequence with this one; None for one. Collective."""
        import torch.distributed as dist

        if size == 1:
            return None
        assert self.size % size == 0, "the plan lets a number of ranks through only if it divides the world"
        groups = [dist.new_group(list(range(first, first + size))) for first in range(0, self.size, size)]
        return SequenceGroup(groups[self.rank // size], index=self.rank % size, size=size)


class Votes:
    """What ranks ask of each other besides the training: the highest of all ranks' numbers, on the host.

    Over gloo on every machine, so that no device is waited for; a vote goes round while the step computes.
    """

    def __init__(self, ranks: Ranks) -> None:
        import torch.distributed as dist

        self._alone = ranks.size == 1
        self._group = None if self._alone else dist.new_group(backend="gloo")
        self._cast: tuple[Any, Tensor] | None = None

    def cast(self, value: int) -> None:
        """Send this rank's number off; every rank casts before any of them reads a result."""
        import torch
        import torch.distributed as dist

        box = torch.tensor([value], dtype=torch.int64)
        work = None if self._alone else dist.all_reduce(box, op=dist.ReduceOp.MAX, group=self._group, async_op=True)
        self._cast = (work, box)

    def result(self) -> int:
        """The highest number that a rank has cast."""
        assert self._cast is not None, "a vote is cast before it is read"
        work, box = self._cast
        self._cast = None
        if work is not None:
            work.wait()
        return int(box)


class SequenceGroup:
    """The ranks that share each sequence: this one holds the `index`-th of `size` equal runs of columns."""

    def __init__(self, handle: Any, *, index: int, size: int) -> None:
        self._handle = handle
        self.index = index
        self.size = size

    def exchange(self, tensor: Tensor) -> Tensor:
        """All-to-all: slice i of the first dimension [n, …] goes to rank i, and slice i of the result came from it."""
        import torch
        import torch.distributed as dist

        tensor = tensor.contiguous()
        received = torch.empty_like(tensor)
        dist.all_to_all_single(received, tensor, group=self._handle)
        return received

    def columns(self, tensor: Tensor) -> Tensor:
        """This rank's run of the second dimension, which `size` divides."""
        width = tensor.shape[1] // self.size
        return tensor[:, self.index * width : (self.index + 1) * width]

    def join(self, tensor: Tensor) -> Tensor:
        """Put the runs of all ranks together again along the second dimension; no gradient flows back."""
        import torch
        import torch.distributed as dist

        runs = [torch.empty_like(tensor) for _ in range(self.size)]
        dist.all_gather(runs, tensor.contiguous(), group=self._handle)
        return torch.cat(runs, dim=1)


def disconnect() -> None:
    """Meet once more and leave the group: gloo ranks that skip either now and then crash on the way out."""
    import torch.distributed as dist

    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def connect(
    address: LaunchEnvironment, *, timeout_minutes: float | None = 30.0, patience: Patience | None = None
) -> Ranks:
    """Start the process group through DeepSpeed: NCCL where there are GPUs, gloo elsewhere.

    The group is made for a single rank too, because DeepSpeed's engine asks for one. A process that is already
    connected keeps its group.

    Args:
        timeout_minutes: how long collectives wait at most; None: for ever.
        patience: how long the ranks wait for each other here; default: `Patience()`.

    Raises:
        ConfigError: the ranks do not find each other: the port is in use, the address is wrong, ranks are missing.
    """
    import torch
    import torch.distributed as dist

    timeout = _let_groups_wait(timeout_minutes)
    cuda = torch.cuda.is_available() and os.environ.get("DS_ACCELERATOR") != "cpu"
    if cuda:
        # srun may show each task its own GPU only: every local rank then calls it number 0.
        torch.cuda.set_device(address.local_rank % torch.cuda.device_count())
    else:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        _name_interface(address)
    import deepspeed

    build_each_once()
    with Waiting(address, patience or Patience()) as waiting:
        if not dist.is_initialized():
            _start_group(waiting, timeout, cuda=cuda)
            address = waiting.address
        _set_variables(address)
        waiting.cause = f"not all {address.size} ranks have set up their communication"
        _leave_out_shared_memory()
        deepspeed.init_distributed(
            dist_backend="nccl" if cuda else "gloo", auto_mpi_discovery=False, timeout=timeout, verbose=False
        )
    return Ranks(address, torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu"))


def group_timeout_minutes(hang_minutes: float | None) -> float | None:
    """Minutes for `connect` where the ranks watch each other: a group that gave up before them would name nobody."""
    # Ranks of other hosts wait in a collective while an operator is built on one, however short hang_minutes is.
    return None if hang_minutes is None else 1.5 * hang_minutes + 60.0


def _let_groups_wait(minutes: float | None) -> timedelta:
    """Set how long groups wait that others make by `new_group`: DeepSpeed's do not inherit it from the first."""
    from torch.distributed import distributed_c10d

    # For ever is what fits into 2³¹ milliseconds, which is as long as a socket can wait.
    timeout = timedelta(days=24) if minutes is None else timedelta(minutes=minutes)
    for name in ("default_pg_timeout", "default_pg_nccl_timeout"):
        setattr(distributed_c10d, name, timeout)
    return timeout


def _start_group(waiting: Waiting, timeout: timedelta, *, cuda: bool) -> None:
    """Find all ranks and start torch's default group with them.

    Args:
        timeout: of the group's collectives. The connections of gloo wait no longer than the patience.
    """
    import torch
    import torch.distributed as dist
    from torch.distributed import distributed_c10d

    store = _find_all(waiting)
    store.set_timeout(timeout)
    name = "NCCL_SOCKET_IFNAME" if cuda else "GLOO_SOCKET_IFNAME"
    backend = "nccl" if cuda else "gloo"
    waiting.cause = f"{backend} has not connected all ranks ({name}={os.environ.get(name, '')})"
    # As DeepSpeed does: NCCL connects now, and later groups split off. One rank has nobody to connect to.
    device = torch.device("cuda", torch.cuda.current_device()) if cuda and waiting.address.size > 1 else None
    dist.init_process_group(
        backend,
        store=store,
        rank=waiting.address.rank,
        world_size=waiting.address.size,
        timeout=timeout if cuda else min(timeout, waiting.patience.limit),
        device_id=device,
    )
    distributed_c10d._set_pg_timeout(timeout)  # not of send and recv, which nothing here uses


def _find_all(waiting: Waiting) -> Any:
    """A store that all ranks have reached; torchrun's ranks agree on a port, which changes `waiting.address`."""
    import torch.distributed as dist

    address = waiting.address
    if address.size == 1:
        return dist.HashStore()  # type: ignore[attr-defined]  # listens nowhere
    join = partial(dist.TCPStore, is_master=False, timeout=_STORE_ANSWERS)  # type: ignore[attr-defined]
    shared = None
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        shared = reach(address, join, waiting)
        os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "False"  # or torch would look for torchrun's store at the new port
    listener = listen(address, address.master_port if shared is None else 0, waiting) if address.rank == 0 else None
    if shared is not None:
        port = agree_on_port(shared, listener.getsockname()[1] if listener else 0, waiting)
        waiting.address = replace(address, master_port=port)
    if listener is None:
        store = reach(waiting.address, join, waiting)
    else:
        host, port = listener.getsockname()[:2]
        own = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
        fd = listener.detach()
        store = dist.TCPStore(own, port, is_master=True, wait_for_workers=False, master_listen_fd=fd)  # type: ignore[attr-defined]
    wait_for_all(store, waiting)
    return store


def _set_variables(address: LaunchEnvironment) -> None:
    """torch's variables, which DeepSpeed reads."""
    os.environ.update(
        RANK=str(address.rank),
        WORLD_SIZE=str(address.size),
        LOCAL_RANK=str(address.local_rank),
        LOCAL_SIZE=str(address.local_size),
        MASTER_ADDR=address.master_address,
        MASTER_PORT=str(address.master_port),
    )


def _leave_out_shared_memory() -> None:
    """Let DeepSpeed set up its communication without its operator for an all-reduce in shared memory.

    Only its tensor-parallel inference uses it. On a CPU, DeepSpeed (0.19.8) waits in it for the buffers of all ranks of
    a host, without end and with the interpreter's lock held: if a rank is killed in that moment, no thread of the
    others can notice it. It is also compiled for a minute or two, and leaves 70 MB a rank in /dev/shm.
    """
    # As an attribute of its package, this module's name is the library torch.
    backend: Any = importlib.import_module("deepspeed.comm.torch")
    backend.build_shm_op = lambda: None


def _name_interface(address: LaunchEnvironment) -> None:
    """Let gloo use the network where rank 0 is; among ranks of one host the loopback, where no other host reaches it.

    By itself gloo takes the address that this host's own name stands for. That is 127.0.1.1 on Debian, where nobody
    else can reach it: the ranks would wait for each other without end.
    """
    if "GLOO_SOCKET_IFNAME" in os.environ:
        return
    interface = interface_towards(address.master_address) if address.nodes > 1 else "lo"
    if interface is not None:
        os.environ["GLOO_SOCKET_IFNAME"] = interface


def prepare_environment() -> None:
    """Keep the libraries' notices off the screen, and their compiled operators with this Python.

    A person reads our lines, and errors. DeepSpeed's operators are compiled against the installed packages, and kept
    in a folder of these versions. Called before the libraries are imported; variables that the user set stay.
    """
    _find_programs_beside_python()
    if "TORCH_EXTENSIONS_DIR" not in os.environ and (operators := operators_folder(os.environ)) is not None:
        os.environ["TORCH_EXTENSIONS_DIR"] = str(operators)
    for name, value in {
        "DS_LOG_LEVEL": "error",
        "TRANSFORMERS_VERBOSITY": "error",
        "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "TOKENIZERS_PARALLELISM": "true",
        "TORCH_CPP_LOG_LEVEL": "ERROR",
        "MLFLOW_ALLOW_FILE_STORE": "true",  # a folder is what a machine without a server has
        # The trackers try again themselves, and say so; its own tries go on for minutes after the last step.
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
        "MLFLOW_HTTP_REQUEST_TIMEOUT": "30",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        # Micro-batches differ in size: segments that grow leave no holes that only smaller ones could fill.
        **({} if "PYTORCH_CUDA_ALLOC_CONF" in os.environ else {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}),
    }.items():
        os.environ.setdefault(name, value)
    if not gpu_is_visible():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed warns where it has to find that out itself
    # It misses a kernel that we do not use, on CPUs with bfloat16 arithmetic.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    if not sys.warnoptions:
        import warnings

        warnings.filterwarnings("ignore", module=r"(torch|deepspeed|transformers)\b.*")


def _find_programs_beside_python() -> None:
    """Let this environment's programs be found, as they are once it is activated.

    A rank that ssh or mpirun started has the login's PATH. DeepSpeed's operators need ninja: without one there the run
    would stop, and another version of it rebuilds them all, taking a minute each time the two take turns.
    """
    beside = str(Path(sys.executable).parent)
    path = os.environ.get("PATH", os.defpath)
    if beside not in path.split(os.pathsep):
        os.environ["PATH"] = os.pathsep.join((beside, path))


def environment() -> dict[str, str]:
    """A copy of the environment, for those who report on it. Secrets stand in it: its values are not to be printed."""
    return dict(os.environ)
