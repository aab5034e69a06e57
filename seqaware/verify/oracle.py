"""The oracle: one process, the model as transformers loads it, one document at a time, the plain loss.

No packing, no padding, no sharding, no cache, eager attention, log_softmax over all logits. It shares nothing with the
engine but the model's weights, which it is handed after every step, its adapters' first values and the token store.

Letters: M tokens with loss, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from seqaware.config.schema import LoraConfig
from seqaware.data.store.store_format import Document
from seqaware.models.lora import Adapters
from seqaware.models.model import LoadOptions, load_model
from seqaware.verify.weight_oracle import Scored

TokenLosses = Callable[[Tensor, Tensor], Tensor]
"""Logits [M, V] and labels [M] to losses [M]."""


@dataclass(frozen=True)
class OracleModel:
    """What to load, and how to compute with it.

    Attributes:
        allow_missing, seed: weights that the checkpoint may lack, drawn as the run draws them.
        lora: adapters as the run makes them from the seed, which are all that is trained then.
        weights: the run's dtype: the weights are rounded to it first, as the run's are.
        compute: the dtype of everything that follows.
        disturbed: move every weight by one rounding of `compute`, up or down.
    """

    source: str
    revision: str | None
    trust_remote_code: bool
    allow_missing: tuple[str, ...]
    lora: LoraConfig | None
    seed: int
    weights: torch.dtype
    compute: torch.dtype
    device: torch.device
    disturbed: bool = False


@dataclass(frozen=True, eq=False)
class OracleStep:
    """A step as the oracle sees it: each token's loss and weight, float64 [M], and every parameter's gradient."""

    losses: Tensor
    weights: Tensor
    denominator: float
    gradients: dict[str, Tensor]

    @property
    def loss(self) -> float:
        return float((self.losses * self.weights).sum()) / self.denominator

    @property
    def unweighted_loss(self) -> float:
        return float(self.losses[self.weights != 0].mean())

    @property
    def gradient_norm(self) -> float:
        return math.sqrt(sum(float(g.double().square().sum()) for g in self.gradients.values()))


@dataclass(frozen=True, eq=False)
class OracleEvaluation:
    """Documents as the oracle scores them. Each float64 [M].

    Attributes:
        step: their losses and weights, without gradients.
        margins: by how much the label's logit is above the largest other one. logsumexp: of all logits.
    """

    step: OracleStep
    margins: Tensor
    logsumexp: Tensor


class Oracle:
    """A model of its own, for as many steps as are asked for; its weights are what it is given."""

    def __init__(self, wanted: OracleModel) -> None:
        self._wanted = wanted
        self._device = wanted.device
        self._model = _load(wanted)
        self.take_weights({})

    @torch.no_grad()
    def take_weights(self, weights: Mapping[str, Tensor]) -> None:
        """Put the run's weights, by name, in the place of the oracle's own."""
        taken = [p for name, p in self._model.named_parameters() if name in weights or not weights]
        for name, parameter in self._model.named_parameters():
            if name in weights:
                parameter.copy_(weights[name].to(self._wanted.weights))
        if self._wanted.disturbed:
            _disturb(taken)

    def hidden_matrices(self) -> frozenset[str]:
        """The names of all matrices but the head and tables of embeddings."""
        model = self._model
        outer = {id(part.weight) for part in model.modules() if isinstance(part, torch.nn.Embedding)}
        outer |= {id(parameter) for parameter in model.get_output_embeddings().parameters()}
        return frozenset(name for name, p in model.named_parameters() if p.ndim >= 2 and id(p) not in outer)

    @torch.no_grad()
    def evaluate(
        self, documents: Sequence[Document], scored: Sequence[Sequence[Scored]], *, denominator: float
    ) -> OracleEvaluation:
        """The same losses as of a step, and what accuracy and logsumexp are made of; no gradients."""
        margins, logsumexp = [], []

        def losses_of(logits_MV: Tensor, labels_M: Tensor) -> Tensor:
            label_M = logits_MV.gather(1, labels_M[:, None]).squeeze(1)
            others_MV = logits_MV.scatter(1, labels_M[:, None], -math.inf)
            margins.append((label_M - others_MV.amax(dim=1)).double().cpu())
            logsumexp.append(torch.logsumexp(logits_MV, dim=1).double().cpu())
            return log_softmax_losses(logits_MV, labels_M)

        pairs = [self._document(*each, losses_of) for each in zip(documents, scored, strict=True)]
        losses, weights = (torch.cat([each[i].double().cpu() for each in pairs]) for i in (0, 1))
        step = OracleStep(losses, weights, denominator, {})
        return OracleEvaluation(step, torch.cat(margins), torch.cat(logsumexp))

    def step(
        self,
        documents: Sequence[Document],
        scored: Sequence[Sequence[Scored]],
        *,
        denominator: float,
        token_losses: TokenLosses,
    ) -> OracleStep:
        """Loss and gradient of Σ w·l / denominator over documents, one forward and backward each.

        Args:
            scored: the tokens with loss of every document.
        """
        sums: dict[str, Tensor] = {}
        losses, weights = [], []
        for document, tokens in zip(documents, scored, strict=True):
            losses_M, weights_M = self._document(document, tokens, token_losses)
            ((losses_M * weights_M.to(losses_M.dtype)).sum() / denominator).backward()
            self._take_gradients(sums)
            losses.append(losses_M.detach().double().cpu())
            weights.append(weights_M.cpu())
        return OracleStep(torch.cat(losses), torch.cat(weights), denominator, sums)

    def _document(
        self, document: Document, tokens: Sequence[Scored], token_losses: TokenLosses
    ) -> tuple[Tensor, Tensor]:
        ids = torch.tensor([document.tokens.tolist()], device=self._device)
        logits_TV: Tensor = self._model(input_ids=ids, use_cache=False).logits[0]
        predicted_from = torch.tensor([token.place - 1 for token in tokens], device=self._device, dtype=torch.int64)
        labels_M = torch.tensor([token.label for token in tokens], device=self._device, dtype=torch.int64)
        weights_M = torch.tensor([token.weight for token in tokens], device=self._device, dtype=torch.float64)
        # As every loss of the field does, softmax is taken in float32 at least.
        chosen_MV = logits_TV[predicted_from].to(torch.promote_types(logits_TV.dtype, torch.float32))
        return token_losses(chosen_MV, labels_M), weights_M

    def _take_gradients(self, sums: dict[str, Tensor]) -> None:
        """Add up in float32 at least: in bfloat16 the documents after the first few would be rounded away."""
        for name, parameter in self._model.named_parameters():
            if not parameter.requires_grad:
                continue
            wide = torch.promote_types(parameter.dtype, torch.float32)
            if name not in sums:
                sums[name] = torch.zeros(parameter.shape, dtype=wide, device=self._device)
            if parameter.grad is not None:
                sums[name] += parameter.grad
                parameter.grad = None


def log_softmax_losses(logits_MV: Tensor, labels_M: Tensor) -> Tensor:
    """−log p(label), written out."""
    return -torch.log_softmax(logits_MV, dim=-1)[torch.arange(len(labels_M), device=labels_M.device), labels_M]


def plain_cross_entropy_losses(logits_MV: Tensor, labels_M: Tensor) -> Tensor:
    """The same by the library's cross-entropy."""
    return F.cross_entropy(logits_MV, labels_M, reduction="none")


def _load(wanted: OracleModel) -> PreTrainedModel:
    options = LoadOptions(
        dtype=wanted.weights,
        dropout=None,
        revision=wanted.revision,
        trust_remote_code=wanted.trust_remote_code,
        deepspeed={},
        allow_missing=wanted.allow_missing,
        seed=wanted.seed,
        attention="eager",
    )
    loaded = load_model(wanted.source, options)
    if wanted.lora is not None:
        Adapters(loaded, wanted.lora, seed=wanted.seed, revision=wanted.revision, deepspeed={})
    model: Any = loaded
    model = model.to(wanted.device)
    if wanted.compute != wanted.weights:
        # Only then: it would round the float32 tables of rotary positions as well.
        model = model.to(wanted.compute)
    # Without dropout (verify sees to that) this mode computes what training computes.
    model.eval()
    oracle: PreTrainedModel = model
    return oracle


@torch.no_grad()
def _disturb(parameters: Iterable[Tensor]) -> None:
    generator = torch.Generator().manual_seed(0)
    for parameter in parameters:
        up = torch.randint(0, 2, parameter.shape, generator=generator).bool().to(parameter.device)
        towards = torch.where(up, torch.inf, -torch.inf).to(parameter.dtype)
        parameter.copy_(torch.nextafter(parameter, towards))
