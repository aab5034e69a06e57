"""The fused loss on a GPU beside its matrix products, the naive loss and the kernels of others.

    python -m benchmarks.loss_kernel --cuda       on one GPU, two minutes; prints, and writes results/loss_cuda.json

Forward and backward of Σ w·l in bfloat16, contestants taking turns; medians between two events. N rows, H hidden size,
V vocabulary.

- products       the three matrix products alone
- ours           and with 60 % of the rows at weight zero
- naive          F.cross_entropy(h Wᵀ, reduction="none") · w, summed; compiled: the same under torch.compile
- liger          its fused linear cross-entropy without weights (sum); with weights it works everything out twice (none)
- cce            cut-cross-entropy, reduction none, times w
- trl            TRL's chunked log-probabilities, times w

Whoever is not installed, or fails, is named with the reason. Peak bytes are above the inputs: gradients are in them.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.machine import machine
from benchmarks.timing import FAILURES, first_line, peak_bytes, taking_turns
from seqaware.objective.cross_entropy import Head
from seqaware.objective.fused import fused_cross_entropy
from seqaware.objective.softmax_pass import choose_kernel

RESULTS = Path(__file__).parent / "results" / "loss_cuda.json"


@dataclass(frozen=True)
class Size:
    rows: int
    hidden: int
    vocabulary: int
    repeats: int = 5

    @property
    def operations(self) -> int:
        return 6 * self.rows * self.hidden * self.vocabulary

    @property
    def allowed_bytes(self) -> float:
        """dW in float32, dh in bfloat16, and 1.3 GB for everything else."""
        return 4 * self.vocabulary * self.hidden + 2 * self.rows * self.hidden + 1.3e9


FULL = (Size(16_384, 4096, 128_256), Size(16_384, 4096, 32_000), Size(8192, 5120, 152_064), Size(16_384, 2048, 50_257))
TOY = (Size(96, 32, 1001, repeats=1),)


class Problem:
    """Hidden states, head, labels and weights; leaves that require a gradient."""

    def __init__(self, size: Size, device: str, dtype: torch.dtype = torch.bfloat16) -> None:
        generator = torch.Generator(device).manual_seed(0)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, device=device)

        self.hidden = normal(size.rows, size.hidden).to(dtype).requires_grad_()
        self.weight = (normal(size.vocabulary, size.hidden) / size.hidden**0.5).to(dtype).requires_grad_()
        self.labels = torch.randint(0, size.vocabulary, (size.rows,), generator=generator, device=device)
        self.weights = 1.0 + 49.0 * torch.rand(size.rows, generator=generator, device=device)
        self.all_rows = torch.arange(size.rows, device=device)
        kept = torch.rand(size.rows, generator=generator, device=device) < 0.4
        self.sparse_weights, self.kept_rows = self.weights * kept, kept.nonzero().squeeze(1)

    def step(self, loss_of: Callable[[], Tensor]) -> None:
        self.hidden.grad = self.weight.grad = None
        torch.autograd.backward(loss_of())

    def ours(self) -> Tensor:
        return self._fused(self.weights, self.all_rows)

    def ours_sparse(self) -> Tensor:
        return self._fused(self.sparse_weights, self.kept_rows)

    def _fused(self, weights: Tensor, rows: Tensor) -> Tensor:
        head = Head(self.weight)
        loss, _ = fused_cross_entropy(
            self.hidden, head=head, labels_N=self.labels, weights_N=weights, rows=rows, weights_are_positive=True
        )
        return loss

    def naive(self) -> Tensor:
        return _naive(self.hidden, self.weight, self.labels, self.weights)

    @torch.no_grad()
    def products(self) -> None:
        grad_logits = self.hidden @ self.weight.T
        torch.mm(grad_logits, self.weight)
        torch.mm(grad_logits.T, self.hidden)


def _naive(hidden: Tensor, weight: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
    losses = F.cross_entropy((hidden @ weight.T).float(), labels, reduction="none")
    return (losses * weights).sum()


def _compiled(problem: Problem) -> Callable[[], Tensor]:
    compiled = torch.compile(_naive)
    return lambda: compiled(problem.hidden, problem.weight, problem.labels, problem.weights)


def _liger(problem: Problem, reduction: str) -> Callable[[], Tensor]:
    from liger_kernel.transformers.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyLoss

    loss = LigerFusedLinearCrossEntropyLoss(reduction=reduction, accum_dtype=torch.float32)
    if reduction == "sum":
        return lambda: loss(problem.weight, problem.hidden, problem.labels)
    return lambda: (loss(problem.weight, problem.hidden, problem.labels) * problem.weights).sum()


def _cce(problem: Problem) -> Callable[[], Tensor]:
    from cut_cross_entropy import linear_cross_entropy

    def loss() -> Tensor:
        losses: Tensor = linear_cross_entropy(problem.hidden, problem.weight, problem.labels, reduction="none")
        return (losses.float() * problem.weights).sum()

    return loss


def _trl(problem: Problem) -> Callable[[], Tensor]:
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction

    def loss() -> Tensor:
        arguments = (problem.hidden, problem.weight, None, problem.labels, 1.0, TRL_COLUMNS, None, 1.0, ())
        logprobs: Tensor = ChunkedLogProbFunction.apply(*arguments)[0]  # type: ignore[no-untyped-call]
        return -(logprobs * problem.weights).sum()

    return loss


TRL_COLUMNS = 8192
PEERS: dict[str, Callable[[Problem], Callable[[], Tensor]]] = {
    "naive": lambda problem: problem.naive,
    "naive, compiled": _compiled,
    "liger, sum": lambda problem: _liger(problem, "sum"),
    "liger, none": lambda problem: _liger(problem, "none"),
    "cce": _cce,
    "trl": _trl,
}


def measure(size: Size, device: str) -> dict[str, object]:
    """Figures of one size. Whoever fails is left out, by name."""
    problem = Problem(size, device)
    losses: dict[str, Callable[[], Tensor]] = {"ours": problem.ours, "ours, 40 % scored": problem.ours_sparse}
    absent: dict[str, str] = {}
    for name, make in PEERS.items():
        try:
            losses[name] = make(problem)
            problem.step(losses[name])
        except FAILURES as error:
            absent[name] = first_line(error)
            losses.pop(name, None)
            problem.hidden.grad = problem.weight.grad = None
    bytes_of: dict[str, int | None] = {}
    for name, loss_of in losses.items():
        problem.hidden.grad = problem.weight.grad = None
        bytes_of[name] = peak_bytes(partial(problem.step, loss_of), device)
    works: dict[str, Callable[[], object]] = {"products": problem.products}
    works |= {name: partial(problem.step, loss_of) for name, loss_of in losses.items()}
    spent = taking_turns(works, device, repeats=size.repeats)
    share = len(problem.kept_rows) / size.rows
    return {
        "size": asdict(size),
        "seconds": spent,
        "peak_bytes": bytes_of,
        "absent": absent,
        "teraflops_of_the_products": size.operations / spent["products"] / 1e12,
        "gates": _gates(size, spent, bytes_of["ours"], share=share),
    }


def _gates(size: Size, spent: dict[str, float], ours_bytes: int | None, *, share: float) -> list[dict[str, object]]:
    found = [("ours / products", spent["ours"] / spent["products"], 1.25 if size.hidden >= 4096 else None)]
    if "naive" in spent:
        found.append(("ours / naive", spent["ours"] / spent["naive"], 1 / 1.4))
    found.append(("40 % scored / all, over its share", spent["ours, 40 % scored"] / spent["ours"] / share, 1.15))
    if ours_bytes is not None:
        found.append(("bytes / (4VH + 2NH + 1.3 GB)", ours_bytes / size.allowed_bytes, 1.0))
    return [
        {"name": name, "value": value, "limit": limit, "holds": limit is None or value <= limit}
        for name, value, limit in found
    ]


def errors(device: str, *, rows: int = 2048, hidden: int = 1024, vocabulary: int = 32_001) -> dict[str, object]:
    """Relative errors (Frobenius) against float64 on the same bfloat16 values, ours and naive."""
    problem = Problem(Size(rows, hidden, vocabulary), device)
    leaves = (problem.hidden, problem.weight)
    wide = [leaf.detach().double().requires_grad_() for leaf in leaves]
    exact_loss = (
        F.cross_entropy(wide[0] @ wide[1].T, problem.labels, reduction="none") * problem.weights.double()
    ).sum()
    exact = torch.autograd.grad(exact_loss, wide)
    found: dict[str, object] = {"kernel": asdict(choose_kernel(problem.hidden.device, torch.float32))}
    for name, loss_of in (("ours", problem.ours), ("naive", problem.naive)):
        loss = loss_of()
        gradients = torch.autograd.grad(loss, leaves)
        relative = [((g.double() - e).norm() / e.norm()).item() for g, e in zip(gradients, exact, strict=True)]
        off = (loss.double() - exact_loss).abs() / exact_loss.abs()
        found[name] = {"loss": off.item(), "hidden": relative[0], "weight": relative[1]}
    return found


def run(device: str, *, toy: bool) -> int:
    """All sizes, printed and written."""
    figures: dict[str, object] = {"machine": machine(device)}
    figures["errors"] = errors(device, rows=64, hidden=32, vocabulary=501) if toy else errors(device)
    figures["sizes"] = [measure(size, device) for size in (TOY if toy else FULL)]
    print(json.dumps(figures, indent=2))
    if not toy:
        RESULTS.write_text(json.dumps(figures, indent=2) + "\n")
    return 0
