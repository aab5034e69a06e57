"""Losses that jump: held against the median of the steps before them."""

from __future__ import annotations

import pytest

from seqaware.config.output_config import FaultsConfig
from seqaware.training.divergence import SpikeDetector, SpikeError


def _lines(*losses: float, first: int = 1) -> list[dict[str, float]]:
    return [{"step": step, "loss": loss} for step, loss in enumerate(losses, start=first)]


def _watch(factor: float | None = 2.0, window: int = 3) -> SpikeDetector:
    return SpikeDetector(FaultsConfig(spike_factor=factor, spike_window=window))


def test_a_jump_is_told_with_its_step_and_the_usual_loss() -> None:
    watch = _watch()
    watch.see(_lines(1.0, 9.0, 1.2))  # no spikes before the window is full: 9.0 passes, and the median bears it
    with pytest.raises(SpikeError) as spike:
        watch.see(_lines(2.3, 4.61, first=4))
    assert (spike.value.step, spike.value.loss, spike.value.usual) == (5, 4.61, 2.3)


def test_exactly_the_factor_is_no_spike() -> None:
    watch = _watch()
    watch.see(_lines(1.0, 1.0, 1.0, 2.0))


def test_the_first_of_several_counts_and_the_later_steps_are_known() -> None:
    watch = _watch()
    watch.see(_lines(1.0, 1.0, 1.0))
    with pytest.raises(SpikeError) as spike:
        watch.see(_lines(5.0, 1.1, 7.0, first=4))
    assert spike.value.step == 4


def test_after_going_back_the_steps_are_seen_anew() -> None:
    watch = _watch()
    watch.see(_lines(1.0, 1.0, 1.0, 1.1))
    with pytest.raises(SpikeError):
        watch.see(_lines(5.0, first=5))
    watch.forget_after(2)
    watch.see(_lines(9.0, first=3))  # the window is not full any more


def test_a_resumed_run_remembers() -> None:
    watch = _watch()
    watch.remember(_lines(1.0, 1.0, 1.0))
    with pytest.raises(SpikeError):
        watch.see(_lines(3.0, first=4))


def test_without_a_factor_nothing_is_a_spike() -> None:
    watch = _watch(factor=None)
    watch.see(_lines(1.0, 1.0, 1.0, 1e9))
