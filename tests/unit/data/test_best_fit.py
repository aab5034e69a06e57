from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from seqaware.data.best_fit import best_fit, falling_order

# The first call of a compiled function compiles it: no deadline.
unhurried = settings(deadline=None)


@unhurried
@given(st.lists(st.integers(1, 9), min_size=1, max_size=60))
def test_equal_lengths_stay_in_their_order(lengths):
    order = falling_order(np.array(lengths), max(lengths))
    assert order.tolist() == sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))


def test_of_bins_with_the_same_room_the_first_to_have_it_is_taken():
    bin_of = np.empty(6, dtype=np.int32)
    assert best_fit(np.array([7, 7, 7, 3, 3, 3]), 10, bin_of) == 3
    assert bin_of.tolist() == [0, 1, 2, 0, 1, 2]


def test_the_tightest_bin_is_taken_across_words_of_the_bit_set():
    bin_of = np.empty(4, dtype=np.int32)
    # Room left: 5000 - 4000 = 1000 and 5000 - 3000 = 2000; 900 fits both, 1100 the second only.
    assert best_fit(np.array([4000, 3000, 1100, 900]), 5000, bin_of) == 2
    # After 1100 the second has 900 left: exactly the last document, tighter than the first's 1000.
    assert bin_of.tolist() == [0, 1, 1, 1]
