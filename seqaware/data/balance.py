"""Sharing work evenly: documents over bins, and a step's micro-batches over the ranks.

Every rank computes the same arrangement for itself, so all of it is integer arithmetic: no machine may round otherwise.

Letters: D documents, B bins or micro-batches, R ranks, M micro-batches of a rank.
"""

from __future__ import annotations

import heapq

import numpy as np
from numpy.typing import NDArray

from seqaware.data.jit import compiled


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
    held_R = np.zeros(ranks, dtype=np.int64)
    rank_of = np.empty(len(costs_B), dtype=np.int64)
    heap = [(np.int64(0), np.int64(rank)) for rank in range(ranks)]  # (work so far, rank): a heap from the start
    for b in by_cost_B:
        load, taker = heapq.heappop(heap)
        rank_of[b] = taker
        held_R[taker] += 1
        if held_R[taker] < rounds:
            heapq.heappush(heap, (load + costs_B[b], taker))
    return rank_of


@compiled
def halve_fullest(
    falling_D: NDArray[np.int64], bin_of: NDArray[np.int32], bins: int, wanted: int, packed: bool
) -> None:
    """Split the fullest bin that holds several documents, in place, until there are `wanted` bins. O(D log D).

    Args:
        falling_D: the documents' tokens, the longest first. bin_of: int32 [D], in 0 … bins - 1, each bin in use.
        packed: every second document of a bin moves; else the shorter half, for a block of rows of like length.
    """
    count_B = np.zeros(wanted, dtype=np.int64)
    tokens_B = np.zeros(wanted, dtype=np.int64)
    for i in range(len(bin_of)):
        count_B[bin_of[i]] += 1
        tokens_B[bin_of[i]] += falling_D[i]
    # A bin's documents, the longest first, are members[first_B[b] : first_B[b] + count_B[b]].
    first_B = np.cumsum(count_B) - count_B
    members = np.empty(len(bin_of), dtype=np.int64)
    placed_B = first_B.copy()
    for i in range(len(bin_of)):
        members[placed_B[bin_of[i]]] = i
        placed_B[bin_of[i]] += 1
    heap = [(-tokens_B[b], np.int64(b)) for b in range(bins) if count_B[b] > 1]
    heapq.heapify(heap)
    for new in range(bins, wanted):
        _, fullest = heapq.heappop(heap)
        own = members[first_B[fullest] : first_B[fullest] + count_B[fullest]]
        kept = (len(own) + 1) // 2
        if packed:
            moved = own[1::2].copy()
            own[:kept] = own[::2].copy()
            own[kept:] = moved
        first_B[new] = first_B[fullest] + kept
        count_B[new] = len(own) - kept
        count_B[fullest] = kept
        for i in own[kept:]:
            bin_of[i] = new
            tokens_B[new] += falling_D[i]
        tokens_B[fullest] -= tokens_B[new]
        for b in (fullest, np.int64(new)):
            if count_B[b] > 1:
                heapq.heappush(heap, (-tokens_B[b], b))


def deal(rank_of: NDArray[np.int64], by_cost_B: NDArray[np.int64], ranks: int) -> NDArray[np.int64]:
    """Line up the micro-batches of each rank, the costliest first: int64 [M, R], -1 at the end of a shorter list.

    So the m-th micro-batches of the ranks are alike: under ZeRO-3 they wait for each other in every forward.
    """
    by_rank = by_cost_B[np.argsort(rank_of[by_cost_B], kind="stable")]
    count_R = np.bincount(rank_of, minlength=ranks)
    dealt_MR = np.full((int(count_R.max()), ranks), -1, dtype=np.int64)
    first_R = np.cumsum(count_R) - count_R
    place_B = np.arange(len(by_rank)) - np.repeat(first_R, count_R)
    dealt_MR[place_B, rank_of[by_rank]] = by_rank
    return dealt_MR


def imbalance(values_B: NDArray[np.int64], dealt_MR: NDArray[np.int64]) -> float:
    """The rank with the most of a quantity over the mean of the ranks: 1 is perfect."""
    totals: list[int] = np.where(dealt_MR >= 0, values_B[dealt_MR], 0).sum(axis=0).tolist()
    return max(totals) * len(totals) / sum(totals)
