"""What a run tells at its end, on the screen and in the model card."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from seqaware.config.schema import LoraConfig
from seqaware.metrics.metrics_file import read_metrics, shown_shares
from seqaware.metrics.progress import duration
from seqaware.plan.plan import Plan
from seqaware.training.run_directory import RunDirectory


def summary_lines(plan: Plan, folder: RunDirectory, *, seconds: float) -> list[str]:
    """Four lines, from what the run's metrics say: what was learnt, on what, and where it lies."""
    lines = list(read_metrics(folder.metrics))
    evaluations = [line for line in lines if line["kind"] == "evaluation"]
    steps = [line for line in lines if line["kind"] == "step"]
    saved = str(folder.model) if plan.config.output.save_model else "not saved (output.save_model: false)"
    answers = f"; every answer: {folder.answers}" if folder.answers.exists() else ""
    return [
        f"learnt      {_learnt(evaluations) if evaluations else _last_loss(steps)}",
        f"trained     {_trained(plan)} in {duration(seconds)}",
        f"model       {saved}",
        f"metrics     {folder.metrics}{answers}",
    ]


def _learnt(evaluations: Sequence[Mapping[str, Any]]) -> str:
    first, last = evaluations[0], evaluations[-1]
    losses = " → ".join(f"{each.get('unweighted_loss', math.nan):.4f}" for each in (first, last))
    text = f"held-out unweighted loss {losses}"
    told = [f"{title} {share} ({low} to {high})" for title, share, low, high in shown_shares(last)]
    return f"{', '.join(told)} of {last.get('questions', '?')} held-out rows; {text}" if told else text


def _last_loss(steps: Sequence[Mapping[str, Any]]) -> str:
    if not steps:  # it began at its end: with another run's last checkpoint, or without the metrics of its attempts
        return "its metrics tell of no step; no held-out rows to judge by"
    step = steps[-1]
    losses = f"loss {step['loss']:.4f}, unweighted {step['unweighted_loss']:.4f}"
    return f"last step: {losses}; no held-out rows to judge by"


def _trained(plan: Plan) -> str:
    sft = plan.config.training.sft
    assert plan.data is not None
    ranks = f"{plan.world.size} rank{'s' if plan.world.size > 1 else ''}, ZeRO-{plan.zero_stage}"
    objective = f"{sft.weighting} weights with γ = {sft.discount:g}"
    return f"{plan.total_steps} steps on {plan.data.documents:,} documents, {objective}, {ranks}"


def _what_is_trained(lora: LoraConfig | None) -> str:
    if lora is None:
        return "all weights"
    layers = lora.target_modules if isinstance(lora.target_modules, str) else ", ".join(lora.target_modules)
    kind = ("DoRA" if lora.dora else "LoRA") + (", rank-stabilised" if lora.rslora else "")
    text = f"{kind} adapters of rank {lora.rank}, alpha {lora.alpha:g}, on {layers}"
    if lora.modules_to_save:
        text += f"; {', '.join(lora.modules_to_save)} whole"
    if lora.quantize_base != "none":
        text += f"; over a base in {lora.quantize_base}"
    return text + ("; merged into the weights" if lora.export == "merged" else "; this folder holds the adapter alone")


def model_card(plan: Plan, lines: list[str]) -> str:
    """A README.md for the model's folder: objective, data, outcome."""
    config = plan.config
    sft = config.training.sft
    origin = config.model.base_name or f"a {config.model.from_scratch['model_type']} from scratch"  # type: ignore[index]
    data = config.dataset.name or ", ".join(part.name for part in config.dataset.mixture or [])
    outcome = "\n".join(f"    {line}" for line in lines)
    alone = config.lora is not None and config.lora.export == "adapter"
    library = f"peft\nbase_model: {config.model.base_name}" if alone and config.model.base_name else "transformers"
    return f"""---
library_name: {library}
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
| trained | {_what_is_trained(config.lora)} |

{outcome}

`manifest.json`, `config.yaml` and `plan.json` beside this folder tell everything else about the run.
"""
