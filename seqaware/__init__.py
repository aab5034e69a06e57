"""seqaware: distributed training of causal language models with discounted log-suffix weighting.

`from seqaware import …` is for those with a training loop of their own; see docs/library.md. What is imported is
loaded when it is asked for: `import seqaware` alone brings no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from seqaware.data.packing import MicroBatch, StepLayout, layout_step, pack
    from seqaware.errors import CheckpointError, ConfigError, DataError, SeqawareError
    from seqaware.library.targets import Targets, targets_of
    from seqaware.library.trainer_loss import TrainerLoss
    from seqaware.models.model import output_head
    from seqaware.objective.cross_entropy import Head, cross_entropy_from_logits, plain_cross_entropy
    from seqaware.objective.fused import fused_cross_entropy
    from seqaware.objective.sums import StepSums
    from seqaware.objective.weighting import Weighting, log_suffix_weight

__version__ = "0.1.0"

_HOME = {
    "CheckpointError": "seqaware.errors",
    "ConfigError": "seqaware.errors",
    "DataError": "seqaware.errors",
    "Head": "seqaware.objective.cross_entropy",
    "MicroBatch": "seqaware.data.packing",
    "SeqawareError": "seqaware.errors",
    "StepLayout": "seqaware.data.packing",
    "StepSums": "seqaware.objective.sums",
    "Targets": "seqaware.library.targets",
    "TrainerLoss": "seqaware.library.trainer_loss",
    "Weighting": "seqaware.objective.weighting",
    "cross_entropy_from_logits": "seqaware.objective.cross_entropy",
    "fused_cross_entropy": "seqaware.objective.fused",
    "layout_step": "seqaware.data.packing",
    "log_suffix_weight": "seqaware.objective.weighting",
    "output_head": "seqaware.models.model",
    "pack": "seqaware.data.packing",
    "plain_cross_entropy": "seqaware.objective.cross_entropy",
    "targets_of": "seqaware.library.targets",
}

__all__ = [
    "CheckpointError",
    "ConfigError",
    "DataError",
    "Head",
    "MicroBatch",
    "SeqawareError",
    "StepLayout",
    "StepSums",
    "Targets",
    "TrainerLoss",
    "Weighting",
    "cross_entropy_from_logits",
    "fused_cross_entropy",
    "layout_step",
    "log_suffix_weight",
    "output_head",
    "pack",
    "plain_cross_entropy",
    "targets_of",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value  # the next time without this function
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
