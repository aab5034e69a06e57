"""The oracle's side of a step: its documents straight from the store, their weights, and the model taken twice."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from seqaware.compat.muon import orthogonalizing_dtype
from seqaware.config.schema import SftConfig
from seqaware.data.store.store_format import Document
from seqaware.models.model import DTYPES
from seqaware.plan.offload import offload_device
from seqaware.plan.plan import Plan
from seqaware.training.prepare import Prepared
from seqaware.verify.items import Pair, epsilon
from seqaware.verify.optimizer_oracle import ReferenceOptimizer
from seqaware.verify.oracle import Oracle, OracleEvaluation, OracleModel, TokenLosses
from seqaware.verify.weight_oracle import Scored, denominator, scored_tokens

OracleDType = Literal["auto", "float32", "float64"]

# With its gradients, its twin, and the engine's gradients beside them, a float64 oracle takes some 40 bytes a weight.
_BYTES_PER_PARAMETER = 40
_FLOAT64_PARAMETERS = 10**9


@dataclass(frozen=True)
class StepDocuments:
    """The documents of a step, which of their tokens carry loss, and what the step is divided by."""

    documents: list[Document]
    scored: list[list[Scored]]
    denominator: float

    @classmethod
    def of(cls, prepared: Prepared, step: int, sft: SftConfig) -> StepDocuments:
        """Of optimizer step `step` (from 1)."""
        ids = prepared.order.documents(*prepared.order.position(step))
        return cls.scored_by([prepared.store.document(int(index)) for index in ids], sft)

    @classmethod
    def scored_by(cls, documents: list[Document], sft: SftConfig) -> StepDocuments:
        """Any documents."""
        scored = [scored_tokens(document, sft) for document in documents]
        return cls(documents, scored, denominator(scored, sft.normalize_by))

    @property
    def tokens_with_loss(self) -> int:
        return sum(map(len, self.scored))

    @property
    def weight_sum(self) -> float:
        return sum(token.weight for tokens in self.scored for token in tokens)


class Reference:
    """The oracle twice: in the asked dtype, and in the run's, which shows what rounding does. On one rank alone.

    Args:
        source: the folder or hub id that the run's ranks load.
        device: of the run; the oracle stays on the CPU where it does not fit beside the engine.
    """

    def __init__(self, prepared: Prepared, source: str, *, dtype: OracleDType, device: torch.device) -> None:
        plan, parameters = prepared.plan, prepared.parameters
        if dtype == "auto":
            dtype = "float64" if parameters <= _FLOAT64_PARAMETERS else "float32"
        run, exact = DTYPES[plan.dtype], {"float32": torch.float32, "float64": torch.float64}[dtype]
        if device.type == "cuda" and torch.cuda.mem_get_info(device)[0] < _BYTES_PER_PARAMETER * parameters:
            device = torch.device("cpu")
        self._eps = epsilon(run)
        self._exact = Oracle(_model(plan, source, run=run, compute=exact, device=device))
        self._rounded = Oracle(_model(plan, source, run=run, compute=run, device=device, disturbed=run == exact))
        orthogonalizing = max(epsilon(orthogonalizing_dtype()), epsilon(run))
        optimizer = plan.config.training.optimizer
        # DeepSpeed gives Muon its CPUAdam with offload, and FusedAdam on a GPU.
        offloads = offload_device(plan.deepspeed["zero_optimization"], "offload_optimizer") is not None
        self.optimizer = ReferenceOptimizer(
            optimizer,
            hidden=self._exact.hidden_matrices(),
            muon_eps=orthogonalizing,
            compiled_adam=offloads or plan.world.device == "cuda",
        )
        self.told = f"{dtype} on {device.type}, rounding seen in {plan.dtype}"

    def pair(self, step: StepDocuments, token_losses: TokenLosses) -> Pair:
        """Loss and gradients of a step, by both."""
        exact, rounded = (
            oracle.step(step.documents, step.scored, denominator=step.denominator, token_losses=token_losses)
            for oracle in (self._exact, self._rounded)
        )
        return Pair(exact, rounded, self._eps)

    def take_weights(self, weights: Mapping[str, Tensor]) -> None:
        """Both oracles go on from the weights that the run has."""
        for oracle in (self._exact, self._rounded):
            oracle.take_weights(weights)

    def evaluations(self, documents: StepDocuments) -> tuple[OracleEvaluation, OracleEvaluation]:
        """Held-out documents, by both."""
        exact, rounded = (
            oracle.evaluate(documents.documents, documents.scored, denominator=documents.denominator)
            for oracle in (self._exact, self._rounded)
        )
        return exact, rounded


def _model(
    plan: Plan, source: str, *, run: torch.dtype, compute: torch.dtype, device: torch.device, disturbed: bool = False
) -> OracleModel:
    config = plan.config
    return OracleModel(
        source=source,
        revision=config.model.revision if config.model.from_scratch is None else None,
        trust_remote_code=config.model.trust_remote_code,
        allow_missing=config.model.allow_missing,
        lora=config.lora,
        seed=config.training.control.seed,
        weights=run,
        compute=compute,
        device=device,
        disturbed=disturbed,
    )
