"""Sums add over micro-batches and ranks; ratios are taken once."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from seqaware.objective.sums import STATS, NormalizeBy, StepSums

# A busy machine may halt a test anywhere: no deadline.
unhurried = settings(deadline=None)

# Integers: sums of them are exact in float64, so equality needs no tolerance.
counts = st.lists(st.integers(0, 10**6), min_size=len(STATS) + 2, max_size=len(STATS) + 2)


def step_sums(values: list[int]) -> StepSums:
    *stats, sequences, tokens = values
    return StepSums.of(torch.tensor(stats, dtype=torch.float64), sequences=sequences, tokens=tokens)


@unhurried
@given(parts=st.lists(counts, min_size=1, max_size=6), data=st.data())
def test_any_split_gives_the_same_sums(parts: list[list[int]], data: st.DataObject) -> None:
    order = data.draw(st.permutations(parts))
    total = sum((step_sums(part) for part in order), StepSums.zeros())
    assert total.vector.tolist() == [float(sum(column)) for column in zip(*parts, strict=True)]


def test_fields_and_their_order() -> None:
    sums = step_sums(list(range(1, len(StepSums.FIELDS) + 1)))
    assert sums.vector.dtype == torch.float64
    assert {field: sums[field].item() for field in StepSums.FIELDS} == dict(
        zip(StepSums.FIELDS, range(1, 11), strict=True)
    )
    assert (sums["sequences"].item(), sums["tokens"].item()) == (9.0, 10.0)


@pytest.mark.parametrize(("normalize_by", "field"), [("tokens", 4.0), ("weight", 8.0), ("sequences", 2.0)])
def test_metrics(normalize_by: NormalizeBy, field: float) -> None:
    stats = torch.tensor([12.0, 6.0, 8.0, 4.0, 3.0, 1.0, 9.0, 35.0], dtype=torch.float64)
    sums = StepSums.of(stats, sequences=2, tokens=20)
    assert sums.denominator(normalize_by).item() == field
    assert sums.metrics(normalize_by) == {
        "loss": 12.0 / field,
        "unweighted_loss": 2.0,
        "accuracy": 1.0 / 3.0,
        "logsumexp_mean": 3.0,
        "logsumexp_std": pytest.approx(math.sqrt(35.0 / 3.0 - 9.0)),
        "supervised_tokens": 4.0,
        "scored_tokens": 3.0,
        "tokens": 20.0,
        "sequences": 2.0,
        "weight_sum": 8.0,
    }


def test_the_mean_of_a_step_is_not_the_mean_of_its_parts() -> None:
    """One token of loss 10 beside nine of loss 0: the step's loss is 1, the mean of means would be 5."""
    few = StepSums.of(torch.tensor([10.0, 10, 1, 1, 1, 0, 0, 0], dtype=torch.float64), sequences=1, tokens=2)
    many = StepSums.of(torch.tensor([0.0, 0, 9, 9, 9, 9, 0, 0], dtype=torch.float64), sequences=1, tokens=10)
    assert (few + many).metrics("tokens")["loss"] == 1.0


def test_a_ratio_over_nothing_is_not_a_number() -> None:
    metrics = StepSums.zeros().metrics("tokens")
    assert all(math.isnan(metrics[name]) for name in ("loss", "unweighted_loss", "accuracy", "logsumexp_std"))
    assert metrics["tokens"] == 0.0


def test_constant_logsumexp_has_no_spread() -> None:
    """Rounding must not turn a variance of zero into the root of a negative number."""
    value, n = 10.1, 7
    stats = torch.tensor([0.0, 0, n, n, n, 0, n * value, n * value**2 * (1 - 1e-15)], dtype=torch.float64)
    assert StepSums.of(stats, sequences=1, tokens=n).metrics("tokens")["logsumexp_std"] == pytest.approx(0.0, abs=1e-6)


def test_unknown_denominator_is_refused() -> None:
    with pytest.raises(ValueError, match="tokens, weight or sequences; got 'steps'"):
        StepSums.zeros().denominator("steps")  # type: ignore[arg-type]
