"""Verify a config on these ranks: the run's own engine against an oracle of one process, for a handful of steps.

The engine is built as a run builds it and takes the run's first steps. Rank 0 computes the same steps with a second
copy of the model: one document at a time, without packing, sharding, cache or fused kernels, in float64. Losses, counts
and every parameter's gradient must agree to the rounding of the run's dtype; the weights, moments and learning rates
after a step to what clipping, schedule and optimizer are by definition; and every rank must hold the same weights.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor

from seqaware.compat.operators import remove_swap_files
from seqaware.config.schema import Config, SftConfig
from seqaware.data.batch_loader import StepBatches
from seqaware.distributed.launch_environment import LaunchEnvironment
from seqaware.distributed.process_group import connect
from seqaware.engine.engine import Engine
from seqaware.engine.gradients import digest_of_replicas, digest_of_weights, full_moments
from seqaware.engine.loss_check import compare_losses
from seqaware.errors import ConfigError
from seqaware.estimate.render_plan import render_plan
from seqaware.evaluation.evaluator import Evaluator
from seqaware.metrics.progress import RowCounter
from seqaware.models.isolation_check import measure_head, measure_isolation
from seqaware.objective.weighting import Weighting
from seqaware.plan.plan import Plan
from seqaware.training import loop
from seqaware.training.assembly import build_engine, model_source, probe_of, row_format, world_of
from seqaware.training.prepare import Prepared, prepare
from seqaware.training.process import Say
from seqaware.training.run_directory import RunDirectory, check_claim
from seqaware.verify.certificate import Certificate, table
from seqaware.verify.engine_step import Measured, measure_step, measure_weights
from seqaware.verify.items import (
    Item,
    count_item,
    epsilon,
    evaluation_items,
    gradient_item,
    loss_item,
    moments_item,
    norm_item,
    rate_item,
    weight_item,
    weights_item,
)
from seqaware.verify.optimizer_oracle import Update, reference_rate
from seqaware.verify.oracle import log_softmax_losses, plain_cross_entropy_losses
from seqaware.verify.oracle_step import OracleDType, Reference, StepDocuments
from seqaware.verify.world_batches import world_items

# Ranks wait for rank 0's oracle, which takes its time.
_PATIENCE_MINUTES = 24 * 60.0
_NOTHING = 1e-30  # relative to this where a size is zero
_MOMENTS, _WEIGHTS = "moments of the optimizer", "weights after the step"
# A run's first rates may be so small that rounding to float32 hides the decay of a weight, η · λ of it.
_VISIBLE_RATE = 2.0**-7
# Held-out documents that are compared, and the parts in which the engine takes them.
_EVALUATED, _PARTS = 64, 4


@dataclass(frozen=True)
class VerifyRequest:
    """What the command line asks for. steps: optimizer steps to compare. dtype: of the oracle."""

    config: Config
    deepspeed_path: Path | None = None
    steps: int = 3
    dtype: OracleDType = "auto"


def verify(request: VerifyRequest, *, address: LaunchEnvironment, say: Say) -> Certificate:
    """Compare, show the table and write certificate.json. Every rank calls it, and gets the same certificate.

    Raises:
        ConfigError: the config cannot be verified, or the folder holds another run.
    """
    _check_config(request.config)
    prepared = prepare(
        request.config, world=world_of(address), deepspeed_path=request.deepspeed_path, progress=RowCounter(say)
    )
    plan = prepared.plan
    if plan.dtype == "float16":
        do = "verify with --set model.dtype=bfloat16 or float32"
        raise ConfigError("verify cannot read gradients in float16, which carry a loss scale that moves", do=do)
    folder = RunDirectory(Path(plan.config.output_dir))
    if address.rank == 0:
        check_claim(folder, plan, resume="auto")
    ranks = connect(address, timeout_minutes=_PATIENCE_MINUTES)
    say(render_plan(plan, settings=False))
    source = model_source(prepared, folder)
    engine = build_engine(prepared, source, ranks=ranks, say=say)
    reference = None
    if ranks.is_first:
        reference = Reference(prepared, source, dtype=request.dtype, device=ranks.device)
        say(f"oracle      {reference.told}; one document at a time, eager attention, plain loss")
    certificate: Certificate = ranks.agree(_Verification(prepared, engine, reference, say).certificate(request.steps))
    if ranks.is_first:
        path = certificate.write(folder, plan, address=address)
        for line in ["", *table(certificate.items), "", *_summary(certificate), f"certificate {path}"]:
            say(line)
    ranks.barrier()
    if address.local_rank == 0:
        remove_swap_files(plan)
    return certificate


def _check_config(config: Config) -> None:
    if config.model.dropout != 0 or (config.lora is not None and config.lora.dropout != 0):
        do = "verify with --set model.dropout=0 (and lora.dropout=0)"
        raise ConfigError("dropout draws its masks anew in every layout, so there is nothing to compare", do=do)
    if config.lora is not None and config.lora.quantize_base != "none":
        do = "verify with --set lora.quantize_base=none"
        raise ConfigError("verify has no oracle for lora.quantize_base, which rounds the model itself", do=do)


def _summary(certificate: Certificate) -> Iterator[str]:
    failed = [item for item in certificate.items if not item.holds]
    steps = f"steps 1 to {certificate.steps[-1]}"
    if not failed:
        yield f"verdict     holds: all {len(certificate.items)} comparisons over {steps}"
        return
    names = ", ".join(dict.fromkeys(item.name for item in failed))
    yield f"verdict     falls short in {len(failed)} of {len(certificate.items)} comparisons over {steps}: {names}"
    if certificate.first_parameter:
        yield f"differs     first in the gradient of {certificate.first_parameter}"


class _Verification:
    """The comparisons, in turn. Everything that runs on the engine is collective; the oracle is rank 0's.

    Args:
        reference: None on the other ranks.
    """

    def __init__(self, prepared: Prepared, engine: Engine, reference: Reference | None, say: Say) -> None:
        self._prepared = prepared
        self._plan: Plan = prepared.plan
        self._engine = engine
        self._reference = reference
        self._say = say
        self._rows = row_format(prepared.plan, prepared)
        self._peak = prepared.plan.config.training.optimizer.lr
        ranks = engine.ranks
        self._batches = StepBatches(prepared.store, prepared.order, rows=self._rows, rank=ranks.rank, size=ranks.size)
        self._items: list[Item] = []
        self._first_parameter: str | None = None
        self._weights: dict[str, Tensor] = {}

    def certificate(self, steps: int) -> Certificate:
        """Run all comparisons over the first `steps` optimizer steps. Whole on rank 0 alone."""
        assert self._plan.total_steps is not None, "prepared data gives the steps"
        numbers = tuple(range(1, min(steps, self._plan.total_steps) + 1))
        sft = self._plan.config.training.sft
        self._weights = measure_weights(self._engine)
        self._add(self._probes())
        self._add(self._losses())
        if self._reference is not None:
            self._add(world_items(self._prepared, self._rows, numbers))
            self._add([self._schedule()])
        for step in numbers:
            self._add(self._step(step, sft))
            self._say(f"compared    step {step} of {numbers[-1]}")
        self._add(self._gamma_zero(sft))
        self._say("compared    γ = 0 with F.cross_entropy")
        self._add(self._evaluation(sft))
        self._add(self._visible_step())
        digests = self._engine.ranks.gather(digest_of_replicas(self._engine))
        differing = sum(digest != digests[0] for digest in digests)
        note = f"{differing} of {len(digests)} ranks hold other weights or moments than rank 0"
        self._add([Item("replicas after the steps", 0.0, differing, note if differing else "alike on every rank")])
        oracle = "" if self._reference is None else self._reference.told
        return Certificate(tuple(self._items), self._first_parameter, numbers, oracle)

    def _add(self, items: list[Item]) -> None:
        self._items += items

    def _probes(self) -> list[Item]:
        """Documents of one row do not see each other; and our head is the model's."""
        model, probe = self._engine.wrapped, probe_of(self._engine, self._plan)
        # The same kernels over the same row: nothing but the disturbed document should move at all. That a packed
        # document is what it is alone is shown by loss and gradient, against an oracle that packs nothing.
        rounding = epsilon(next(model.parameters()).dtype)
        report = measure_isolation(model, probe)
        moved = f"others change by {report.response:.1e} or more, all that may not see them by {report.leak:.1e}"
        note = f"documents of up to {report.tokens} tokens whose last tokens are {moved}"
        items = [Item("isolation of documents", rounding, report.leak, note)]
        if model.loss_kernel == "fused":
            # Product, bias, scale and cap, each rounded once.
            difference, _ = measure_head(model, probe)
            items.append(Item("head of the fused loss", 4 * rounding, difference, "its logits and the model's own"))
        return items

    def _losses(self) -> list[Item]:
        """The fused loss and the plain one over a few tokens of the first micro-batch."""
        seen = compare_losses(self._engine, self._batches.of_step(1)[0])
        if seen is None:
            return []
        size, slope = max(abs(seen.plain), _NOTHING), max(seen.gradient_size, _NOTHING)
        note = f"{seen.tokens} tokens: Σ w·l {seen.fused:.8g}, plain {seen.plain:.8g}"
        about = "by the hidden states of the same tokens"
        return [
            Item("fused loss", seen.loss_explained / size, abs(seen.fused - seen.plain) / size, note),
            Item("fused loss, gradient", seen.gradient_explained / slope, seen.gradient_error / slope, about),
        ]

    def _schedule(self) -> Item:
        """The rate of every step of the run, as its loop computes it; of a long run the ends and a thousand between."""
        total = self._plan.total_steps
        assert total is not None
        ends = {*range(1, min(total, 1000) + 1), *range(max(1, total - 999), total + 1)}
        steps = sorted(ends | set(range(1, total + 1, max(1, total // 1000))))
        pairs = [(loop.scheduled_rate(self._plan, step), self._rate(step)) for step in steps]
        return rate_item("learning rates of the run", pairs, peak=self._peak, note=f"{len(steps)} steps of {total}")

    def _rate(self, step: int) -> float:
        total, warmup = self._plan.total_steps, self._plan.batches.warmup_steps
        assert total is not None and warmup is not None
        schedule = self._plan.config.training.schedule
        return reference_rate(step, schedule, peak=self._peak, total=total, warmup=warmup)

    def _step(self, step: int, sft: SftConfig) -> list[Item]:
        """A step as the run takes it: from its documents to the weights it leaves."""
        rate = loop.scheduled_rate(self._plan, step)
        measured, items = self._stepped(step, rate=rate, expected=self._rate(step))
        if self._reference is not None:
            documents = StepDocuments.of(self._prepared, step, sft)
            pair = self._reference.pair(documents, log_softmax_losses)
            gradients = gradient_item("gradient of every parameter", measured.gradients, pair)
            self._first_parameter = self._first_parameter or gradients.first
            items += [
                loss_item("loss", measured.metrics["loss"], pair, weighted=True),
                loss_item("unweighted loss", measured.metrics["unweighted_loss"], pair, weighted=False),
                *_counts(measured, documents, sft),
                norm_item("gradient norm", measured.gradient_norm, pair),
                gradients.item,
            ]
            self._reference.take_weights(self._weights)
        return [replace(item, step=step) for item in items]

    def _stepped(self, step: int, *, rate: float, expected: float) -> tuple[Measured, list[Item]]:
        """The engine's step over the documents of `step`, and what the optimizer made of the gradient it had.

        The reference starts every step from the weights that the run had, so an error shows in the step that makes it.
        """
        before = self._weights
        measured = measure_step(self._engine, self._batches.of_step(step), learning_rate=rate)
        rates = self._engine.ranks.gather(measured.rates)
        self._weights = measure_weights(self._engine)
        updates: dict[str, Update] = {}
        if self._reference is not None:
            norm = measured.gradient_norm
            updates = self._reference.optimizer.step(before, measured.gradients, norm=norm, rate=expected)
        names = [(key, moment) for key, update in updates.items() for moment in update.moments_off]
        moments = {
            name: value.float().cpu().clone()
            for name, value in full_moments(self._engine, self._engine.ranks.agree(names))
        }
        if self._reference is None:
            return measured, []
        pairs = [(seen, expected) for of_rank in rates for seen in of_rank]
        items = [
            rate_item(
                "learning rate of the step", pairs, peak=self._peak, note=f"{rate:.4g}, by formula {expected:.4g}"
            )
        ]
        if moments:
            items.append(moments_item(_MOMENTS, moments, updates))
        if not self._reference.optimizer.has_lost_moments:
            items.append(weights_item(_WEIGHTS, self._weights, updates, before=before))
        return measured, items

    def _gamma_zero(self, sft: SftConfig) -> list[Item]:
        """At γ = 0, divided by the tokens, the run's first step must be the mean cross-entropy of its tokens."""
        plain = {"gamma": 0.0, "half_life": None, "horizon": None, "weighting": "log_suffix", "scale": "raw"}
        without = sft.model_copy(update={**plain, "normalize_by": "tokens"})
        before = digest_of_weights(self._engine)
        with _objective(self._engine, without):
            measured, items = self._stepped(1, rate=0.0, expected=0.0)
        stayed = all(self._engine.ranks.gather(digest_of_weights(self._engine) == before))
        note = "a step at learning rate 0 left them as they were"
        items = [item for item in items if item.name == _MOMENTS]
        items.append(Item("weights at rate 0", 0.0, 0.0 if stayed else 1.0, note))
        if self._reference is None:
            return items
        pair = self._reference.pair(StepDocuments.of(self._prepared, 1, without), plain_cross_entropy_losses)
        gradients = gradient_item("γ = 0: gradients", measured.gradients, pair)
        self._first_parameter = self._first_parameter or gradients.first
        loss = loss_item("γ = 0: F.cross_entropy", measured.metrics["loss"], pair, weighted=True)
        return [loss, gradients.item, *items]

    def _visible_step(self) -> list[Item]:
        """A step at a rate at which the decay of a weight is far more than its rounding, which a run's may not be."""
        _, items = self._stepped(1, rate=_VISIBLE_RATE, expected=_VISIBLE_RATE)
        return [replace(item, name=f"{item.name}, rate {_VISIBLE_RATE:.2g}") for item in items if item.name == _WEIGHTS]

    def _evaluation(self, sft: SftConfig) -> list[Item]:
        """The loss over the first held-out documents, taken in parts as that over all of them is."""
        held_out = Evaluator.of(self._prepared, self._engine, rows=self._rows)
        if held_out is None:
            return []
        count = min(_EVALUATED, len(held_out.store))
        parts = replace(held_out, limit=count, at_once=max(1, count // _PARTS))
        seen = parts.loss(leaving=lambda: False)
        assert seen is not None, "nothing asks a verification to leave"
        documents = StepDocuments.scored_by([held_out.store.document(index) for index in range(count)], sft)
        if self._reference is None or not documents.weight_sum:
            return []
        exact, rounded = self._reference.evaluations(documents)
        k = [token.k for tokens in documents.scored for token in tokens]
        tokens = sum(len(document.tokens) for document in documents.documents)
        self._say(f"compared    the first {count} held-out documents")
        return [
            *evaluation_items(seen, exact, rounded, k=k),
            count_item("evaluation: supervised tokens", seen["supervised_tokens"], documents.tokens_with_loss),
            count_item("evaluation: tokens", seen["tokens"], tokens),
            count_item("evaluation: sequences", seen["sequences"], count),
            weight_item("evaluation: sum of the weights", seen["weight_sum"], documents.weight_sum),
        ]


@contextmanager
def _objective(engine: Engine, sft: SftConfig) -> Iterator[None]:
    """Inside, the engine trains another objective."""
    weighting, normalize_by = engine.weighting, engine.normalize_by
    engine.weighting, engine.normalize_by = Weighting(sft.discount, sft.weighting, sft.scale), sft.normalize_by
    try:
        yield
    finally:
        engine.weighting, engine.normalize_by = weighting, normalize_by


def _counts(measured: Measured, documents: StepDocuments, sft: SftConfig) -> list[Item]:
    compare = weight_item if sft.normalize_by == "weight" else count_item
    return [
        count_item("supervised tokens", measured.metrics["supervised_tokens"], documents.tokens_with_loss),
        count_item("sequences", measured.metrics["sequences"], len(documents.documents)),
        weight_item("sum of the weights", measured.metrics["weight_sum"], documents.weight_sum),
        compare("denominator", measured.denominator, documents.denominator),
    ]
