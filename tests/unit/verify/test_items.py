"""What counts as rounding and what does not, on steps made by hand."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from seqaware.verify import items
from seqaware.verify.certificate import Certificate, table
from seqaware.verify.oracle import OracleStep, log_softmax_losses, plain_cross_entropy_losses

EPS = 2.0**-23
NAMES = ("embed", "key_bias", "head")


def _step(gradients: dict[str, Tensor], losses: tuple[float, ...] = (1.0, 3.0)) -> OracleStep:
    weights = torch.tensor([1.0, 1.5], dtype=torch.float64)
    return OracleStep(torch.tensor(losses, dtype=torch.float64), weights, 2.0, gradients)


@pytest.fixture
def pair() -> items.Pair:
    """A step of three parameters; rounding moves each gradient by 1e-6 of its size, and each loss by 1e-7."""
    torch.manual_seed(0)
    exact = {name: torch.randn(8, 8, dtype=torch.float64) for name in NAMES}
    exact["key_bias"] = torch.zeros(8, dtype=torch.float64)
    rounded = {name: gradient * (1.0 + 1e-6) for name, gradient in exact.items()}
    rounded["key_bias"] = torch.full((8,), 1e-9)
    return items.Pair(_step(exact), _step(rounded, (1.0 + 1e-7, 3.0 - 1e-7)), EPS)


def _seen(pair: items.Pair, **changed: Tensor) -> dict[str, Tensor]:
    return {**{name: gradient.clone() for name, gradient in pair.exact.gradients.items()}, **changed}


def test_a_run_that_rounds_holds(pair: items.Pair) -> None:
    seen = _seen(pair, head=pair.exact.gradients["head"] * (1.0 - 2e-6), key_bias=torch.full((8,), -2e-9))
    compared = items.gradient_item("gradient", seen, pair)
    assert compared.item.holds and compared.first is None
    assert compared.item.note == "3 parameters, worst head"
    # Twice the oracle's rounding, of four times that and one ε.
    assert compared.item.seen == pytest.approx(2e-6, rel=1e-6)
    assert compared.item.explained == pytest.approx(4e-6 + EPS, rel=1e-6)


def test_the_first_parameter_that_differs_is_named_in_the_order_of_the_model(pair: items.Pair) -> None:
    worse = {name: 2.0 * pair.exact.gradients[name] for name in ("head", "embed")}
    compared = items.gradient_item("gradient", _seen(pair, **worse), pair)
    assert not compared.item.holds and compared.first == "embed"
    assert compared.item.note.startswith("2 of 3 differ, first embed")


@pytest.mark.parametrize(
    "changed",
    [
        {"key_bias": torch.full((8,), 0.01)},
        {"embed": torch.full((8, 8), math.nan)},
        {"surplus": torch.zeros(3)},
    ],
)
def test_no_gradient_slips_through(pair: items.Pair, changed: dict[str, Tensor]) -> None:
    compared = items.gradient_item("gradient", _seen(pair, **changed), pair)
    assert not compared.item.holds
    assert compared.first is not None and next(iter(changed)) in compared.first


def test_a_gradient_that_is_missing_does_not_hold(pair: items.Pair) -> None:
    seen = _seen(pair)
    del seen["head"]
    assert items.gradient_item("gradient", seen, pair).first == "head"


def test_losses_are_held_to_what_rounding_does_to_tokens(pair: items.Pair) -> None:
    exact = (1.0 * 1.0 + 1.5 * 3.0) / 2.0
    # Errors that cancel in the mean are counted in full: Σ w·|δ| / Σ w·l.
    explained = 4 * (2.5e-7 / 5.5) + EPS
    item = items.loss_item("loss", exact * (1 + 0.9 * explained), pair, weighted=True)
    assert item.holds and item.explained == pytest.approx(explained, rel=1e-6)
    assert not items.loss_item("loss", exact * (1 + 1.1 * explained), pair, weighted=True).holds
    assert items.loss_item("unweighted", 2.0, pair, weighted=False).holds
    assert not items.loss_item("unweighted", exact, pair, weighted=False).holds


def test_norms_counts_and_weights(pair: items.Pair) -> None:
    norm = pair.exact.gradient_norm
    assert items.norm_item("norm", norm * (1 + 3e-6), pair).holds
    assert not items.norm_item("norm", norm * (1 + 1e-5), pair).holds
    assert items.count_item("tokens", 12.0, 12.0).holds and not items.count_item("tokens", 11.0, 12.0).holds
    assert items.weight_item("Σ w", 100.0 * (1 + 1e-7), 100.0).holds
    assert not items.weight_item("Σ w", 100.0 * (1 + 2e-7), 100.0).holds
    assert not items.Item("NaN", 1.0, math.nan).holds


def test_both_plain_losses_are_the_cross_entropy() -> None:
    logits, labels = torch.randn(5, 7, dtype=torch.float64), torch.tensor([0, 6, 3, 3, 1])
    by_hand = [
        math.log(sum(math.exp(z) for z in row)) - row[label] for row, label in zip(logits.tolist(), labels, strict=True)
    ]
    for losses in (log_softmax_losses, plain_cross_entropy_losses):
        assert losses(logits, labels).tolist() == pytest.approx(by_hand)


def test_the_table_shows_the_worst_step_and_the_verdict() -> None:
    good = items.Item("loss", 1e-6, 1e-8, "near", step=1)
    lines = table([good, replace(good, seen=2e-6, note="far", step=2), items.Item("tokens", 0.0, 0.0, "12")])
    assert lines[0].split() == ["item", "expected", "seen", "verdict", "about"]
    assert lines[1].split() == ["loss", "≤", "1.0e-06", "2.0e-06", "FALLS", "SHORT", "step", "2:", "far"]
    assert lines[2].split() == ["tokens", "equal", "equal", "holds", "12"]
    certificate = Certificate((good, replace(good, seen=math.nan)), None, (1,), "float64 on cpu")
    assert certificate.verdict == "falls short"
    assert json.dumps([item.seen for item in certificate.items])
