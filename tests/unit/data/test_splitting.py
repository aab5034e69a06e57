"""Splitting: every token is predicted once, and every piece knows what was counted before it."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from seqaware.data.splitting import split_document


@st.composite
def flags(draw: st.DrawFn) -> tuple[list[bool], list[bool]]:
    length = draw(st.integers(1, 60))
    booleans = st.lists(st.booleans(), min_size=length, max_size=length)
    return draw(booleans), draw(st.lists(st.sampled_from([False] * 5 + [True]), min_size=length, max_size=length))


def counted_one_by_one(supervised: list[bool], turn_start: list[bool]) -> list[tuple[int, int, int]]:
    """After each token: supervised, all, and this turn's supervised tokens predicted so far."""
    after = []
    of_all = of_turn = 0
    for place, (loss, starts) in enumerate(zip(supervised, turn_start, strict=True)):
        if starts:
            of_turn = 0
        if place > 0 and loss:
            of_all += 1
            of_turn += 1
        after.append((of_all, place, of_turn))
    return after


@given(flags(), st.integers(2, 20))
def test_every_token_is_predicted_in_one_piece_only(both: tuple[list[bool], list[bool]], capacity: int) -> None:
    supervised, turn_start = both
    pieces = split_document(np.array(supervised), np.array(turn_start), capacity)
    predicted = [place for piece in pieces for place in range(piece.begin + 1, piece.end)]
    assert predicted == list(range(1, len(supervised)))
    assert all(piece.end - piece.begin <= capacity for piece in pieces)
    # Pieces are full but for the last, so that splitting costs as few rows as possible.
    assert all(piece.end - piece.begin == capacity for piece in pieces[:-1])
    assert all(later.begin == earlier.end - 1 for earlier, later in pairwise(pieces))


@given(flags(), st.integers(2, 20))
def test_counts_go_on_where_the_last_piece_stopped(both: tuple[list[bool], list[bool]], capacity: int) -> None:
    supervised, turn_start = both
    after = counted_one_by_one(supervised, turn_start)
    for piece in split_document(np.array(supervised), np.array(turn_start), capacity):
        before = after[piece.begin] if piece.begin > 0 else (0, 0, 0)
        assert (piece.counted.supervised, piece.counted.sequence, piece.counted.turn) == before
        assert (piece.counted.total_supervised, piece.counted.total_sequence) == after[-1][:2]


@given(flags(), st.integers(2, 20))
def test_the_turns_at_both_ends_are_counted_whole(both: tuple[list[bool], list[bool]], capacity: int) -> None:
    supervised, turn_start = both
    after = counted_one_by_one(supervised, turn_start)
    ends = [place for place in range(len(supervised)) if place + 1 == len(supervised) or turn_start[place + 1]]
    for piece in split_document(np.array(supervised), np.array(turn_start), capacity):
        first = next(end for end in ends if end >= piece.begin)
        last = next(end for end in ends if end >= piece.end - 1)
        assert piece.counted.total_first_turn == after[first][2]
        assert piece.counted.total_last_turn == after[last][2]
