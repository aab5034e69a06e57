"""How fast each rank's device computes, by itself: a slow one holds all others up, and their step times look alike.

Ranks meet in every step, so that the time of a step says nothing about any of them. A few products of matrices that no
rank waits for do: on a device with a low clock, a high temperature or another tenant they take longer than elsewhere.
"""

from __future__ import annotations

import socket
import time
from typing import Any

import torch

from seqaware.engine.ranks import Ranks

_SIZE = {"cpu": 384, "cuda": 4096}
_REPEATS = 8


def pace_of_ranks(ranks: Ranks) -> dict[str, Any]:
    """Seconds of one product on each rank, and the ranks' hosts; the shortest of several, which is what it can do.

    Collective; takes some hundredths of a second, and waits for the device.
    """
    device = ranks.device
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    matrix = torch.full((_SIZE.get(device.type, _SIZE["cpu"]),) * 2, 0.5, device=device, dtype=dtype)
    found = ranks.gather((min(_seconds(matrix) for _ in range(_REPEATS)), socket.gethostname()))
    return {"seconds": [seconds for seconds, _ in found], "hosts": [host for _, host in found]}


def _seconds(matrix: torch.Tensor) -> float:
    cuda = matrix.device.type == "cuda"
    if cuda:
        torch.cuda.synchronize(matrix.device)
    started = time.perf_counter()
    torch.mm(matrix, matrix)
    if cuda:
        torch.cuda.synchronize(matrix.device)
    return time.perf_counter() - started
