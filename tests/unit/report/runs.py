"""Run folders as a run leaves them, made by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from seqaware import __version__

TOTAL = 60
_SPEED = {"mfu": None, "wait_share": 0.01, "padding_share": 0.02, "peak_memory_gb": 1.5}


def step_line(step: int, *, loss: float, **changes: Any) -> dict[str, Any]:
    line = {"kind": "step", "step": step, "epoch": step / 100, "loss": 2 * loss, "unweighted_loss": loss}
    figures = {"grad_norm": 0.5, "lr": 1e-3, "tokens": 100, "supervised_tokens": 80, "sequences": 4, "accuracy": 0.5}
    return {**line, **figures, "step_seconds": 0.1, "tokens_per_second": 1000.0, **_SPEED, **changes}


def evaluation_line(step: int, *, loss: float) -> dict[str, Any]:
    buckets = [
        {"from": 1, "to": 1, "tokens": 4, "loss": loss, "accuracy": 0.25, "weight": 1.0, "weighted_loss": loss},
        {"from": 2, "to": 3, "tokens": 8, "loss": loss / 2, "accuracy": 0.5, "weight": 1.5, "weighted_loss": loss},
    ]
    figures = {"loss": 2 * loss, "unweighted_loss": loss, "accuracy": 0.4, "exact_match": 0.5, "questions": 40}
    return {"kind": "evaluation", "step": step, **figures, "by_position": buckets}


def write_run(
    folder: Path,
    *,
    gamma: float = 0.98,
    seed: int = 1,
    loss: float = 1.0,
    done: int = TOTAL,
    version: str = __version__,
) -> Path:
    """A run that came so far; its last held-out loss is `loss`."""
    folder.mkdir(parents=True)
    objective = {"gamma": gamma, "weighting": "log_suffix", "scale": "raw", "positions": "supervised"}
    mathematics = {"objective": objective, "seed": seed, "data": {"fingerprint": "f"}}
    config = {
        "training": {
            "sft": {"gamma": gamma},
            "control": {"seed": seed},
            "optimizer": {"lr": 1e-3, "max_grad_norm": 1.0},
        },
        "evaluation": {"dataset": {"name": "held.jsonl"}},
        "output": {"dir": str(folder)},
    }
    plan = {
        "config": config,
        "world": {"size": 1},
        "batches": {"total_steps": TOTAL, "global_batch_size": 4},
        "data": {"documents": 400, "tokens": 10_000, "supervised_tokens": 8_000, "longest": 64},
        "mathematics": mathematics,
        "mathematics_hash": "h",
    }
    manifest = {"seqaware": version, "mathematics": mathematics, "attempts": [{"topology": {"ranks": 1}}]}
    if done == TOTAL:
        manifest["finished_steps"] = TOTAL
    lines = [evaluation_line(0, loss=6.0)]
    lines += [step_line(step, loss=loss * (1 + 5 / step)) for step in range(1, done + 1)]
    lines.append(evaluation_line(done, loss=loss))
    (folder / "plan.json").write_text(json.dumps(plan))
    (folder / "manifest.json").write_text(json.dumps(manifest))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder
