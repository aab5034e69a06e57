from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from seqaware.data.packing import StepLayout, layout_step, pack
from seqaware.errors import ConfigError

# The first call of a compiled function compiles it: no deadline.
unhurried = settings(deadline=None)


@st.composite
def packings(draw):
    capacity = draw(st.one_of(st.integers(1, 200), st.sampled_from([63, 64, 65, 4095, 4096, 4097, 9000, 300_000])))
    longest = draw(st.sampled_from([capacity, max(1, capacity // 2), max(1, capacity // 7)]))
    return draw(st.lists(st.integers(1, longest), min_size=1, max_size=120)), capacity


def best_fit_decreasing(lengths: list[int], capacity: int) -> list[int]:
    """Room left in each bin, by looking at every bin for every document."""
    room: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = [b for b in range(len(room)) if room[b] >= length]
        if fitting:
            room[min(fitting, key=lambda b: room[b])] -= length
        else:
            room.append(capacity - length)
    return room


@unhurried
@given(packings())
@example(([1], 1))
@example(([64, 64, 64, 1, 63], 128))
def test_pack_is_exactly_best_fit_decreasing(case):
    lengths, capacity = case
    bin_of = pack(np.array(lengths), capacity)
    assert bin_of.dtype == np.int32
    room = capacity - np.bincount(bin_of, weights=lengths).astype(int)
    assert sorted(room.tolist()) == sorted(best_fit_decreasing(lengths, capacity))


def test_pack_at_a_size_that_fills_the_bit_sets():
    lengths = np.random.default_rng(0).integers(1, 5000, 3000)
    room = 20_000 - np.bincount(pack(lengths, 20_000), weights=lengths).astype(int)
    assert sorted(room.tolist()) == sorted(best_fit_decreasing(lengths.tolist(), 20_000))


def test_pack_takes_nothing_and_refuses_what_is_too_long():
    assert pack(np.array([], dtype=np.int32), 8).tolist() == []
    with pytest.raises(ConfigError, match="longer than a micro-batch; got 9 tokens, micro_batch_tokens 8"):
        pack(np.array([3, 9]), 8)


@st.composite
def steps(draw):
    lengths, capacity = draw(packings())
    ids = draw(st.permutations(range(1000, 1000 + len(lengths))))
    return np.array(ids), np.array(lengths, dtype=np.int32), capacity, draw(st.integers(1, 9)), draw(st.booleans())


def arrange(step) -> tuple[StepLayout, list[list[list[list[int]]]]]:
    """The layout, and the rows of ids by rank and micro-batch."""
    ids, lengths, capacity, ranks, packed = step
    layout = layout_step(ids, lengths, capacity=capacity, ranks=ranks, packed=packed)
    return layout, [[micro.rows for micro in layout.micro_batches(rank)] for rank in range(ranks)]


@unhurried
@given(steps())
def test_every_document_of_a_step_lies_somewhere_once(step):
    _, by_rank = arrange(step)
    placed = [document for rank in by_rank for rows in rank for row in rows for document in row]
    assert sorted(placed) == sorted(step[0].tolist())


@unhurried
@given(steps())
def test_no_micro_batch_holds_more_than_the_capacity(step):
    ids, lengths, capacity, _, packed = step
    tokens = dict(zip(ids.tolist(), lengths.tolist(), strict=True))
    for rows in itertools.chain(*arrange(step)[1]):
        per_row = [sum(tokens[document] for document in row) for row in rows]
        assert len(rows) * max(per_row, default=0) <= capacity
        assert all(row for row in rows)
        assert len(rows) <= 1 if packed else all(len(row) == 1 for row in rows)


@unhurried
@given(steps())
def test_ranks_have_equal_counts_and_empty_ones_come_last(step):
    for rank in (ranks := arrange(step)[1]):
        assert len(rank) == len(ranks[0])
        filled = [bool(rows) for rows in rank]
        assert filled == sorted(filled, reverse=True)


@unhurried
@given(steps())
def test_there_are_as_few_micro_batches_as_the_packing_asks_for(step):
    _, lengths, capacity, ranks, packed = step
    if packed:
        needed = len(best_fit_decreasing(lengths.tolist(), capacity))
        assert len(arrange(step)[1][0]) == -(-needed // ranks)


@unhurried
@given(steps())
def test_no_rank_is_idle_while_there_are_documents_for_all(step):
    ids, _, _, ranks, _ = step
    idle = sum(not any(rank) for rank in arrange(step)[1])
    assert idle == max(0, ranks - len(ids))


@unhurried
@given(steps())
def test_the_figures_of_a_layout_are_those_of_its_rows(step):
    ids, lengths, capacity, ranks, _ = step
    tokens = dict(zip(ids.tolist(), lengths.tolist(), strict=True))
    layout, by_rank = arrange(step)
    work = []
    for rank in by_rank:
        places = squares = 0
        for rows in rank:
            per_row = [[tokens[document] for document in row] for row in rows]
            longest = max(map(sum, per_row), default=0)
            places += len(rows) * longest
            squares += sum(sum(n * n for n in row) + (longest - sum(row)) ** 2 for row in per_row)
        work.append((places, squares))
    filled = sum(bool(rows) for rank in by_rank for rows in rank)
    assert layout.efficiency == pytest.approx(lengths.sum() / (filled * capacity))
    for figure, totals in zip((layout.token_balance, layout.square_balance), zip(*work, strict=True), strict=True):
        assert figure == pytest.approx(max(totals) * ranks / sum(totals))
    assert layout.balance >= 1


@unhurried
@given(steps())
def test_the_same_step_is_arranged_the_same_way(step):
    assert arrange(step)[1] == arrange(step)[1]


def test_a_packed_row_keeps_the_order_of_the_step():
    ids = np.array([7, 3, 9, 1])
    layout = layout_step(ids, np.array([2, 5, 1, 4]), capacity=12, ranks=1, packed=True)
    assert layout.micro_batches(0)[0].rows == [[7, 3, 9, 1]]


def test_rows_of_like_length_lie_together():
    lengths = np.array([10, 2, 9, 2, 10, 2])
    layout = layout_step(np.arange(6), lengths, capacity=30, ranks=2, packed=False)
    rows = [[len(micro.rows) for micro in layout.micro_batches(rank)] for rank in (0, 1)]
    assert sorted(itertools.chain(*rows)) == [3, 3]
    by_rank = [sorted(layout.micro_batches(rank)[0].rows) for rank in (0, 1)]
    assert sorted(by_rank) == [[[0], [2], [4]], [[1], [3], [5]]]


def lognormal(mean: float, sigma: float, count: int, capacity: int) -> np.ndarray:
    draws = np.random.default_rng(1).lognormal(np.log(mean) - sigma**2 / 2, sigma, count)
    return np.clip(np.round(draws), 2, capacity).astype(np.int32)


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("ranks", [2, 8])
@pytest.mark.parametrize(("mean", "sigma", "capacity"), [(188, 0.45, 2048), (978, 1.0, 8192)])
def test_ranks_are_balanced_on_lengths_as_they_occur(mean, sigma, capacity, ranks, packed):
    lengths = lognormal(mean, sigma, 4096, capacity)
    layout = layout_step(np.arange(4096), lengths, capacity=capacity, ranks=ranks, packed=packed)
    assert layout.balance <= 1.02


@pytest.mark.parametrize(("documents", "ranks"), [(16, 2), (64, 4), (256, 8)])
def test_a_small_step_is_balanced_document_by_document(documents, ranks):
    # Whole bins leave up to a third between the ranks here: single documents have to be moved.
    lengths = lognormal(978, 1.0, documents, 8192)
    layout = layout_step(np.arange(documents), lengths, capacity=8192, ranks=ranks, packed=True)
    assert layout.balance <= 1.02


def test_packing_fills_large_steps():
    lengths = lognormal(188, 0.45, 100_000, 2048)
    assert layout_step(np.arange(100_000), lengths, capacity=2048, ranks=8, packed=True).efficiency > 0.99
