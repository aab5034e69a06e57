"""What a run tells at its end, on the screen and in the model card."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from seqaware.plan.plan import Plan
from seqaware.report.progress import duration
from seqaware.training.folder import RunFolder


def summary_lines(
    plan: Plan,
    folder: RunFolder,
    *,
    before: Mapping[str, float] | None,
    after: Mapping[str, Any] | None,
    last: Mapping[str, Any] | None,
    seconds: float,
) -> list[str]:
    """Four lines: what was learnt, on what, and where it lies."""
    return [
        f"learnt      {_learnt(before, after, last)}",
        f"trained     {_trained(plan)} in {duration(seconds)}",
        f"model       {folder.model}"
        if plan.config.output.save_model
        else "model       not saved (output.save_model: false)",
        f"metrics     {folder.metrics}" + (f"; every answer: {folder.answers}" if _answered(after) else ""),
    ]


def _answered(after: Mapping[str, Any] | None) -> bool:
    return after is not None and "exact_match" in after


def _learnt(before: Mapping[str, float] | None, after: Mapping[str, Any] | None, last: Mapping[str, Any] | None) -> str:
    if after is None:
        if last is None:
            return "nothing: every step was already done"
        losses = f"loss {last['loss']:.4f}, unweighted {last['unweighted_loss']:.4f}"
        return f"last step: {losses}; no held-out rows to judge by"
    text = f"held-out unweighted loss {after['unweighted_loss']:.4f}"
    if before is not None:
        text = f"held-out unweighted loss {before['unweighted_loss']:.4f} → {after['unweighted_loss']:.4f}"
    if _answered(after):
        text = f"exact match {after['exact_match']:.1%} of {after['questions']} held-out rows; {text}"
    return text


def _trained(plan: Plan) -> str:
    sft = plan.config.training.sft
    assert plan.data is not None
    ranks = f"{plan.world.size} rank{'s' if plan.world.size > 1 else ''}, ZeRO-{plan.zero_stage}"
    objective = f"{sft.weighting} weights with γ = {sft.discount:g}"
    return f"{plan.total_steps} steps on {plan.data.documents:,} documents, {objective}, {ranks}"


def model_card(plan: Plan, lines: list[str]) -> str:
    """A README.md for the model's folder: objective, data, outcome."""
    config = plan.config
    sft = config.training.sft
    origin = config.model.base_name or f"a {config.model.from_scratch['model_type']} from scratch"  # type: ignore[index]
    data = config.dataset.name or ", ".join(part.name for part in config.dataset.mixture or [])
    outcome = "\n".join(f"    {line}" for line in lines)
    return f"""---
library_name: transformers
pipeline_tag: text-generation
tags: [seqaware]
---
# {config.model.output_name}

Trained from {origin} on {data} (split {config.dataset.split}) with discounted log-suffix weighting: the cross-entropy
of the k-th token is weighted by w_k = (1 − γ^k) / (1 − γ).

| | |
|---|---|
| γ | {sft.discount:g} |
| weighting, scale | {sft.weighting}, {sft.scale} |
| positions counted | {sft.positions} |
| normalised by | {sft.normalize_by} |
| precision | {plan.dtype} |

{outcome}

`manifest.json`, `config.yaml` and `plan.json` beside this folder tell everything else about the run.
"""
