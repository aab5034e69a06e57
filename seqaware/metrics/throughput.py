"""How well a step used its time, its places and its device.

    mfu            arithmetic that the model needs for the step / (seconds · ranks · peak)
    wait_share     seconds in which the step waited for its micro-batches / seconds
    padding_share  places computed that hold no token of a document / places computed

Work is counted over all ranks, on the host, from the layout that every rank makes of the whole step: nothing is sent
and no device is waited for. Waiting and memory are this rank's own.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from seqaware.data.packing import StepWork
from seqaware.engine.device_metrics import peak_memory, peak_rate
from seqaware.estimate.layout import layout_of
from seqaware.estimate.step_time import useful_flops
from seqaware.plan.plan import Plan


class Speedometer:
    """Turns work and seconds into figures.

    Args:
        device: this rank's; its peak is looked up, or measured.
    """

    def __init__(self, plan: Plan, device: torch.device) -> None:
        layout = layout_of(plan)
        # A guess at a model's arithmetic is no figure.
        self._layout = layout if layout is not None and layout.decoder.exact else None
        self._device = device
        self._peak = plan.world.size * peak_rate(device, getattr(torch, plan.dtype))

    def figures(self, works: Sequence[StepWork], *, seconds: float) -> dict[str, float]:
        """Of the steps that took so long together; without mfu where the model's sizes are not known."""
        mfu = {}
        if self._layout is not None:
            tokens, squares = sum(work.tokens for work in works), sum(work.squares for work in works)
            needed = useful_flops(self._layout, tokens=tokens, squares=squares)
            mfu["mfu"] = round(needed / (seconds * self._peak), 5)
        return {**mfu, "peak_memory_gb": round(peak_memory(self._device) / 1e9, 3)}
