"""Everything about speed on one GPU, in one call of under ten minutes.

    python -m benchmarks.gpu                on an H100 or H200; writes results/gpu.json after every item
    python -m benchmarks.gpu --toy          all of it on this CPU at toy size; writes a file only with --out
    python -m benchmarks.gpu --only loss    some of the items
    python -m benchmarks.gpu --attention flash_attention_4      instead of what auto takes

Every item is a process with a time of its own: what fails or takes too long is named, and costs the others nothing.
While one has the GPU the next imports what it needs.

- rates        what a large bfloat16 product and a copy reach here: the ceilings of everything below
- loss         the loss kernel beside its products, the naive loss and others' kernels (loss_cuda.py)
- attention    the attention of packed short documents (attention.py)
- train-…      step time, tokens a second and MFU of the 1B and 8B shapes of Llama 3, ZeRO-1 and ZeRO-3, rows of 8k and
               32k tokens (gpu_training.py says how MFU is counted). One GPU cannot hold the optimizer's states of 8
               billion weights; that shape is measured with as many of its 32 layers as fit, and their number is told
- kept         what activation checkpointing costs and saves on the 1B shape, nothing compiled
- longest-…    time and memory of one document of 32k, 64k, … tokens beside the plan's, and the length at which
               this GPU would be full (gpu_longest.py)
- loop, trl    a minimal DeepSpeed loop and TRL's trainer on the same model and texts, rows of 8k
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.machine import machine
from benchmarks.timing import FAILURES, first_line

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "gpu.json"

# Seconds at most; with what comes before the first of them, under ten minutes in all.
BUDGETS = {
    "rates": 10,
    "loss": 64,
    "train-8b-zero1": 92,
    "train-8b-zero3": 92,
    "train-1b-zero1": 42,
    "train-1b-zero3": 40,
    "loop": 32,
    "trl": 32,
    "longest-1b": 30,
    "kept": 48,
    "attention": 34,
    "longest-8b": 42,
}
# At toy size both shapes are one.
TOY_BUDGETS = {name: 200 for name in BUDGETS if "8b" not in name}


@dataclass(frozen=True)
class Place:
    """On what an item runs, and where its files lie; with which attention it trains."""

    device: str
    folder: Path
    attention: str

    @property
    def toy(self) -> bool:
        return self.device == "cpu"

    def arguments(self) -> list[str]:
        return ["--device", self.device, "--folder", str(self.folder), "--attention", self.attention]

    def budget(self, name: str) -> int:
        return TOY_BUDGETS[name] if self.toy else BUDGETS[name]


def item(name: str, place: Place, found: Callable[[dict[str, Any]], None], *, turn: float) -> None:
    """Run one item in this process, whose turn began then; `found` hears each figure as soon as there is one."""
    device, toy = place.device, place.toy
    match name.split("-"):
        case ["rates"]:
            found(_rates(device))
        case ["loss"]:
            from benchmarks import loss_cuda

            shape = {"rows": 64, "hidden": 32, "vocabulary": 501} if toy else {}
            found({"errors": loss_cuda.errors(device, **shape)})
            for size in loss_cuda.TOY if toy else loss_cuda.FULL:
                found(loss_cuda.measure(size, device))
        case ["attention"]:
            import torch

            from benchmarks import attention

            whole = replace(attention.QUICK, tokens=512, repeats=1) if toy else attention.ON_A_GPU
            found(attention.measure(whole, device=device, dtype=torch.float32 if toy else torch.bfloat16))
        case ["train", shape, zero]:
            from benchmarks.gpu_training import ours

            ours(_work(name, place, shape=shape, stage=int(zero[-1])), found)
        case ["kept"]:
            from benchmarks.gpu_training import kept_of_a_layer

            kept_of_a_layer(_work(name, place, shape="1b"), found)
        case ["longest", shape]:
            from benchmarks.gpu_longest import longest

            longest(_work(name, place, shape=shape), found, until=turn + 0.9 * place.budget(name))
        case ["loop" | "trl"]:
            from benchmarks import gpu_peers

            work = _work(name, place, shape="1b")
            work = replace(work, rows=work.rows[:1])
            (gpu_peers.trl if name == "trl" else gpu_peers.minimal_loop)(work, found)


def _work(name: str, place: Place, *, shape: str, stage: int = 1) -> Any:
    """An item's work, for which the model lies ready."""
    from benchmarks.gpu_training import MICRO_TOKENS, SHAPES, Work, make_model

    if place.toy:
        work = Work(SHAPES["toy"], stage, (128, 256), place.device, 1.0, place.folder)
    else:
        # Starting, making or loading the model and tokenising the rows take more than half of an item's time.
        seconds = BUDGETS[name] * 0.25
        # The large model's update takes a second and a half of a hundred: as in a real run, it comes after more tokens.
        passes = 4 if shape == "8b" else 2
        work = Work(SHAPES[shape], stage, (8192, MICRO_TOKENS), place.device, seconds, place.folder, passes)
    make_model(work)
    return replace(work, attention=place.attention)


def _rates(device: str) -> dict[str, Any]:
    import torch

    from benchmarks.timing import seconds

    size, dtype = (8192, torch.bfloat16) if device == "cuda" else (512, torch.float32)
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    source = torch.randn(2**28 if device == "cuda" else 2**20, device=device)
    target = torch.empty_like(source)
    product = min(seconds(lambda: torch.mm(a, b), device) for _ in range(10))
    copy = min(seconds(lambda: target.copy_(source), device) for _ in range(10))
    return {"teraflops": 2 * size**3 / product / 1e12, "copied_bytes_per_second": 2 * source.nbytes / copy}


def start_item(name: str, place: Place) -> subprocess.Popen[bytes]:
    """Its process, which imports and then waits for its turn."""
    command = [sys.executable, "-m", "benchmarks.gpu", "--item", name, *place.arguments()]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(HERE.parent), *sys.path[1:]])}
    if place.toy:
        environment |= {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    if name == "trl":  # accelerate takes DeepSpeed for one process only if both are told of in the environment
        environment |= {"ACCELERATE_USE_DEEPSPEED": "true", "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
        environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port())}
    (place.folder / f"{name}.jsonl").touch()
    with (place.folder / f"{name}.log").open("w") as log:
        return subprocess.Popen(command, env=environment, stdout=log, stderr=log)


def finish_item(name: str, process: subprocess.Popen[bytes], place: Place) -> dict[str, Any]:
    """Give it its turn: its figures, and what ended it early."""
    folder, budget, start = place.folder, place.budget(name), time.monotonic()
    (folder / f"{name}.turn").touch()
    try:
        code = process.wait(timeout=budget)
        ended = None if code == 0 else f"exit code {code}"
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        ended = f"out of time after {budget} s"
    last = (folder / f"{name}.log").read_text()[-1500:] if ended else None
    lines = [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]
    result = {"figures": lines, "seconds": round(time.monotonic() - start, 1), "ended": ended, "last_words": last}
    return {key: value for key, value in result.items() if value is not None}


def results_before(out: Path | None, here: dict[str, Any], *, some: bool) -> dict[str, Any]:
    """What the results begin with: those of the file where only some items are measured anew."""
    if some and out is not None and out.is_file():
        before: dict[str, Any] = json.loads(out.read_text())
        return before
    return {"machine": here, "items": {}}


def command_of(name: str, place: Place) -> str:
    """What makes an item's figures."""
    chosen = [] if place.attention == "auto" else ["--attention", place.attention]
    return " ".join(["python -m benchmarks.gpu", *(["--toy"] if place.toy else []), "--only", name, *chosen])


def _a_gpu_is_here() -> bool:
    import torch

    return torch.cuda.is_available()


def _memory_folder() -> str | None:
    """Where models are written fastest, if there is room for them."""
    shared = Path("/dev/shm")
    return str(shared) if shared.is_dir() and shutil.disk_usage(shared).free > 40e9 else None


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--toy", action="store_true", help="toy sizes on this CPU; proves nothing but that all of it runs"
    )
    parser.add_argument(
        "--only", nargs="+", choices=list(BUDGETS), metavar="ITEM", help="these, beside what the results hold of others"
    )
    parser.add_argument("--attention", default="auto", help="model.attention of our runs")
    parser.add_argument("--out", type=Path, help="where the results go; default: results/gpu.json")
    for hidden in ("--item", "--folder", "--device"):
        parser.add_argument(hidden, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.item:
        return _child(arguments.item, Place(arguments.device, Path(arguments.folder), arguments.attention))
    device = "cpu" if arguments.toy else "cuda"
    if device == "cuda" and not _a_gpu_is_here():
        parser.error("torch sees no GPU here; --toy runs all of it on this CPU at toy size")
    out = arguments.out or (None if arguments.toy else RESULTS)
    if arguments.attention != "auto" and out == RESULTS:
        parser.error("--attention: write --out too, for results/gpu.json has the figures of auto")
    here = machine(device)
    results = results_before(out, here, some=arguments.only is not None)
    # Others' figures may be of another machine, or of another day.
    where = {} if here == results["machine"] else {"machine": here}
    with tempfile.TemporaryDirectory(dir=_memory_folder()) as folder:
        names = [name for name in arguments.only or BUDGETS if device == "cuda" or name in TOY_BUDGETS]
        place = Place(device, Path(folder), arguments.attention)
        coming = start_item(names[0], place)
        for name, following in zip(names, [*names[1:], None], strict=True):
            process = coming
            if following is not None:
                coming = start_item(following, place)
            figures = finish_item(name, process, place)
            results["items"][name] = {"command": command_of(name, place), **where, **figures}
            print(name, json.dumps(results["items"][name]), flush=True)
            if out is not None:
                out.write_text(json.dumps(results, indent=2) + "\n")
    failed = [name for name in names if "ended" in results["items"][name]]
    print("all items ran" if not failed else f"ended early: {', '.join(failed)}")
    return 1 if failed else 0


def _imports(name: str) -> None:
    """What takes seconds and no GPU."""
    if name not in ("rates", "loss", "attention"):
        import deepspeed  # noqa: F401

        import seqaware.training.assembly  # noqa: F401
        from benchmarks import gpu_peers  # noqa: F401


def _child(name: str, place: Place) -> int:
    from seqaware.distributed.process_group import prepare_environment

    prepare_environment()
    _imports(name)
    turn = place.folder / f"{name}.turn"
    while not turn.exists():
        time.sleep(0.05)
    begun = time.monotonic() - (time.time() - turn.stat().st_mtime)

    def found(figure: dict[str, Any]) -> None:
        with (place.folder / f"{name}.jsonl").open("a") as file:
            file.write(json.dumps(figure) + "\n")

    try:
        item(name, place, found, turn=begun)
    except ImportError as error:
        found({"absent": first_line(error)})
    except FAILURES as error:
        found({"failed": first_line(error)})
        raise
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
