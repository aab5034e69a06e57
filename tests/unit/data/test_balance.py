from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from seqaware.data.balance import costs, deal, halve_fullest, imbalance, share, spread

# The first call of a compiled function compiles it: no deadline.
unhurried = settings(deadline=None)


def shared(costs_B: list[int], ranks: int) -> np.ndarray:
    values = np.array(costs_B)
    by_cost = np.argsort(-values, kind="stable")
    return deal(share(values, by_cost, ranks), by_cost, ranks)


@unhurried
@given(st.lists(st.integers(1, 1000), min_size=1, max_size=60), st.integers(1, 9))
def test_every_micro_batch_is_dealt_once_costliest_first_and_no_rank_gets_more_than_its_count(costs_B, ranks):
    dealt = shared(costs_B, ranks)
    assert dealt.shape == (-(-len(costs_B) // ranks), ranks)
    assert sorted(dealt[dealt >= 0].tolist()) == list(range(len(costs_B)))
    for rank in range(ranks):
        own = [costs_B[number] if number >= 0 else 0 for number in dealt[:, rank]]
        assert own == sorted(own, reverse=True)


def test_the_count_limits_what_the_cheapest_rank_gets():
    # Without the limit the second rank would get the three ones; with it each rank has two.
    assert shared([9, 1, 1, 1], 2).tolist() == [[0, 1], [3, 2]]


def test_imbalance_is_the_most_over_the_mean():
    assert imbalance(np.array([3, 1, 2]), np.array([[0, 2], [1, -1]])) == pytest.approx(4 / 3)


def test_tokens_and_squares_weigh_the_same_over_a_step():
    tokens, squares = np.array([10, 30]), np.array([100, 500])
    assert costs(tokens, squares).tolist() == [10 * 15 + 100, 30 * 15 + 500]


def test_spread_goes_to_the_rank_with_the_least_work_that_has_room():
    lengths = np.array([5, 4, 3, 3, 1])
    # Two ranks with one bin of 8 each: 5 | 4, 4 + 3 is more than 5, so 5 + 3; then 7 is less than 8.
    assert spread(lengths, lengths, 2, 2, 8).tolist() == [0, 1, 1, 0, 1]
    # Four bins of two ranks: bin b belongs to rank b mod 2, and a rank fills its emptier bin.
    assert spread(lengths, lengths, 4, 2, 8).tolist() == [0, 1, 3, 2, 3]


def test_spread_gives_up_where_a_document_finds_no_room():
    lengths = np.array([5, 5, 5])
    assert len(spread(lengths, lengths, 2, 2, 8)) == 0


@unhurried
@given(st.lists(st.integers(1, 20), min_size=1, max_size=60), st.integers(1, 9))
def test_each_micro_batch_goes_to_the_rank_with_the_least_work_that_has_room(costs_B, ranks):
    loads, counts, expected = [0] * ranks, [0] * ranks, []
    for cost in costs_B:
        taker = min((r for r in range(ranks) if counts[r] < -(-len(costs_B) // ranks)), key=lambda r: (loads[r], r))
        loads[taker] += cost
        counts[taker] += 1
        expected.append(taker)
    assert share(np.array(costs_B), np.arange(len(costs_B)), ranks).tolist() == expected


@unhurried
@given(st.data(), st.lists(st.integers(1, 20), min_size=1, max_size=40), st.booleans())
def test_the_fullest_bin_of_several_documents_is_halved_first(data, lengths, packed):
    falling = sorted(lengths, reverse=True)
    bins = data.draw(st.integers(1, len(falling)))
    bin_of = data.draw(st.permutations([i % bins for i in range(len(falling))]))
    wanted = data.draw(st.integers(bins, len(falling)))
    members = [[i for i in range(len(falling)) if bin_of[i] == b] for b in range(bins)]
    while len(members) < wanted:
        several = [b for b in range(len(members)) if len(members[b]) > 1]
        fullest = max(several, key=lambda b: (sum(falling[i] for i in members[b]), -b))
        own = members[fullest]
        half = (len(own) + 1) // 2
        members[fullest], moved = (own[::2], own[1::2]) if packed else (own[:half], own[half:])
        members.append(moved)
    halved = np.array(bin_of, dtype=np.int32)
    halve_fullest(np.array(falling), halved, bins, wanted, packed)
    assert [np.flatnonzero(halved == b).tolist() for b in range(wanted)] == members
