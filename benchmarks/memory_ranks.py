"""What every rank of benchmarks/memory.py runs: real trainings, in which one step is measured.

Tensor memory is counted in torch's allocator itself, so no tensor escapes, DeepSpeed's own included. Weights that a run
maps from their file instead of allocating them are added. Collectives are counted where torch.distributed is called.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

MEASURED_STEP = 4  # by then the moments exist, and ZeRO-3 knows the order of the modules
# The argument that holds the whole tensor, as one rank sees it.
COLLECTIVES = {
    "all_reduce": "tensor",
    "all_gather_into_tensor": "output_tensor",
    "reduce_scatter_tensor": "input",
    "all_to_all_single": "output",
}
# The position of that argument where it is not named.
POSITIONS = {"reduce_scatter_tensor": 1}


class Counter64:
    """The counting allocator, from the moment it is loaded."""

    def __init__(self, library: Path) -> None:
        self._library = ctypes.CDLL(str(library))
        for name in ("live_bytes", "peak_bytes"):
            getattr(self._library, name).restype = ctypes.c_longlong
        self._library.start_counting()

    def live(self) -> int:
        return int(self._library.live_bytes())

    def peak(self) -> int:
        return int(self._library.peak_bytes())

    def reset_peak(self) -> None:
        self._library.reset_peak()

    def mapped(self, module: torch.nn.Module) -> int:
        """Bytes of parameters that were not allocated, but mapped from a file."""
        storages = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in module.parameters()}
        return sum(size for at, size in storages.items() if at and not self._library.is_counted(ctypes.c_void_p(at)))


def count_collectives() -> Counter[str]:
    """Bytes by kind, from now on; must come before DeepSpeed takes the functions."""
    counted: Counter[str] = Counter()

    def wrapped(kind: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            tensor = kwargs.get(COLLECTIVES[kind])
            tensor = args[POSITIONS.get(kind, 0)] if tensor is None else tensor
            counted[kind] += tensor.numel() * tensor.element_size()
            return function(*args, **kwargs)

        return call

    for kind in COLLECTIVES:
        setattr(dist, kind, wrapped(kind, getattr(dist, kind)))
    return counted


class MeasuredStep:
    """Stands in for `Engine.train_step`, and measures the forwards, the backwards and the update of one step."""

    def __init__(self, counter: Counter64, collectives: Counter[str], train_step: Callable[..., Any]) -> None:
        self.counter, self.collectives, self.train_step = counter, collectives, train_step
        self.begin()

    def begin(self) -> None:
        """Of a run: what is live now is left over from earlier runs."""
        gc.collect()
        self.steps, self.baseline = 0, self.counter.live()
        self.peaks: dict[str, int] = {}
        self.cpu_seconds: list[float] = []  # of all steps but the one in which memory is counted
        self.record: dict[str, Any] = {}

    def __call__(self, engine: Any, batches: Any, *, learning_rate: float) -> Any:
        self.steps += 1
        if self.steps != MEASURED_STEP:
            begun = time.process_time()
            result = self.train_step(engine, batches, learning_rate=learning_rate)
            self.cpu_seconds.append(time.process_time() - begun)
            return result
        mapped = self.counter.mapped(engine.wrapped)
        engine._forward = self._watched("forward", engine._forward)
        engine.deepspeed.backward = self._watched("backward", engine.deepspeed.backward)
        engine._step = self._watched("update", engine._step)
        Path("/proc/self/clear_refs").write_text("5")
        self.collectives.clear()
        result = self.train_step(engine, batches, learning_rate=learning_rate)
        self.record = {
            "micro_batches": len(batches),
            "bytes": {moment: peak - self.baseline + mapped for moment, peak in self.peaks.items()},
            "resident": self.counter.live() - self.baseline + mapped,
            "collectives": dict(self.collectives),
            "resident_set": _resident_set(),
        }
        return result

    def _watched(self, moment: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            self.counter.reset_peak()
            result = function(*args, **kwargs)
            self.peaks[moment] = max(self.peaks.get(moment, 0), self.counter.peak())
            return result

        return call


def _resident_set() -> int:
    """The most of the process's memory that was in use since clear_refs, as the kernel counts it."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("requests", type=Path)
    parser.add_argument("library", type=Path)
    arguments = parser.parse_known_args()[0]
    counter, collectives = Counter64(arguments.library), count_collectives()

    from seqaware.config.loading import load_config
    from seqaware.distributed.process_group import disconnect, find_address, prepare_environment
    from seqaware.engine.engine import Engine

    prepare_environment()
    from seqaware.training.launch import RunRequest, run

    measured = MeasuredStep(counter, collectives, Engine.train_step)
    Engine.train_step = lambda self, batches, **rest: measured(self, batches, **rest)  # type: ignore[method-assign]
    address = find_address()
    for request in json.loads(arguments.requests.read_text()):
        measured.begin()
        run(
            RunRequest(load_config(Path(request["config"])), Path(request["deepspeed"])),
            address=address,
            say=lambda text: None,
        )
        record = {**measured.record, "cpu_seconds": measured.cpu_seconds}
        Path(f"{request['result']}.{address.rank}").write_text(json.dumps(record))
    disconnect()


if __name__ == "__main__":
    main()
