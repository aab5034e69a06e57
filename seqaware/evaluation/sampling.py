"""Draws that depend on the row and on nothing else: neither on its neighbours in the batch nor on the ranks.

argmax(log p + g) with g drawn from Gumbel's distribution for every token is a draw from p (E. J. Gumbel, 1954). So a
greedy decoder draws, if this noise is added to its scores; and each row's noise comes from a generator of its own.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import LogitsProcessor


@dataclass(frozen=True)
class Decoding:
    """How tokens are chosen: temperature 0 takes the likeliest; top_p keeps the likeliest with this probability."""

    max_new_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    stop: tuple[str, ...] = ()


@dataclass
class Trace:
    """What a decoder saw at each step, [steps][R]: tokens, and of the model's distribution entropy (nats) and their p.

    Attributes:
        first: of the first step, the distribution of the first row, [V].
    """

    tokens: list[Tensor] = field(default_factory=list)
    entropy: list[Tensor] = field(default_factory=list)
    probability: list[Tensor] = field(default_factory=list)
    first: Tensor | None = None

    def see(self, log_probabilities_RV: Tensor, chosen_R: Tensor) -> None:
        probabilities = log_probabilities_RV.exp()
        self.tokens.append(chosen_R.cpu())
        self.entropy.append(torch.special.entr(probabilities).sum(-1).cpu())
        self.probability.append(probabilities.gather(1, chosen_R[:, None])[:, 0].cpu())
        if self.first is None:
            self.first = probabilities[0].cpu()


class Draw(LogitsProcessor):
    """Scores [R, V] whose argmax is the draw of each row.

    Args:
        names: of the rows, in their order. trace: hears every step, of the distribution before temperature and top_p.
    """

    def __init__(self, decoding: Decoding, names: Sequence[str], *, trace: Trace | None = None) -> None:
        self._decoding = decoding
        self._generators = [_generator(decoding.seed, name) for name in names]
        self._trace = trace

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        del input_ids
        drawn = scores if self._decoding.temperature == 0 else self._noisy(scores.float())
        if self._trace is not None:
            self._trace.see(torch.log_softmax(scores.float(), dim=-1), drawn.argmax(-1))
        return drawn

    def _noisy(self, scores_RV: Tensor) -> Tensor:
        log_p = torch.log_softmax(scores_RV / self._decoding.temperature, dim=-1)
        if self._decoding.top_p < 1:
            log_p = _keep_top(log_p, self._decoding.top_p)
        size = scores_RV.shape[1]
        uniform = torch.stack([torch.rand(size, generator=each, dtype=torch.float64) for each in self._generators])
        gumbel = -torch.log(-torch.log(uniform))
        return log_p + gumbel.to(device=log_p.device, dtype=log_p.dtype)


def _keep_top(log_p_RV: Tensor, share: float) -> Tensor:
    ordered, index = log_p_RV.sort(dim=-1, descending=True)
    before = ordered.exp().cumsum(-1) - ordered.exp()
    # The token that crosses the share is kept, so one always is.
    return log_p_RV.masked_fill(
        torch.zeros_like(before, dtype=torch.bool).scatter(1, index, before >= share), -torch.inf
    )


def _generator(seed: int, name: str) -> torch.Generator:
    digest = hashlib.sha256(f"{seed}\0{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
