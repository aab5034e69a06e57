"""Splitting a document that is longer than a row.

A piece begins with the last token of the piece before it, as context: so every token but the document's first is
predicted exactly once. With capacity C and n tokens, piece p holds the tokens [p(C-1), min(n, p(C-1) + C)).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from seqaware.data.store.store_format import Counted


class Piece(NamedTuple):
    """Tokens [begin, end) of a document, and what was counted before them."""

    begin: int
    end: int
    counted: Counted


def split_document(supervised: NDArray[np.bool_], turn_start: NDArray[np.bool_], capacity: int) -> list[Piece]:
    """The pieces of a document of n tokens, each at most `capacity` (2 or more) long.

    Args:
        supervised, turn_start: [n] flags as in `Document`.
    """
    assert capacity >= 2, "a piece has to predict a token"
    tokens = len(supervised)
    predicted = supervised.copy()
    predicted[0] = False
    running = np.cumsum(predicted)
    turn = np.cumsum(turn_start)
    total_of_turn = np.bincount(turn, weights=predicted).astype(np.int64)
    starts = np.flatnonzero(turn_start)
    pieces = []
    for begin in range(0, max(tokens - 1, 1), capacity - 1):
        end = min(tokens, begin + capacity)
        earlier = starts[starts <= begin]
        # What was counted up to, but without, the first token of the turn in which this piece begins.
        before_turn = int(running[earlier[-1] - 1]) if len(earlier) and earlier[-1] > 0 else 0
        counted = Counted(
            supervised=int(running[begin]),
            sequence=begin,
            turn=int(running[begin]) - before_turn,
            total_supervised=int(running[-1]),
            total_sequence=tokens - 1,
            total_first_turn=int(total_of_turn[turn[begin]]),
            total_last_turn=int(total_of_turn[turn[end - 1]]),
        )
        pieces.append(Piece(begin, end, counted))
    return pieces
