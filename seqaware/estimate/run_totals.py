"""What the whole run comes to: steps, tokens, hours, GPU-hours, and the disk that its checkpoints take."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from seqaware.estimate.disk import DiskUse
from seqaware.estimate.layout import Layout
from seqaware.estimate.step_time import StepTime
from seqaware.plan.batches import WHEN_TOKENISED
from seqaware.plan.plan import Plan

_GB = 1e9
_STEPS_TOLD = 1000  # of a run whose length is not known


@dataclass(frozen=True)
class Packing:
    """How full the micro-batches of the first steps are.

    Attributes:
        efficiency: tokens of documents / places of the micro-batches that hold any. balance: the costliest rank / the
            mean of the ranks. steps: how many were laid out.
    """

    efficiency: float
    balance: float
    steps: int


@dataclass(frozen=True)
class RunFigures:
    """plan: of the run. packing: None where the data is not tokenised."""

    plan: Plan
    packing: Packing | None

    def heading(self) -> Iterator[tuple[str, str]]:
        """(label, text) of steps, tokens and packing."""
        plan, data = self.plan, self.plan.data
        limit = plan.config.training.schedule.epoch_limit
        if data is None or plan.total_steps is None:
            length = f"{plan.total_steps:,} steps; " if limit is None else f"{limit:g} epoch(s); steps and "
            yield "run", f"{length}tokens: {WHEN_TOKENISED}"
            return
        about = "" if plan.batches.exact else "about "
        tokens = f", {data.tokens:,} tokens an epoch" if data.tokens else ""
        epochs = "epochs" if limit is None else f"{limit:g} epoch(s)"
        yield "run", f"{about}{plan.total_steps:,} steps, {epochs} of {data.documents:,} documents{tokens}"
        if self.packing is not None:
            packing, full = self.packing, plan.batches.micro_batch_tokens
            packed = "packed" if plan.config.packing.enabled else "one document a row"
            yield (
                "packing",
                f"{packed}: micro-batches of {full:,} tokens are {packing.efficiency:.1%} full, "
                f"the costliest rank does {packing.balance:.3f} × the mean (first {packing.steps} steps)",
            )

    def costs(self, layout: Layout, time: StepTime) -> Iterator[tuple[str, str]]:
        """(label, text) of the hours and the disk."""
        gpus, steps = self.plan.world.size, self.plan.total_steps
        seconds = time.seconds * (_STEPS_TOLD if steps is None else steps)
        hours = f"{seconds / 3600:,.1f} hours" if seconds >= 3600 else f"{seconds / 60:,.1f} minutes"
        of = f"{_STEPS_TOLD:,} steps: " if steps is None else ""
        yield "time", f"{of}{hours} = {gpus * seconds / 3600:,.1f} GPU-hours, without starting, evaluating and saving"
        disk = DiskUse.of(self.plan, parameters=layout.decoder.parameters, trained=layout.trained)
        models = f"the model {disk.model / _GB:,.0f} GB"
        if disk.initial:
            models += f", and the one from scratch {disk.initial / _GB:,.0f} GB"
        total = f"{disk.total() / _GB:,.0f} GB"
        yield "disk in all", f"{total}: at most {disk.checkpoints} checkpoint(s) at once, and {models}"
