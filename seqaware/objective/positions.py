"""Sums by position: what the tokens k = 1, 2–3, 4–7, 8–15, … of their sequences lose. The weighting moves exactly this.

A bucket holds the k with the same number of binary digits; the last one takes all that follow. Like every figure here
these are sums, which add over micro-batches and ranks, and ratios are taken once, at the end.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

BUCKETS = 24
POSITION_STATS = ("tokens", "loss", "weight", "weighted_loss", "correct")
POSITION_SIZE = BUCKETS * len(POSITION_STATS)

# Rows that are sorted into buckets at once: bounds the [BUCKETS, rows] table.
_ROWS_AT_ONCE = 16384


@torch.no_grad()
def sums_by_position(*, losses: Tensor, weights: Tensor, correct: Tensor, k: Tensor) -> Tensor:
    """Float64 [POSITION_SIZE], BUCKETS rows of POSITION_STATS; no host sync, and the same bits every time.

    Args:
        losses, weights, correct: [M], of the rows that the loss multiplied. k: integer [M], from 1; 0 adds nothing.
    """
    edges = 2 ** torch.arange(1, BUCKETS, device=k.device)
    counted = (k > 0) & (weights != 0)
    weights = torch.where(counted, weights, 0.0).double()
    losses = torch.where(counted, losses, 0.0).double()
    columns_M5 = torch.stack((counted.double(), losses, weights, losses * weights, (correct & counted).double()), -1)
    numbers = torch.arange(BUCKETS, device=k.device).unsqueeze(1)
    total = columns_M5.new_zeros(BUCKETS, len(POSITION_STATS))
    # A product with a table of zeros and ones: on a GPU an index_add adds in the order in which threads arrive.
    for start in range(0, len(k), _ROWS_AT_ONCE):
        rows = slice(start, start + _ROWS_AT_ONCE)
        bucket = torch.bucketize(k[rows].contiguous(), edges, right=True)
        # Through `where`, not a product: a loss that is not finite must stay in its own bucket.
        table = torch.where((bucket == numbers).unsqueeze(-1), columns_M5[rows], 0.0)
        total += table.sum(1)
    return total.flatten()


def by_position(sums: list[float]) -> list[dict[str, Any]]:
    """The buckets that hold tokens, as they are reported.

    Args:
        sums: POSITION_SIZE numbers, over all micro-batches and ranks.

    Returns:
        for each, from (the first k), to (the last; None: without end), tokens, loss (nats a token, unweighted),
        accuracy, and weight and weighted_loss (w and w·l, means over the tokens).
    """
    width = len(POSITION_STATS)
    found = []
    for bucket in range(BUCKETS):
        tokens, loss, weight, weighted, correct = sums[bucket * width : (bucket + 1) * width]
        if tokens:
            found.append(
                {
                    "from": 2**bucket,
                    "to": 2 ** (bucket + 1) - 1 if bucket + 1 < BUCKETS else None,
                    "tokens": int(tokens),
                    "loss": loss / tokens,
                    "accuracy": correct / tokens,
                    "weight": weight / tokens,
                    "weighted_loss": weighted / tokens,
                }
            )
    return found
