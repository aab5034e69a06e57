"""What does the fused weighted loss cost beside the naive one, and beside its matrix products alone?

    python -m benchmarks.loss_kernel            every gate, four minutes of one core; writes results/loss_kernel.json
    python -m benchmarks.loss_kernel --quick    small sizes, seconds; judges nothing and writes nothing
    python -m benchmarks.loss_kernel --cuda     on a GPU, beside the kernels of others: see loss_cuda.py

Every contestant runs forward and backward in this one process, on one thread, and the contestants take turns, so that
a machine that gets busy gets busy for all of them; a figure is the median of CPU seconds (not of wall time).

- naive     F.cross_entropy(h Wᵀ, reduction="none") · w, summed
- products  the three matrix products alone: h Wᵀ, dz W, dzᵀ h
- fused     ours; "40 % scored" is the same with 60 % of the rows at weight zero
- torch     F.linear_cross_entropy(reduction="none") · w, where this torch has it

Memory is the peak of the resident set (VmHWM of Linux) of a process of its own, above what it held when the loss began:
inputs are not in it, gradients are. The weight gradient's error is relative (Frobenius), against float64 on the same
bfloat16 values; one GEMM gets the exact gradient of the logits, rounded to bfloat16.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import loss_cuda
from benchmarks.machine import machine
from seqaware.objective import fused
from seqaware.objective.cross_entropy import Head
from seqaware.objective.fused import fused_cross_entropy
from seqaware.objective.products import operand_dtype

RESULTS = Path(__file__).parent / "results" / "loss_kernel.json"
MIB = 2**20


@dataclass(frozen=True)
class Size:
    rows: int
    vocabulary: int
    hidden: int = 512
    repeats: int = 3


@dataclass(frozen=True)
class Sizes:
    small_vocabulary: Size
    large_vocabulary: Size
    memory: Size
    precision: Size


FULL = Sizes(Size(4096, 32_000), Size(1024, 152_064), Size(8192, 32_000), Size(8192, 1024, hidden=128))
# A tiny run first: libraries load their kernels and their buffers once.
WARM_UP = Size(8, 64, hidden=16)
QUICK = Sizes(Size(256, 4000), Size(64, 19_008), Size(1024, 4000, hidden=64), Size(1024, 256, hidden=32))


@dataclass(frozen=True)
class Gate:
    """One promise: `value` must not exceed `limit`."""

    name: str
    value: float
    limit: float

    @property
    def holds(self) -> bool:
        return self.value <= self.limit


class Problem:
    """Hidden states, head, labels and weights of one size; leaves that require a gradient."""

    def __init__(self, size: Size, *, dtype: torch.dtype = torch.float32, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        hidden = torch.randn(size.rows, size.hidden, generator=generator)
        weight = torch.randn(size.vocabulary, size.hidden, generator=generator) / size.hidden**0.5
        self.hidden = hidden.to(dtype).requires_grad_()
        self.weight = weight.to(dtype).requires_grad_()
        self.labels = torch.randint(0, size.vocabulary, (size.rows,), generator=generator)
        self.weights = 1.0 + 49.0 * torch.rand(size.rows, generator=generator)
        self.sparse_weights = self.weights * (torch.rand(size.rows, generator=generator) < 0.4)

    def naive(self) -> None:
        logits = self.hidden @ self.weight.T
        self._backward((F.cross_entropy(logits, self.labels, reduction="none") * self.weights).sum())

    def linear(self) -> None:
        losses = F.linear_cross_entropy(self.hidden, self.weight, self.labels, reduction="none")
        self._backward((losses * self.weights).sum())

    def fused(self) -> None:
        self._backward(self._fused_loss(self.weights))

    def fused_sparse(self) -> None:
        self._backward(self._fused_loss(self.sparse_weights))

    @torch.no_grad()
    def products(self) -> None:
        grad_logits = self.hidden @ self.weight.T
        torch.mm(grad_logits, self.weight)
        torch.mm(grad_logits.T, self.hidden)

    def _fused_loss(self, weights: Tensor) -> Tensor:
        loss, _ = fused_cross_entropy(self.hidden, head=Head(self.weight), labels_N=self.labels, weights_N=weights)
        return loss

    def _backward(self, loss: Tensor) -> None:
        self.hidden.grad = self.weight.grad = None
        torch.autograd.backward(loss)

    def scored_share(self) -> float:
        return (self.sparse_weights != 0).double().mean().item()

    def fused_weight_gradient(self, *, chunks: int) -> Tensor:
        # More chunks than the kernel would make at this size: what matters is how often dW is added to.
        rows = len(self.hidden) // chunks
        with mock.patch.object(fused, "_most_chunk_rows", lambda weight: rows):
            loss = self._fused_loss(self.weights)
        gradients: tuple[Tensor, ...] = torch.autograd.grad(loss, self.weight)
        return gradients[0]

    def exact_gradients(self) -> tuple[Tensor, Tensor]:
        """dz [N, V] and dW [V, H] in float64."""
        hidden, weight = self.hidden.detach().double(), self.weight.detach().double()
        grad_logits = torch.softmax(hidden @ weight.T, -1)
        grad_logits[torch.arange(len(hidden)), self.labels] -= 1.0
        grad_logits *= self.weights.double().unsqueeze(1)
        return grad_logits, grad_logits.T @ hidden


def cpu_seconds(contestants: dict[str, Callable[[], None]], *, repeats: int) -> dict[str, float]:
    """Median CPU seconds of each; they take turns."""
    measured: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(repeats):
        for name, run in contestants.items():
            start = time.process_time()
            run()
            measured[name].append(time.process_time() - start)
    return {name: statistics.median(seconds) for name, seconds in measured.items()}


def time_vocabulary(size: Size, *, sparse: bool) -> tuple[dict[str, float], float]:
    """CPU seconds by contestant, and the share of scored rows in the sparse one."""
    cpu_seconds(_contestants(Problem(WARM_UP), sparse=sparse), repeats=1)
    problem = Problem(size)
    return cpu_seconds(_contestants(problem, sparse=sparse), repeats=size.repeats), problem.scored_share()


def peak_mib(contestant: str, size: Size, dtype: str) -> float:
    """Peak memory of one forward and backward in a fresh process."""
    shape = [str(n) for n in (size.rows, size.vocabulary, size.hidden)]
    command = [sys.executable, "-m", "benchmarks.loss_kernel", "--measure-memory", contestant, dtype, *shape]
    finished = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(finished.stdout)


def measure_memory(contestant: str, dtype: str, *numbers: str) -> None:
    """The child's part: prints MiB."""
    kind: torch.dtype = getattr(torch, dtype)
    getattr(Problem(WARM_UP, dtype=kind), contestant)()
    problem = Problem(Size(*map(int, numbers)), dtype=kind)
    # The peak of making the inputs must not hide the peak of the loss.
    Path("/proc/self/clear_refs").write_text("5")
    before = _status_kib("VmRSS")
    getattr(problem, contestant)()
    print((_status_kib("VmHWM") - before) / 1024)


def weight_gradient_errors(size: Size) -> dict[str, float]:
    """Relative error of dW of a bfloat16 head against float64 on the same values."""
    problem = Problem(size, dtype=torch.bfloat16)
    grad_logits, exact = problem.exact_gradients()
    one_gemm = grad_logits.bfloat16().T @ problem.hidden.detach()
    fused = problem.fused_weight_gradient(chunks=128)
    return {
        name: ((gradient.double() - exact).norm() / exact.norm()).item()
        for name, gradient in (("one GEMM", one_gemm), ("fused, 128 chunks", fused))
    }


def arithmetic() -> dict[str, object]:
    """How this processor multiplies."""
    return {
        "threads": torch.get_num_threads(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "bfloat16_is_multiplied_in": str(operand_dtype(torch.bfloat16, torch.device("cpu"))),
    }


def run(sizes: Sizes) -> tuple[dict[str, object], list[Gate]]:
    """All figures and the verdicts on them."""
    small, scored = time_vocabulary(sizes.small_vocabulary, sparse=True)
    large, _ = time_vocabulary(sizes.large_vocabulary, sparse=False)
    memory = {name: peak_mib(name, sizes.memory, "float32") for name in ("naive", "fused")}
    memory["fused, bfloat16"] = peak_mib("fused", sizes.memory, "bfloat16")
    errors = weight_gradient_errors(sizes.precision)
    gates = [
        Gate("time, fused / naive, small vocabulary", small["fused"] / small["naive"], 0.85),
        Gate("time, fused / naive, large vocabulary", large["fused"] / large["naive"], 1.05),
        Gate("time, fused / three products, small vocabulary", small["fused"] / small["products"], 1.35),
        Gate("time, fused / three products, large vocabulary", large["fused"] / large["products"], 1.35),
        # In proportion, with a tenth for what does not depend on the rows: dW is made and scaled once either way.
        Gate(
            "time, 40 % scored / all, over the share scored", small["fused, 40 % scored"] / small["fused"] / scored, 1.1
        ),
        Gate("peak memory, fused / naive", memory["fused"] / memory["naive"], 0.1),
        Gate("error of dW in bfloat16, fused / one GEMM", errors["fused, 128 chunks"] / errors["one GEMM"], 1.2),
    ]
    figures: dict[str, object] = {
        "sizes": asdict(sizes),
        "cpu_seconds": {"small_vocabulary": small, "large_vocabulary": large},
        "scored_share": scored,
        "peak_mib_above_start": memory,
        "weight_gradient_relative_error": errors,
    }
    return figures, gates


def table(figures: dict[str, object], gates: list[Gate]) -> str:
    lines = [f"{name}: {json.dumps(value)}" for name, value in figures.items()]
    if gates:
        lines += ["", f"{'gate':<50} {'measured':>9} {'limit':>6}"]
    lines += [f"{g.name:<50} {g.value:>9.3f} {g.limit:>6.2f}  {'holds' if g.holds else 'FAILS'}" for g in gates]
    return "\n".join(lines)


def _contestants(problem: Problem, *, sparse: bool) -> dict[str, Callable[[], None]]:
    contestants = {"naive": problem.naive, "products": problem.products, "fused": problem.fused}
    if sparse:
        contestants["fused, 40 % scored"] = problem.fused_sparse
    if sparse and hasattr(F, "linear_cross_entropy"):
        contestants["torch"] = problem.linear
    return contestants


def _status_kib(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1])
    raise SystemExit(f"this system does not report {field}; the memory figures need Linux")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small sizes; judges nothing and writes nothing")
    parser.add_argument("--cuda", action="store_true", help="on a GPU; without one, the same at toy size on the CPU")
    parser.add_argument("--measure-memory", nargs=5, metavar="ARG", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.cuda:
        return loss_cuda.run("cuda" if torch.cuda.is_available() else "cpu", toy=not torch.cuda.is_available())
    torch.set_num_threads(1)
    if arguments.measure_memory:
        measure_memory(*arguments.measure_memory)
        return 0
    figures, gates = run(QUICK if arguments.quick else FULL)
    print(table(figures, [] if arguments.quick else gates))
    if arguments.quick:
        return 0
    verdicts = [{**asdict(gate), "holds": gate.holds} for gate in gates]
    RESULTS.parent.mkdir(exist_ok=True)
    named = {"machine": machine(), "arithmetic": arithmetic(), **figures, "gates": verdicts}
    RESULTS.write_text(json.dumps(named, indent=2) + "\n")
    return 0 if all(gate.holds for gate in gates) else 1


if __name__ == "__main__":
    raise SystemExit(main())
