"""Slow and obviously right: what a run must equal, written from the formulas, sharing no code with the package.

One process, one document at a time, no packing, no fused loss, float64, transformers' own eager attention.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase


def suffix_weights(count: int, gamma: float) -> list[float]:
    """w_k for k = 1 … count, summed literally over every suffix that contains token k: Σ_{s ≤ k} γ^(k − s)."""
    return [sum(gamma ** (k - s) for s in range(1, k + 1)) for k in range(1, count + 1)]


@dataclass(frozen=True)
class OracleDocument:
    """Token ids, and for each whether it carries loss when it is predicted.

    Attributes:
        weights: of the tokens that carry loss, in their order; None: by their number among them.
    """

    tokens: Sequence[int]
    supervised: Sequence[bool]
    weights: Sequence[float] | None = None


def question_rows(rows: Path, tokenizer: PreTrainedTokenizerBase) -> list[OracleDocument]:
    """Rows of tests.tiny, tokenised by hand: the prompt, then a blank and the answer, then the end."""
    documents = []
    for line in rows.read_text().splitlines():
        row = json.loads(line)
        prompt = tokenizer.encode(f"Q: {row['question']} A:")
        completion = [*tokenizer.encode(f" {row['answer']}"), tokenizer.eos_token_id]
        documents.append(OracleDocument(prompt + completion, [False] * len(prompt) + [True] * len(completion)))
    return documents


@dataclass(frozen=True)
class OracleSettings:
    gamma: float
    normalize_by: str
    learning_rates: Sequence[float]
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    max_grad_norm: float = 1.0
    optimizer: str = "adamw"
    momentum: float = 0.95


@dataclass
class OracleRun:
    losses: list[float] = field(default_factory=list)
    unweighted: list[float] = field(default_factory=list)
    grad_norms: list[float] = field(default_factory=list)
    accuracies: list[float] = field(default_factory=list)
    weights: dict[str, torch.Tensor] = field(default_factory=dict)


def train(model_folder: Path, steps: Sequence[Sequence[OracleDocument]], settings: OracleSettings) -> OracleRun:
    """Train over the given documents of each optimizer step with AdamW, clipping and the given learning rates."""
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float64, attn_implementation="eager")
    model.train()
    return descend(model, steps, settings)


def descend(model, steps: Sequence[Sequence[OracleDocument]], settings: OracleSettings) -> OracleRun:
    """Train every parameter of a float64 model, whatever it is made of."""
    hidden = []
    if settings.optimizer == "muon":
        outer = {id(model.get_input_embeddings().weight), id(model.get_output_embeddings().weight)}
        hidden = [p for p in model.parameters() if p.ndim >= 2 and id(p) not in outer]
    muon = Muon(hidden, settings)
    rest = [p for p in model.parameters() if all(p is not h for h in hidden)]
    adamw = torch.optim.AdamW(
        [
            {"params": [p for p in rest if p.ndim >= 2], "weight_decay": settings.weight_decay},
            {"params": [p for p in rest if p.ndim < 2], "weight_decay": 0.0},
        ],
        betas=settings.betas,
        eps=settings.eps,
        foreach=False,
    )
    run = OracleRun()
    for documents, rate in zip(steps, settings.learning_rates, strict=True):
        _gradients(model, documents, settings=settings, run=run)
        for group in adamw.param_groups:
            group["lr"] = rate
        adamw.step()
        muon.step(rate)
    run.weights = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    return run


def _gradients(model, documents, *, settings, run) -> None:
    """The clipped gradient of a step into every parameter, and the step's figures into `run`."""
    weighted, plain, weight_sum, tokens, correct = 0.0, 0.0, 0.0, 0, 0
    for document in documents:
        ids = torch.tensor([list(document.tokens)])
        logits = model(input_ids=ids, use_cache=False).logits[0, :-1]
        targets = ids[0, 1:]
        losses = -torch.log_softmax(logits, dim=-1)[torch.arange(len(targets)), targets]
        places = [i for i in range(len(targets)) if document.supervised[i + 1]]
        given = suffix_weights(len(places), settings.gamma) if document.weights is None else document.weights
        weights = torch.tensor(given, dtype=torch.float64)
        weighted = weighted + (weights * losses[places]).sum()
        plain += float(losses[places].sum().detach())
        weight_sum += float(weights.sum())
        tokens += len(places)
        correct += int((logits[places].argmax(-1) == targets[places]).sum())
    denominator = {"tokens": tokens, "weight": weight_sum, "sequences": len(documents)}[settings.normalize_by]
    loss = weighted / denominator
    for p in model.parameters():
        p.grad = None
    loss.backward()
    norm = torch.sqrt(sum((p.grad**2).sum() for p in model.parameters()))
    if settings.max_grad_norm and norm > settings.max_grad_norm:
        for p in model.parameters():
            p.grad *= settings.max_grad_norm / norm
    run.losses.append(float(loss.detach()))
    run.unweighted.append(plain / tokens)
    run.grad_norms.append(float(norm))
    run.accuracies.append(correct / tokens)


class Muon:
    """Momentum, orthogonalized by the published five quintic Newton–Schulz steps, with Nesterov's look ahead."""

    def __init__(self, matrices: Sequence[torch.nn.Parameter], settings: OracleSettings) -> None:
        self.matrices, self.settings = matrices, settings
        self.averages = [torch.zeros_like(p) for p in matrices]

    @torch.no_grad()
    def step(self, rate: float) -> None:
        beta = self.settings.momentum
        for p, average in zip(self.matrices, self.averages, strict=True):
            average.copy_(beta * average + (1 - beta) * p.grad)
            x = beta * average + (1 - beta) * p.grad
            x = x / (x.norm() + 1e-7)
            for _ in range(5):
                a = x @ x.T
                x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
            p.mul_(1 - rate * self.settings.weight_decay)
            p.sub_(rate * max(1.0, p.shape[0] / p.shape[1]) ** 0.5 * x)
