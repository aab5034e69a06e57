"""Sums by position: against a plain loop, added over parts, and the same from either loss."""

from __future__ import annotations

import math

import pytest
import torch

from seqaware.objective.cross_entropy import Head, cross_entropy_from_logits
from seqaware.objective.fused import fused_by_position, fused_cross_entropy
from seqaware.objective.positions import BUCKETS, by_position, sums_by_position
from seqaware.objective.sums import STATS, StepSums

ROWS, HIDDEN, VOCABULARY = 300, 8, 11


def _rows() -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(ROWS, HIDDEN, generator=generator, dtype=torch.float64)
    head = torch.randn(VOCABULARY, HIDDEN, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, VOCABULARY, (ROWS,), generator=generator)
    k = torch.randint(1, 70, (ROWS,), generator=generator)
    labels[::7], k[::7] = -100, 0
    weights = torch.where(k > 0, k.double().sqrt(), 0.0)
    weights[5] = 0.0  # supervised, but not scored
    return hidden, head, labels, weights, k


def test_every_bucket_is_what_a_loop_finds() -> None:
    hidden, head, labels, weights, k = _rows()
    _, stats = cross_entropy_from_logits(hidden @ head.T, labels, weights, k_N=k)
    found = StepSums.of(stats, sequences=1, tokens=ROWS).positions()
    logits = hidden @ head.T
    losses = torch.logsumexp(logits, -1) - logits.gather(1, labels.clamp(min=0).unsqueeze(1)).squeeze(1)
    assert [(entry["from"], entry["to"]) for entry in found] == [(2**b, 2 ** (b + 1) - 1) for b in range(7)]
    for entry in found:
        chosen = [i for i in range(ROWS) if entry["from"] <= k[i] <= entry["to"] and weights[i] > 0]
        assert entry["tokens"] == len(chosen)
        assert math.isclose(entry["loss"], sum(float(losses[i]) for i in chosen) / len(chosen), rel_tol=1e-12)
        weighted = sum(float(losses[i] * weights[i]) for i in chosen) / len(chosen)
        assert math.isclose(entry["weighted_loss"], weighted, rel_tol=1e-12)
        right = sum(int(logits[i].argmax() == labels[i]) for i in chosen)
        assert math.isclose(entry["accuracy"], right / len(chosen), rel_tol=1e-12)


@pytest.mark.parametrize("know_rows", [False, True])
def test_the_fused_loss_finds_the_same_and_its_other_figures_do_not_move(know_rows: bool) -> None:
    hidden, weight, labels, weights, k = _rows()
    rows = (labels != -100).nonzero().squeeze(1) if know_rows else None
    loss, stats = fused_by_position(hidden, head=Head(weight), labels_N=labels, weights_N=weights, k_N=k, rows=rows)
    plain, usual = fused_cross_entropy(hidden, head=Head(weight), labels_N=labels, weights_N=weights, rows=rows)
    assert float(loss) == float(plain) and torch.equal(stats[: len(STATS)], usual)
    _, expected = cross_entropy_from_logits(hidden @ weight.T, labels, weights, k_N=k)
    # float64 over 300 rows: rounding of 2^-53 a term.
    torch.testing.assert_close(stats, expected, rtol=1e-12, atol=0.0)


def test_parts_add_up_to_the_whole() -> None:
    hidden, head, labels, weights, k = _rows()
    logits = hidden @ head.T
    whole = StepSums.of(cross_entropy_from_logits(logits, labels, weights, k_N=k)[1], sequences=3, tokens=ROWS)
    total = StepSums.zeros(positions=True)
    for part in (slice(0, 17), slice(17, 200), slice(200, ROWS)):
        stats = cross_entropy_from_logits(logits[part], labels[part], weights[part], k_N=k[part])[1]
        total = total + StepSums.of(stats, sequences=1, tokens=len(logits[part]))
    torch.testing.assert_close(total.vector, whole.vector, rtol=1e-12, atol=0.0)
    found = whole.positions()
    metrics = whole.metrics("tokens")
    assert sum(entry["tokens"] for entry in found) == metrics["scored_tokens"]
    mean = sum(entry["loss"] * entry["tokens"] for entry in found) / metrics["scored_tokens"]
    assert math.isclose(mean, metrics["unweighted_loss"], rel_tol=1e-12)


def test_borders_lie_at_powers_of_two_and_the_last_bucket_has_no_end() -> None:
    k = torch.tensor([1, 2, 3, 4, 7, 8, 2**23 - 1, 2**23, 2**30])
    ones = torch.ones(len(k))
    sums = sums_by_position(losses=ones, weights=ones, correct=ones.bool(), k=k)
    assert {entry["from"]: entry["tokens"] for entry in by_position(sums.tolist())} == {
        1: 1, 2: 2, 4: 2, 8: 1, 2**22: 1, 2 ** (BUCKETS - 1): 2
    }  # fmt: skip


def test_a_loss_that_is_not_finite_stays_in_its_bucket() -> None:
    losses = torch.tensor([math.inf, 1.0])
    sums = sums_by_position(
        losses=losses, weights=torch.ones(2), correct=torch.tensor([True, True]), k=torch.tensor([1, 2])
    )
    assert [entry["loss"] for entry in by_position(sums.tolist())] == [math.inf, 1.0]


def test_a_step_in_training_has_none() -> None:
    assert StepSums.zeros().positions() == []
