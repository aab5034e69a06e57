"""How fast each rank's device computes, by itself: a slow one holds all others up, and their step times look alike.

Ranks meet in every step, so that the time of a step says nothing about any of them. A few products of matrices that no
rank waits for do: on a device with a low clock, a high temperature or another tenant they take longer than elsewhere.
"""

from __future__ import annotations

import socket
from typing import Any

import torch

from seqaware.distributed.process_group import Ranks
from seqaware.engine.device_metrics import seconds_of_product

_SIZE = {"cpu": 384, "cuda": 4096}
_REPEATS = 8


def measure_stragglers(ranks: Ranks) -> dict[str, Any]:
    """Seconds of one product on each rank, and the ranks' hosts; the shortest of several, which is what it can do.

    Collective; takes some hundredths of a second, and waits for the device.
    """
    device = ranks.device
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    size = _SIZE.get(device.type, _SIZE["cpu"])
    seconds_here = seconds_of_product(device, dtype, size=size, repeats=_REPEATS)
    found = ranks.gather((seconds_here, socket.gethostname()))
    return {"seconds": [seconds for seconds, _ in found], "hosts": [host for _, host in found]}
