"""One optimizer step over sharded micro-batches, with one denominator for all of them.

The algebra, for a step over the micro-batches b of the ranks r:

    loss  =  Σ_r Σ_b Σ_t w_t · l_t  /  D            D: supervised tokens, Σ w or sequences of the whole step

D is one all-reduce, known before the first backward. DeepSpeed averages gradients over the R data-parallel ranks, so
every rank hands `R / D · Σ_b Σ_t w_t · l_t` to backward, unscaled by the accumulation: the average is then the gradient
of the loss above, whatever the number of ranks and of micro-batches, which may differ from step to step.

Ranks that share a sequence (`sequence_parallel.py`) hold parts of the same micro-batch: its positions and weights are
worked out for the whole rows and then cut, and r runs over all ranks as before.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import deepspeed
import torch
from torch import Tensor

from seqaware.compat.module_trace import ModuleTrace
from seqaware.compat.muon import clip_before_muon, import_muon, marking, orthogonalize_for
from seqaware.data.collate import Batch
from seqaware.distributed.process_group import Ranks
from seqaware.engine.optimizer import build_optimizer, mark_for_muon, parameter_groups
from seqaware.estimate.layout import ZeroSettings
from seqaware.models.attention import Documents
from seqaware.models.model import DTYPES, LossTargets, ModelInput, WeightedCausalLM
from seqaware.objective.sums import StepSums
from seqaware.objective.weighting import Weighting
from seqaware.plan.plan import Plan

_LOSS_SCALES = 40  # from 2^16 down to 2^-24, far below anything that is still of use


@dataclass(frozen=True)
class StepResult:
    """What a step leaves, still on the device: the global sums, the gradient's norm before clipping, and D.

    Attributes:
        applied: the weights were updated; False, on all ranks alike, where the loss or the gradient is not finite.
        losses: this rank's Σ w·l of each micro-batch, float32 0-d.
    """

    sums: StepSums
    grad_norm: Tensor | float
    denominator: Tensor
    applied: bool
    losses: tuple[Tensor, ...]


Phase = Callable[[str], None]
"""Hears what the engine turns to: `forward`, `backward`, `optimizer step`."""


def _unheard(name: str) -> None:
    del name


class Engine:
    """A DeepSpeed engine around a `WeightedCausalLM`, stepping over micro-batches of the Plan.

    Args:
        model: the wrapped model; its parameters may already be sharded by ZeRO-3.
        attention_backend: what `Documents` tells the attention to use.
    """

    phase: Phase = staticmethod(_unheard)

    def __init__(
        self, plan: Plan, *, ranks: Ranks, model: WeightedCausalLM, weighting: Weighting, attention_backend: str
    ) -> None:
        self.ranks = ranks
        self.weighting = weighting
        self.normalize_by = plan.config.training.sft.normalize_by
        self.max_grad_norm = plan.config.training.optimizer.max_grad_norm
        self.attention_backend = attention_backend
        self.sequence = ranks.sequence_group(plan.world.sequence)
        self.wrapped = model
        self.zero_stage = plan.zero_stage
        self._loss_scaled = plan.dtype == "float16"
        self.deepspeed = _initialize(plan, model)
        self._trace = ModuleTrace(self.deepspeed) if plan.zero_stage == 3 else None
        if self.zero_stage == 0:
            # Stage 0 has no optimizer wrapper: we reduce, measure and clip the gradient before its step.
            self.deepspeed.enable_backward_allreduce = False

    def train_step(self, batches: Sequence[Batch], *, learning_rate: float) -> StepResult:
        """Forward and backward over this rank's micro-batches, then one optimizer step.

        Every rank must bring the same number of micro-batches: ZeRO-3 communicates in every forward.

        Args:
            batches: this rank's micro-batches, on the host or the device.
            learning_rate: for this step, in every parameter group.

        Returns:
            the step's sums over all ranks. Where the loss or the gradient is not finite, the weights and the optimizer
            stay as they were; in float16 only if that is so at every loss scale.
        """
        self.deepspeed.train()
        placed, weights = self._placed(batches)
        denominator = self.denominator(placed, weights)
        scale = (self.ranks.size / denominator).to(torch.float32)
        for group in self.deepspeed.optimizer.param_groups:
            group["lr"] = learning_rate
        # In float16 DeepSpeed passes over a step that overflows and halves its loss scale: we do the step again.
        for _ in range(_LOSS_SCALES if self._loss_scaled else 1):
            sums, losses = self._accumulate(placed, weights, scale)
            self.phase("optimizer step")
            grad_norm, applied = self._step()
            self.ranks.sum(sums.vector)
            if applied or not torch.isfinite(sums["weighted_loss"]):
                break
        return StepResult(sums, grad_norm, denominator, applied, losses)

    def _accumulate(
        self, batches: Sequence[Batch], weights: Sequence[Tensor], scale: Tensor
    ) -> tuple[StepSums, tuple[Tensor, ...]]:
        """Gradients of all micro-batches; returns this rank's sums, and the loss of each micro-batch."""
        sums = StepSums.zeros(self.ranks.device)
        losses = []
        for batch, weights_RT in zip(batches, weights, strict=True):
            self.phase("forward")
            loss, stats = self._forward(batch, weights_RT)
            self.phase("backward")
            losses.append(loss.detach())
            # Plus zero; but a loss that is not finite makes the gradient so too, and with it the norm on every rank:
            # no update follows, and the host need not look at the loss to know.
            self.deepspeed.backward(loss * (scale + losses[-1] * 0.0), scale_wrt_gas=False)
            sums = sums + StepSums.of(stats, sequences=batch.sequences, tokens=batch.tokens)
        return sums, tuple(losses)

    @torch.no_grad()
    def evaluate_step(self, batches: Sequence[Batch]) -> StepSums:
        """This rank's sums over held-out micro-batches, by position too: not yet added over the ranks."""
        self.deepspeed.eval()
        sums = StepSums.zeros(self.ranks.device, positions=True)
        for batch in batches:
            (placed,), (weights_RT,) = self._placed([batch])
            with self.forward_only():
                _, stats = self._forward(placed, weights_RT, by_position=True)
            sums = sums + StepSums.of(stats, sequences=placed.sequences, tokens=placed.tokens)
        return sums

    def forward_only(self) -> AbstractContextManager[None]:
        """A context for forwards without a backward, which ZeRO-3 must not take for those of training."""
        return nullcontext() if self._trace is None else self._trace.forward_only()

    def _placed(self, batches: Sequence[Batch]) -> tuple[list[Batch], list[Tensor]]:
        """The micro-batches on the device, with their weights; of rows that ranks share, this rank's columns."""
        device, group = self.ranks.device, self.sequence
        whole = [batch.to(device, non_blocking=True) for batch in batches]
        weights = [self.weights(batch) for batch in whole]
        if group is None:
            return whole, weights
        # Cut on the host, where the places that carry loss are found without waiting for the device.
        parts = [batch.shard(group.index, group.size).to(device, non_blocking=True) for batch in batches]
        return parts, [group.columns(weights_RT) for weights_RT in weights]

    def weights(self, batch: Batch) -> Tensor:
        """Float32 weights [R, T] from the batch's integer positions, on its device; 0 where there is no loss."""
        return self.weighting.weights(batch.k, batch.length, batch.sequence_offsets, token_weight=batch.token_weight)

    def denominator(self, batches: Sequence[Batch], weights: Sequence[Tensor]) -> Tensor:
        """The step's denominator over all ranks: float64, 0-d, on the device."""
        match self.normalize_by:
            case "tokens":
                local = self._counted(sum(b.supervised_tokens for b in batches))
            case "sequences":
                local = self._counted(sum(b.sequences for b in batches))
            case _:
                local = torch.stack([w.sum(dtype=torch.float64) for w in weights]).sum()
        return self.ranks.sum(local)

    def _counted(self, count: int) -> Tensor:
        # Filled on the device: a copy from the host's ordinary memory would wait for the device.
        return torch.full((), float(count), dtype=torch.float64, device=self.ranks.device)

    def _forward(self, batch: Batch, weights_RT: Tensor, *, by_position: bool = False) -> tuple[Tensor, Tensor]:
        # The batch leaves out what the data weighs with 0. Where no scheme gives a token 0 either, the device need not
        # be asked.
        positive = self.weighting.is_positive
        k = batch.k if by_position else None
        targets = LossTargets(batch.labels, weights_RT, batch.loss_rows, weights_are_positive=positive, k=k)
        with nullcontext() if self._trace is None else self._trace.any_forward():
            loss: tuple[Tensor, Tensor] = self.deepspeed(self._model_input(batch), targets)
        return loss

    def _model_input(self, batch: Batch) -> ModelInput:
        documents = Documents(batch.cu_seqlens, batch.lengths, self.attention_backend, self.sequence)
        return ModelInput(batch.input_ids, batch.position_ids, documents)

    def _step(self) -> tuple[Tensor | float, bool]:
        """The gradient's norm, and whether the weights were updated: not where that norm is not finite."""
        if self.zero_stage > 0:
            self.deepspeed.step()
            norm: float = self.deepspeed.get_global_grad_norm()
            return norm, not self.deepspeed.optimizer.overflow
        self._reduce_gradients()
        limit = self.max_grad_norm or float("inf")
        total = torch.nn.utils.clip_grad_norm_(self.wrapped.parameters(), limit)
        if not torch.isfinite(total):
            self.deepspeed.optimizer.zero_grad(set_to_none=True)
            return total, False
        self.deepspeed.step()
        return total, True

    def _reduce_gradients(self) -> None:
        """Average the gradients over the ranks; a parameter that no token reached still takes part."""
        for parameter in self.wrapped.parameters():
            if parameter.requires_grad and parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        self.deepspeed.buffered_allreduce_fallback()


def _with_bucket_no_larger(plan: Plan, model: WeightedCausalLM) -> dict[str, Any]:
    """Return ZeRO's settings with a gradient bucket that is no larger than all trained weights.

    DeepSpeed 0.19 allocates `reduce_bucket_size` elements at ZeRO 1 to 3, twice as many with `overlap_comm`, even for a
    small model. A bucket with room for all gradients is reduced in the same way, however much of it stays empty.
    """
    zero = dict(plan.deepspeed["zero_optimization"])
    trained = sum(getattr(each, "ds_numel", each.numel()) for each in model.parameters() if each.requires_grad)
    return zero | {"reduce_bucket_size": min(ZeroSettings.of(zero).reduce_bucket, trained)}


def _initialize(plan: Plan, model: WeightedCausalLM) -> Any:
    import_muon()
    settings = {**plan.deepspeed, "zero_optimization": _with_bucket_no_larger(plan, model)}
    optimizer_config = plan.config.training.optimizer
    if "optimizer" in settings:
        groups = parameter_groups(model, optimizer_config.weight_decay)
        orthogonalize_for(DTYPES[plan.dtype])
        with marking(lambda: mark_for_muon(model.model)):
            engine, *_ = deepspeed.initialize(model=model, model_parameters=groups, config=settings)
        if plan.zero_stage:
            clip_before_muon(engine.optimizer, stage=plan.zero_stage)
    else:
        offloaded = "offload_optimizer" in settings["zero_optimization"]
        optimizer = build_optimizer(optimizer_config, model, on_cpu=offloaded or plan.world.device == "cpu")
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)
    return engine
