"""ZeRO-3's gathers on paper. What real runs gathered is compared in benchmarks/memory.py."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st

from seqaware.estimate import zero3_gathering as played_by
from seqaware.estimate.zero3_gathering import GatherSettings, gathering
from tests.unit.plan.layouts import SMALL, known

NOTHING_KEPT = GatherSettings(prefetch=0, max_live=0, reuse=0, persistence=0)
ALL_KEPT = GatherSettings(prefetch=10**12, max_live=10**12, reuse=10**12, persistence=0)


def test_what_is_released_at_once_is_gathered_forward_and_backward() -> None:
    played = gathering(SMALL, NOTHING_KEPT, recomputed=False)
    # The head's forward is followed by its own backward, but nothing is looked ahead for: twice each.
    assert played.gathered == 2 * SMALL.parameters
    assert played.peak == SMALL.largest
    assert played.at_loss == 0


def test_what_is_kept_is_gathered_once() -> None:
    played = gathering(SMALL, ALL_KEPT, recomputed=False)
    assert played.gathered == SMALL.parameters
    assert played.at_loss == SMALL.parameters


def test_layers_that_are_computed_again_are_gathered_again() -> None:
    again = gathering(SMALL, NOTHING_KEPT, recomputed=True).gathered
    # The last module of a layer stays whole from its first fetch until its own backward.
    last = SMALL.layer[-1].size
    assert again == 2 * SMALL.parameters + SMALL.layers * (SMALL.layer_parameters - last)


def test_small_parameters_stay_whole_and_are_not_gathered() -> None:
    norms = (2 * SMALL.layers + 1) * SMALL.hidden
    played = gathering(SMALL, replace(NOTHING_KEPT, persistence=SMALL.hidden + 1), recomputed=False)
    assert played.persistent == norms
    assert played.gathered == 2 * (SMALL.parameters - norms)


def test_a_run_that_was_measured() -> None:
    """DeepSpeed 0.19.8 gathered 283,658,240 bytes of float32 in a step of two micro-batches, and held 5,636,096 weights
    when the forward ended."""
    bounds = GatherSettings(prefetch=1_000_000, max_live=5_000_000, reuse=5_000_000, persistence=10_000)
    played = gathering(SMALL, bounds, recomputed=False)
    assert 4 * (2 * played.gathered + played.persistent) == 283_658_240
    assert played.at_loss == 5_636_096


def test_a_large_model_holds_little_more_than_its_bounds() -> None:
    bounds = GatherSettings(prefetch=5 * 10**7, max_live=10**9, reuse=10**9, persistence=10**5)
    decoder = known("70B")
    played = gathering(decoder, bounds, recomputed=True)
    assert played.peak <= 10**9 + decoder.largest
    assert played.gathered < 2.01 * decoder.parameters


@settings(max_examples=30, deadline=None)
@given(
    prefetch=st.integers(0, 10**7),
    live=st.integers(0, 3 * 10**7),
    reuse=st.integers(0, 3 * 10**7),
    recomputed=st.booleans(),
    whole_mlp=st.booleans(),
)
def test_any_bounds_gather_every_weight(
    prefetch: int, live: int, reuse: int, recomputed: bool, whole_mlp: bool
) -> None:
    bounds = GatherSettings(prefetch, live, reuse, persistence=0)
    played = gathering(SMALL, bounds, recomputed=recomputed, whole_mlp=whole_mlp)
    assert SMALL.parameters <= played.gathered <= 3 * SMALL.parameters
    # A bundle of prefetched weights is there twice while it is copied.
    assert played.peak <= 2 * SMALL.parameters


class _Scanning(played_by._Coordinator):
    """Looks through the later modules one by one, as DeepSpeed does."""

    def _comes_again(self, name: str, step: int) -> bool:
        passed = 0
        for later in self.visits[step:]:
            if passed >= self.settings.reuse:
                return False
            if name in dict(later.parameters):
                return True
            passed += sum(size for _, size in later.parameters)
        return False


distances = st.sampled_from([0, 1, 1000, 10**12]) | st.integers(0, 2 * SMALL.parameters)


@given(bounds=st.builds(GatherSettings, distances, distances, distances, distances), recomputed=st.booleans())
@settings(max_examples=30)
def test_the_next_use_of_a_parameter_is_found_without_a_scan(bounds: GatherSettings, recomputed: bool) -> None:
    visits = tuple(played_by._visits(SMALL, SMALL.layer, recomputed=recomputed))
    assert gathering(SMALL, bounds, recomputed=recomputed) == _Scanning(visits, bounds).play()
