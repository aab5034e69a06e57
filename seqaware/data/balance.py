"""Sharing a step's micro-batches over the ranks, so that all finish at the same time.

Letters: B micro-batches, R ranks, M micro-batches of a rank.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def costs(tokens_B: NDArray[np.int64], squares_B: NDArray[np.int64]) -> NDArray[np.float64]:
    """What each micro-batch costs, as a share of the step: float64 [B].

    The matrix products cost in proportion to the tokens, attention in proportion to Σ length². Which of the two weighs
    more depends on the model; each is taken as a share of its own total, so that both get balanced.
    """
    return tokens_B / tokens_B.sum() + squares_B / squares_B.sum()


def share(costs_B: NDArray[np.float64], ranks: int) -> NDArray[np.int64]:
    """Give every rank ⌈B / R⌉ micro-batches of like total cost.

    Micro-batches are taken in groups of R, from the costliest down; in a group the costliest goes to the rank with the
    least work so far (longest processing time first with equal counts). So the totals are balanced, and the m-th
    micro-batches of all ranks are alike too, which is what matters under ZeRO-3: every forward is collective.

    Returns:
        int64 [M, R]: which micro-batch is the m-th of a rank; -1, only in the last row, for one that goes without.
    """
    rounds = -(-len(costs_B) // ranks)
    dealt_MR = np.full((rounds, ranks), -1, dtype=np.int64)
    by_cost = np.argsort(-costs_B, kind="stable")
    load_R = np.zeros(ranks)
    for m in range(rounds):
        group = by_cost[m * ranks : (m + 1) * ranks]
        takers = np.argsort(load_R, kind="stable")[: len(group)]
        dealt_MR[m, takers] = group
        load_R[takers] += costs_B[group]
    return dealt_MR


def rank_totals(values_B: NDArray[np.int64], dealt_MR: NDArray[np.int64]) -> NDArray[np.int64]:
    """The sum of a quantity of the micro-batches over those of each rank: int64 [R]."""
    totals: NDArray[np.int64] = np.where(dealt_MR >= 0, values_B[dealt_MR], 0).sum(axis=0)
    return totals
