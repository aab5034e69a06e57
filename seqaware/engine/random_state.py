"""Every random generator of a rank: begun from the run's seed, kept in checkpoints, put back on resuming."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

_NUMPY_KEYS = 624


def begin_randomness(seed: int, *, step: int, rank: int) -> None:
    """Begin all generators anew: dropout then follows from the run's seed, whatever was drawn before in this process.

    Args:
        step: after which the run goes on. rank: each draws masks of its own.
    """
    digest = hashlib.sha256(f"{seed}, step {step}, rank {rank}".encode()).digest()
    number = int.from_bytes(digest[:8], "big") >> 1
    torch.manual_seed(number)  # CUDA's as well
    random.seed(number)
    np.random.seed(number % 2**32)


def random_state() -> dict[str, Any]:
    """Every generator of this process, in values that load without running code."""
    kind, keys, *rest = np.random.get_state(legacy=True)
    state: dict[str, Any] = {
        "cpu": torch.get_rng_state(),
        "python": random.getstate(),
        "numpy": [str(kind), torch.from_numpy(np.asarray(keys, dtype=np.int64)), *rest],
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def restore_random_state(state: Mapping[str, Any]) -> None:
    """Put back what `random_state` has taken.

    Raises:
        ValueError, TypeError, LookupError, RuntimeError and others: it is something else.
    """
    torch.set_rng_state(state["cpu"])
    version, internal, gauss = state["python"]
    if not isinstance(gauss, float | None):
        raise ValueError("Python's generator has an odd state")
    random.setstate((version, tuple(internal), gauss))
    kind, keys, place, has_gauss, gauss = state["numpy"]
    # numpy does not check the place, and reads beyond its memory at a large one.
    if type(place) is not int or not 0 <= place <= _NUMPY_KEYS or keys.shape != (_NUMPY_KEYS,):
        raise ValueError("numpy's generator has an odd state")
    np.random.set_state((kind, keys.numpy().astype(np.uint32), place, has_gauss, gauss))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
