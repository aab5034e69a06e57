"""Sharing work evenly: documents over bins, and a step's micro-batches over the ranks.

Every rank computes the same arrangement for itself, so all of it is integer arithmetic: no machine may round otherwise.

Letters: D documents, B bins or micro-batches, R ranks, M micro-batches of a rank.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from seqaware.data.compiled import compiled


def costs(tokens: NDArray[np.int64], squares: NDArray[np.int64]) -> NDArray[np.int64]:
    """What each document or micro-batch costs: tokens · Σ squares / Σ tokens + squares; int64 of the same length.

    The matrix products cost in proportion to the tokens, attention in proportion to Σ length². Which of the two weighs
    more depends on the model; here both have the same total over a step, so that both get balanced.
    """
    return tokens * max(1, int(squares.sum()) // int(tokens.sum())) + squares


@compiled
def spread(
    lengths_D: NDArray[np.int64], costs_D: NDArray[np.int64], bins: int, ranks: int, capacity: int
) -> NDArray[np.int32]:
    """Give each document, in turn, to the rank with the least work that has room, there to its cheapest bin.

    Bin b is rank b mod R's. O(D · B).

    Returns:
        bin_of int32 [D]; empty where a document found no room: bins so full cannot be balanced this way.
    """
    tokens_B = np.zeros(bins, dtype=np.int64)
    load_B = np.zeros(bins, dtype=np.int64)
    load_R = np.zeros(ranks, dtype=np.int64)
    bin_of = np.empty(len(lengths_D), dtype=np.int32)
    for i in range(len(lengths_D)):
        chosen = -1
        for b in range(bins):
            if tokens_B[b] + lengths_D[i] > capacity:
                continue
            ahead = load_R[b % ranks] - load_R[chosen % ranks]
            if chosen < 0 or ahead < 0 or (ahead == 0 and load_B[b] < load_B[chosen]):
                chosen = b
        if chosen < 0:
            return np.empty(0, dtype=np.int32)
        bin_of[i] = chosen
        tokens_B[chosen] += lengths_D[i]
        load_B[chosen] += costs_D[i]
        load_R[chosen % ranks] += costs_D[i]
    return bin_of


@compiled
def share(costs_B: NDArray[np.int64], by_cost_B: NDArray[np.int64], ranks: int) -> NDArray[np.int64]:
    """Give every rank at most ⌈B / R⌉ micro-batches, all ranks about the same cost: the rank of each, int64 [B].

    In this order (the costliest first), each to the rank with the least work so far that still has room: longest
    processing time first, with a limit on the count.
    """
    rounds = (len(costs_B) + ranks - 1) // ranks
    load_R = np.zeros(ranks, dtype=np.int64)
    held_R = np.zeros(ranks, dtype=np.int64)
    rank_of = np.empty(len(costs_B), dtype=np.int64)
    for b in by_cost_B:
        taker = -1
        for r in range(ranks):
            if held_R[r] < rounds and (taker < 0 or load_R[r] < load_R[taker]):
                taker = r
        rank_of[b] = taker
        held_R[taker] += 1
        load_R[taker] += costs_B[b]
    return rank_of


def deal(rank_of: NDArray[np.int64], by_cost_B: NDArray[np.int64], ranks: int) -> NDArray[np.int64]:
    """Line up the micro-batches of each rank, the costliest first: int64 [M, R], -1 at the end of a shorter list.

    So the m-th micro-batches of the ranks are alike: under ZeRO-3 they wait for each other in every forward.
    """
    lists = [by_cost_B[rank_of[by_cost_B] == rank] for rank in range(ranks)]
    dealt_MR = np.full((max(map(len, lists)), ranks), -1, dtype=np.int64)
    for rank, numbers in enumerate(lists):
        dealt_MR[: len(numbers), rank] = numbers
    return dealt_MR


def imbalance(values_B: NDArray[np.int64], dealt_MR: NDArray[np.int64]) -> float:
    """The rank with the most of a quantity over the mean of the ranks: 1 is perfect."""
    totals: list[int] = np.where(dealt_MR >= 0, values_B[dealt_MR], 0).sum(axis=0).tolist()
    return max(totals) * len(totals) / sum(totals)
