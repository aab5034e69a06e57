"""What a rank's device can do and has held: the peak of its arithmetic, and of its memory."""

from __future__ import annotations

import resource
import sys
import time

import torch

from seqaware.estimate.hardware import peak_flops

_SIZE = {"cpu": 512, "cuda": 8192}
_REPEATS = 5


def peak_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Operations a second of one rank's device in products of this dtype: the data sheet's for a card that is known.

    Elsewhere, and on a CPU with as many threads as this rank has, the best of a few large products; some hundredths of
    a second. Nothing is waited for later on.
    """
    if device.type == "cuda":
        known = peak_flops(torch.cuda.get_device_name(device), str(dtype).removeprefix("torch."))
        if known is not None:
            return known
    size = _SIZE.get(device.type, _SIZE["cpu"])
    return 2 * size**3 / seconds_of_product(device, dtype, size=size, repeats=_REPEATS)


def seconds_of_product(device: torch.device, dtype: torch.dtype, *, size: int, repeats: int) -> float:
    """Seconds of a product of two [size, size] matrices: the shortest of `repeats`. Waits for the device."""
    matrix = torch.full((size, size), 0.5, device=device, dtype=dtype)
    return min(_seconds(matrix) for _ in range(repeats))


def peak_memory(device: torch.device) -> int:
    """Bytes: the most that tensors have taken on a GPU since the start; on a CPU the most this process has held."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    # Kilobytes everywhere but on macOS.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _seconds(matrix: torch.Tensor) -> float:
    cuda = matrix.device.type == "cuda"
    if cuda:
        torch.cuda.synchronize(matrix.device)
    started = time.perf_counter()
    torch.mm(matrix, matrix)
    if cuda:
        torch.cuda.synchronize(matrix.device)
    return time.perf_counter() - started
