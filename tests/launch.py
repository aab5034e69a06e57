"""Starting the real commands, as a person types them."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
DS_CONFIGS = ROOT / "ds_configs"


def environment(**extra: str) -> dict[str, str]:
    """Ours, for ranks on a CPU with one thread each, and this Python's commands first."""
    hidden = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    env = {name: value for name, value in os.environ.items() if name not in hidden}
    here = str(Path(sys.executable).parent)
    return {
        **env,
        "PATH": f"{here}:{env['PATH']}",
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": "cpu",
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": str(ROOT),
        **extra,
    }


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def deepspeed(script: str, *arguments: str, ranks: int, timeout: int = 600) -> subprocess.CompletedProcess[str]:
    """`deepspeed --num_gpus RANKS script arguments…`, from the repository's root."""
    command = ["deepspeed", "--num_gpus", str(ranks), "--master_port", str(free_port()), script, *arguments]
    return _run(command, timeout)


def python(script: str, *arguments: str, timeout: int = 600, **extra: str) -> subprocess.CompletedProcess[str]:
    """`python script arguments…`, from the repository's root."""
    return _run([sys.executable, script, *arguments], timeout, **extra)


def torchrun(script: str, *arguments: str, ranks: int, timeout: int = 600) -> subprocess.CompletedProcess[str]:
    """`torchrun --nproc-per-node RANKS script arguments…`."""
    port = str(free_port())
    command = ["torchrun", "--nproc-per-node", str(ranks), "--master-port", port, script, *arguments]
    return _run(command, timeout)


def _run(command: list[str], timeout: int, **extra: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, cwd=ROOT, env=environment(**extra), capture_output=True, text=True, timeout=timeout, check=False
    )
