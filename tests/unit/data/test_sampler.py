from __future__ import annotations

import hashlib
import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from seqaware.data import sampler as order_module
from seqaware.data.sampler import Permutation, StepSampler
from seqaware.errors import ConfigError, DataError

# The first call of a compiled function compiles it: no deadline.
unhurried = settings(deadline=None)

GOLDEN_12 = [7, 3, 0, 8, 1, 9, 4, 11, 5, 10, 2, 6]
GOLDEN_BILLION = [777351654, 597164827, 638315370]


def of_size(documents: int, size: int, *, seed: int = 0, parts=(), fingerprint: str = "f") -> StepSampler:
    lengths = np.full(documents, 5, dtype=np.int32)
    return StepSampler(lengths, fingerprint=fingerprint, seed=seed, global_batch_size=size, parts=parts)


def of_tokens(lengths, tokens: int, *, seed: int = 0) -> StepSampler:
    return StepSampler(np.array(lengths, np.int32), fingerprint="f", seed=seed, global_batch_tokens=tokens)


def epoch_of(order: StepSampler, epoch: int) -> list[list[int]]:
    return [order.documents(epoch, step).tolist() for step in range(order.steps_in_epoch(epoch))]


def feistel_in_plain_integers(index: int, size: int, labels: tuple[object, ...]) -> int:
    """The definition, once more, in Python's integers."""
    text = "\x1f".join(["seqaware order 1", *map(str, labels)])
    digest = hashlib.shake_256(text.encode()).digest(64)
    keys = [int.from_bytes(digest[8 * i : 8 * i + 8], "little") for i in range(8)]
    bits = max(8, (size - 1).bit_length())
    left_bits, right_bits = bits // 2, bits - bits // 2

    def mix(x: int) -> int:
        x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        x = (x ^ (x >> 27)) * 0x94D049BB133111EB % 2**64
        return x ^ (x >> 31)

    value = index
    while True:
        left, right = value >> right_bits, value % 2**right_bits
        for key_left, key_right in zip(keys[::2], keys[1::2], strict=True):
            left ^= mix(right ^ key_left) % 2**left_bits
            right ^= mix(left ^ key_right) % 2**right_bits
        value = left << right_bits | right
        if value < size:
            return value


@unhurried
@given(st.integers(1, 3000), st.integers(0, 2**31), st.integers(0, 5))
def test_a_permutation_holds_every_entry_once(size, seed, epoch):
    entries = Permutation.keyed(size, "f", seed, epoch).at(np.arange(size))
    assert sorted(entries.tolist()) == list(range(size))


@unhurried
@given(st.integers(1, 10**12), st.data())
def test_the_compiled_network_is_the_defined_one(size, data):
    index = data.draw(st.integers(0, size - 1))
    assert Permutation.keyed(size, "f", 7).at(np.array([index]))[0] == feistel_in_plain_integers(index, size, ("f", 7))


def test_the_order_never_changes_between_versions():
    # Written down once: another order here means that every resumed run would see other documents.
    assert Permutation.keyed(12, "fingerprint", 42, 0).at(np.arange(12)).tolist() == GOLDEN_12
    assert Permutation.keyed(10**9, "fingerprint", 42, 3).at(np.array([0, 1, 10**9 - 1])).tolist() == GOLDEN_BILLION


def test_all_permutations_of_five_are_about_equally_frequent():
    draws = 12_000
    seen = dict.fromkeys(itertools.permutations(range(5)), 0)
    for epoch in range(draws):
        seen[tuple(Permutation.keyed(5, "f", 0, epoch).at(np.arange(5)).tolist())] += 1
    expected = draws / len(seen)
    chi_squared = sum((count - expected) ** 2 / expected for count in seen.values())
    # 119 degrees of freedom: mean 119, standard deviation √238 = 15.4; five of them above the mean.
    assert chi_squared < 119 + 5 * 15.4


def test_neighbours_do_not_stay_neighbours():
    size = 20_000
    entries = Permutation.keyed(size, "f", 0, 0).at(np.arange(size)).astype(float)
    # Independent uniform entries correlate by about N(0, 1/√size); five standard deviations.
    assert abs(np.corrcoef(entries[:-1], entries[1:])[0, 1]) < 5 / math.sqrt(size)
    assert abs(np.corrcoef(np.arange(size), entries)[0, 1]) < 5 / math.sqrt(size)


@unhurried
@given(st.integers(1, 300), st.integers(1, 40), st.integers(0, 3))
def test_an_epoch_holds_every_document_once_in_full_steps_and_one_rest(documents, size, epoch):
    order = of_size(documents, size)
    steps = epoch_of(order, epoch)
    assert sorted(itertools.chain(*steps)) == list(range(documents))
    assert [len(step) for step in steps[:-1]] == [size] * (len(steps) - 1)
    assert 1 <= len(steps[-1]) <= size


@unhurried
@given(st.lists(st.integers(1, 50), min_size=1, max_size=200), st.integers(50, 200), st.integers(1, 9))
def test_token_steps_take_the_longest_run_that_fits(lengths, budget, chunk):
    whole = list(itertools.chain(*epoch_of(of_tokens(lengths, budget), 1)))
    by_hand: list[list[int]] = [[]]
    for index in whole:
        if sum(lengths[i] for i in by_hand[-1]) + lengths[index] > budget:
            by_hand.append([])
        by_hand[-1].append(index)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(order_module, "_CHUNK", chunk)
        assert epoch_of(of_tokens(lengths, budget), 1) == by_hand
    assert whole == Permutation.keyed(len(lengths), "f", 0, 1).at(np.arange(len(lengths))).tolist()


def test_a_token_step_of_exactly_the_budget_is_one_step():
    assert of_tokens([10, 10, 10], 30).steps_in_epoch(0) == 1
    assert of_tokens([10, 10, 10], 29).steps_in_epoch(0) == 2


def test_any_step_can_be_asked_for_first():
    walked = epoch_of(of_size(1000, 7), 4)
    assert of_size(1000, 7).documents(4, 100).tolist() == walked[100]


@pytest.mark.parametrize("other", [{"seed": 1}, {"fingerprint": "g"}])
def test_seed_and_data_change_the_order(other):
    assert epoch_of(of_size(50, 50), 0) != epoch_of(of_size(50, 50, **other), 0)


def test_epochs_differ():
    order = of_size(50, 50)
    assert len({tuple(order.documents(epoch, 0).tolist()) for epoch in range(20)}) == 20


def test_a_billion_documents_need_no_memory():
    permutation = Permutation.keyed(10**9, "f", 0, 0)
    entries = permutation.at(np.arange(10**8, 10**8 + 1000))
    assert len(set(entries.tolist())) == 1000 and entries.min() >= 0 and entries.max() < 10**9


PARTS = (("long", 700, 0.5), ("short", 100, 0.3), ("rare", 90, 0.2))


def test_a_mixture_is_as_large_as_it_can_be_without_repeating():
    # 700 / 0.5 = 1400, 100 / 0.3 = 333⅓, 90 / 0.2 = 450: N = 333⅓, so round(166⅔), 100 and round(66⅔).
    order = of_size(890, 16, parts=PARTS)
    for epoch in range(3):
        ids = np.array(list(itertools.chain(*epoch_of(order, epoch))))
        assert len(set(ids.tolist())) == len(ids)
        counts = [int(((ids >= a) & (ids < b)).sum()) for a, b in ((0, 700), (700, 800), (800, 890))]
        assert counts == [167, 100, 67]


def test_proportions_need_not_add_up_to_one_and_are_taken_as_written():
    tenfold = tuple((name, count, proportion * 10) for name, count, proportion in PARTS)
    assert epoch_of(of_size(890, 16, parts=tenfold), 2) == epoch_of(of_size(890, 16, parts=PARTS), 2)
    # In binary 0.1 · (3 / 0.3) is a little more than 1 and 0.35 · 10 a little less than 3.5; as written they are exact.
    parts = (("a", 100, 0.35), ("b", 3, 0.3), ("c", 100, 0.35))
    assert of_size(203, 1, parts=parts).documents_per_epoch == 4 + 3 + 4


def test_a_mixture_draws_other_documents_in_later_epochs_and_mixes_inside_one():
    order = of_size(890, 334, parts=PARTS)
    firsts = [set(order.documents(epoch, 0)[order.documents(epoch, 0) < 700].tolist()) for epoch in range(30)]
    assert len(set.union(*firsts)) > 650
    ids = order.documents(0, 0)
    halves = [int((half < 700).sum()) for half in (ids[:167], ids[167:])]
    # Hypergeometric: mean 83.5, standard deviation √(167 · ¼ · 167/333) = 4.6; five of them.
    assert abs(halves[0] - halves[1]) / 2 < 5 * 4.6


def test_without_proportions_the_parts_change_nothing():
    parts = (("a", 30, None), ("b", 20, None))
    assert epoch_of(of_size(50, 8, parts=parts), 0) == epoch_of(of_size(50, 8), 0)


@pytest.mark.parametrize(
    ("parts", "kind", "says"),
    [
        ((("a", 30, 0.5), ("b", 20, None)), ConfigError, "b has no usable proportion"),
        ((("a", 30, 0.5), ("b", 20, 0.0)), ConfigError, "b has no usable proportion; got 0.0"),
        ((("a", 30, 0.5), ("b", 20, float("nan"))), ConfigError, "b has no usable proportion; got nan"),
        ((("a", 30, 1.0), ("b", 20, 1e-4)), ConfigError, "b would give no document to an epoch of 30"),
        ((("a", 50, 0.5), ("b", 0, 0.5)), DataError, "b has no documents"),
        ((("a", 30, None), ("b", 21, None)), DataError, "do not add up to its documents; got 51 in 2"),
    ],
)
def test_a_mixture_that_makes_no_sense_is_refused(parts, kind, says):
    with pytest.raises(kind, match=says):
        of_size(50, 8, parts=parts)


@pytest.mark.parametrize("batch", [{}, {"global_batch_size": 4, "global_batch_tokens": 99}, {"global_batch_size": 0}])
def test_a_step_has_exactly_one_definition(batch):
    with pytest.raises(ConfigError):
        StepSampler(np.array([5, 6], np.int32), fingerprint="f", seed=0, **batch)


def test_a_document_longer_than_a_step_is_refused():
    with pytest.raises(ConfigError, match="got 9 tokens, global_batch_tokens 8"):
        of_tokens([3, 9], 8)


def test_no_documents_are_refused():
    with pytest.raises(DataError, match="no document"):
        of_size(0, 4)


@pytest.mark.parametrize(
    ("epochs", "max_steps", "steps"),
    [
        (1, None, 25),
        (3, None, 75),
        (0.5, None, 13),  # ⌈12.5⌉
        (2.04, None, 51),
        (0.28, None, 7),  # 0.28 · 25 is 7.000000000000001 in binary: eight steps would be one too many
        (0.01, None, 1),
        (3, 40, 40),
        (3, 80, 75),
        (1e9, 7, 7),
    ],
)
def test_epochs_become_steps(epochs, max_steps, steps):
    assert of_size(100, 4).total_steps(epochs, max_steps) == steps


def test_epochs_of_token_steps_become_steps():
    lengths = np.random.default_rng(0).integers(1, 40, 300)
    order = of_tokens(lengths, 100)
    per_epoch = [order.steps_in_epoch(epoch) for epoch in range(4)]
    assert len(set(per_epoch)) > 1
    assert order.steps_per_epoch(2.5) == tuple(per_epoch[:3])
    assert order.total_steps(2.5) == sum(per_epoch[:2]) + math.ceil(per_epoch[2] / 2)
    assert order.steps_per_epoch(4, per_epoch[0] + 1) == tuple(per_epoch[:2])
    assert order.steps_per_epoch(None, 10**12) == (per_epoch[0],)
    assert order.total_steps(4, per_epoch[0] + 1) == per_epoch[0] + 1


@pytest.mark.parametrize("order", [of_size(50, 8), of_tokens(range(1, 51), 100)], ids=["size", "tokens"])
def test_position_walks_the_steps_of_all_epochs(order):
    walked = [(epoch, step) for epoch in range(3) for step in range(order.steps_in_epoch(epoch))]
    assert [order.position(step) for step in range(1, len(walked) + 1)] == walked


def test_more_epochs_than_can_be_counted_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("seqaware.data.sampler._MOST_LAID_OUT", 1000)
    order = StepSampler(np.full(8, 5, np.int32), fingerprint="f", seed=0, global_batch_tokens=10)
    assert len(order.steps_per_epoch(125)) == 125
    with pytest.raises(ConfigError, match="cannot be counted"):
        order.steps_per_epoch(1e6)
    assert len(order.steps_per_epoch(1e6, 40)) == 10
