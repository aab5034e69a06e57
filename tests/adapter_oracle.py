"""Low-rank adapters, slow and obviously right: every effective weight written out as a float64 matrix.

A model whose parameters are the adapters. Its forward puts each effective weight in the place of the base's own and
calls the base as it is; there are no adapter layers. Trained by `oracles.descend`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.func import functional_call
from transformers import AutoModelForCausalLM

SEVEN = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Adapted:
    """What is adapted of a Llama: ends of the names of linear layers, and of those trained whole."""

    rank: int
    scale: float
    layers: tuple[str, ...] = SEVEN
    whole: tuple[str, ...] = ()
    dora: bool = False
    seed: int = 42


class AdaptedModel:
    """Parameters by name: `<layer>.A`, `<layer>.B`, `<layer>.m` with DoRA, `<module>.weight` of those trained whole."""

    def __init__(self, folder: Path, adapted: Adapted) -> None:
        self.base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64, attn_implementation="eager")
        self.base.train().requires_grad_(False)
        self.adapted = adapted
        self.trained: dict[str, torch.nn.Parameter] = {}
        for name, weight in self.base.named_parameters():
            module = name.removesuffix(".weight")
            if module.endswith(adapted.layers):
                self._add(f"{module}.A", first_weight(adapted.seed, module, adapted.rank, weight.shape[1]).double())
                self._add(f"{module}.B", torch.zeros(weight.shape[0], adapted.rank, dtype=torch.float64))
                if adapted.dora:
                    self._add(f"{module}.m", weight.square().sum(dim=1).sqrt())
            elif module.endswith(adapted.whole) and adapted.whole:
                self._add(name, weight.clone())

    def _add(self, name: str, value: torch.Tensor) -> None:
        self.trained[name] = torch.nn.Parameter(value)

    def effective(self) -> dict[str, torch.Tensor]:
        """Every weight of the plain model, by its name."""
        weights = dict(self.base.named_parameters())
        for name, weight in self.base.named_parameters():
            module = name.removesuffix(".weight")
            if name in self.trained:
                weights[name] = self.trained[name]
            elif f"{module}.B" in self.trained:
                moved = weight + self.adapted.scale * self.trained[f"{module}.B"] @ self.trained[f"{module}.A"]
                if self.adapted.dora:
                    # Liu et al. 2024, section 4.3: the norm counts as a constant in the backward.
                    norm = moved.detach().square().sum(dim=1).sqrt()
                    moved = moved * (self.trained[f"{module}.m"] / norm).unsqueeze(1)
                weights[name] = moved
        return weights

    def __call__(self, **inputs: Any) -> Any:
        return functional_call(self.base, self.effective(), kwargs=inputs)

    def parameters(self) -> Iterator[torch.nn.Parameter]:
        yield from self.trained.values()

    def named_parameters(self) -> Iterator[tuple[str, torch.nn.Parameter]]:
        yield from self.trained.items()


def first_weight(seed: int, name: str, rank: int, inputs: int) -> torch.Tensor:
    """What A starts from: uniform in ±1/√inputs, by a generator that the seed and the layer's name alone decide."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    generator = torch.Generator()
    generator.manual_seed(int.from_bytes(digest[:8], "big") // 2)
    return (2 * torch.rand(rank, inputs, generator=generator) - 1) * inputs**-0.5
