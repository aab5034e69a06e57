"""From the command to the first step: where the seconds go, and what two lighter imports save.

    python -m benchmarks.startup                 results in benchmarks/results/startup.json

The demo's config, one optimizer step, ZeRO-3. Every start is a process of its own; the kinds take turns. "heavy" is the
same start as the libraries come: Python's garbage collector on while it imports, MLflow imported by DeepSpeed's
autotuner, and DeepSpeed's Muon handing its functions to the compiler at its import.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "startup.json"
COMMAND = "launcher/train.py", "train_configs/demo.yaml"
SETTINGS = {
    "training.schedule.max_steps": "1",
    "training.schedule.warmup_steps": "1",
    "evaluation.metric": "none",
    "evaluation.dataset": "null",
    "output.save_model": "false",
    "deepspeed": "ds_configs/zero3.json",
}


class Parts:
    """CPU and wall seconds of each phase; a phase that comes again adds up."""

    def __init__(self) -> None:
        self.found: dict[str, list[float]] = {}
        self._last = "python and the config", time.process_time(), time.perf_counter()
        self._last = self._last[0], 0.0, self._last[2] - time.process_time()  # Python itself began before this module

    def turn_to(self, name: str) -> None:
        before, cpu, wall = self._last
        self._last = name, time.process_time(), time.perf_counter()
        spent = self.found.setdefault(before, [0.0, 0.0])
        spent[0] += self._last[1] - cpu
        spent[1] += self._last[2] - wall


def start(settings: list[str], *, heavy: bool) -> None:
    """One run of one rank in this process; its parts are printed as JSON."""
    parts = Parts()
    from launcher.imports import quick_imports
    from seqaware.config.loading import load_config
    from seqaware.distributed.process_group import disconnect, find_address, prepare_environment
    from seqaware.watchdog.heartbeat import Heartbeat

    class Recorded(Heartbeat):
        def phase(self, name: str, step: int | None = None) -> None:
            del step
            parts.turn_to(name)

    prepare_environment()
    config = load_config(ROOT / COMMAND[1], settings)
    parts.turn_to("imports")
    with nullcontext() if heavy else quick_imports():
        from seqaware.training.launch import RunRequest, run
    if heavy:
        import deepspeed.runtime.zero.muon.original_muon  # noqa: F401
    run(RunRequest(config, resume="never"), address=find_address(), say=lambda text: None, heartbeat=Recorded())
    parts.turn_to("end")
    disconnect()
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps({"parts": parts.found, "modules": len(sys.modules), "peak_mib": round(memory)}))


def environment(**more: str) -> dict[str, str]:
    plain = {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    return os.environ | plain | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"} | more


def timed(command: list[str]) -> tuple[float, float, str]:
    """CPU seconds of it and of what it started, wall seconds, and what it printed."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    begun = time.perf_counter()
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, check=False)
    wall = time.perf_counter() - begun
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}")
    now = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = now.ru_utime + now.ru_stime - used.ru_utime - used.ru_stime
    return cpu, wall, done.stdout


def parts_of_a_start(folder: Path, *, repeats: int) -> dict[str, Any]:
    """Medians by part, for starts that tokenise, starts that find the tokens, and heavy ones."""
    runs: dict[str, list[dict[str, Any]]] = {}
    for turn in range(repeats):
        for kind in ("tokenises", "finds its tokens", "heavy"):
            store = folder / (f"store-{turn}" if kind == "tokenises" else "store-0")
            sets = _settings(folder / f"run-{kind.split()[0]}-{turn}", store)
            heavy = ["--heavy"] if kind == "heavy" else []
            cpu, wall, printed = timed([sys.executable, "-m", "benchmarks.startup", "--start", *sets, *heavy])
            told = json.loads(printed.splitlines()[-1])
            runs.setdefault(kind, []).append(told | {"cpu": cpu, "wall": wall})
            print(kind, round(cpu, 2), "CPU s", round(wall, 2), "s", flush=True)
    return {kind: _medians(each) for kind, each in runs.items()}


def _settings(run: Path, store: Path) -> list[str]:
    return [f"{key}={value}" for key, value in (SETTINGS | {"output.dir": run, "dataset.store_dir": store}).items()]


def _medians(runs: list[dict[str, Any]]) -> dict[str, Any]:
    middle: Callable[[list[float]], float] = lambda values: round(statistics.median(values), 2)  # noqa: E731
    names = list(runs[0]["parts"])
    return {
        "cpu_seconds": middle([run["cpu"] for run in runs]),
        "cpu_seconds_of_each": [round(run["cpu"], 2) for run in runs],
        "seconds": middle([run["wall"] for run in runs]),
        "modules": runs[0]["modules"],
        "peak_mib": middle([run["peak_mib"] for run in runs]),
        "cpu_seconds_by_part": {name: middle([run["parts"][name][0] for run in runs]) for name in names},
        "seconds_by_part": {name: middle([run["parts"][name][1] for run in runs]) for name in names},
    }


def commands(folder: Path, *, repeats: int) -> dict[str, Any]:
    """Whole commands, to their ends: a plan without torch, and two ranks by two launchers."""
    kinds = {
        "--dry-run": [sys.executable, *COMMAND, "--dry-run"],
        "import torch": [sys.executable, "-c", "import torch"],
        "import deepspeed": [sys.executable, "-c", "import deepspeed"],
        "two ranks by deepspeed": ["deepspeed", "--num_gpus", "2", "--master_port", "29611", *COMMAND],
        "two ranks by torchrun": ["torchrun", "--nproc-per-node", "2", "--master-port", "29612", *COMMAND],
    }
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in kinds}
    for turn in range(repeats + 1):
        for name, command in kinds.items():
            sets = _settings(folder / f"{turn}-{name.replace(' ', '-')}", folder / "store-0")
            given = [word for each in sets for word in ("--set", each)] if "ranks" in name else []
            spent = timed(command + given)[:2]
            print(name, *(round(each, 2) for each in spent), flush=True)
            if turn:  # in the first, operators may be built
                found[name].append(spent)
    return {
        name: {
            "cpu_seconds": round(statistics.median(cpu for cpu, _ in each), 2),
            "seconds": round(statistics.median(wall for _, wall in each), 2),
        }
        for name, each in found.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--only", choices=["starts", "commands"], help="Leave the other's results as they are.")
    parser.add_argument("--start", nargs="*", help=argparse.SUPPRESS)
    parser.add_argument("--heavy", action="store_true", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.start is not None:
        start(asked.start, heavy=asked.heavy)
        return
    from benchmarks.machine import machine

    found: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    found |= {"machine": machine(), "repeats": asked.repeats}
    sections = {"starts": parts_of_a_start, "commands": commands}
    with tempfile.TemporaryDirectory() as name:
        for section, measure in sections.items():
            if asked.only in (None, section):
                found[section] = measure(Path(name), repeats=asked.repeats)
                RESULTS.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
