"""The Triton kernel against float64, run by Triton's interpreter on a CPU; started by test_triton_pass.py.

The interpreter has to be asked for before Triton is first imported, so these tests have a process of their own. What a
GPU adds, approximate exponentials and a division of the work among threads, they do not see.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from seqaware.objective import products, softmax_pass, triton_kernels
from seqaware.objective.cross_entropy import Head, plain_cross_entropy
from seqaware.objective.fused import fused_cross_entropy
from seqaware.objective.softmax_pass import KernelChoice
from seqaware.objective.sums import STATS
from tests.unit.objective.cases import Bounds, Case, Shape, assert_within, drawn_shapes, evaluate, exact, make_case

EPS32 = 2.0**-24
UNIT_ROUNDING = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}

few = settings(deadline=None, max_examples=15)


@pytest.fixture(autouse=True, scope="module")
def triton_everywhere() -> Iterator[None]:
    """The kernel on this CPU, in several blocks of columns that do not divide the vocabulary."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(softmax_pass, "choose_kernel", lambda device, wide: KernelChoice("triton", "a test"))
        patch.setattr(triton_kernels, "_MOST_COLUMNS", 16)
        yield


@few
@given(
    shape=drawn_shapes(most_rows=14),
    chunk_rows=st.sampled_from([None, 1, 5]),
)
def test_equals_float64_up_to_rounding(shape: Shape, chunk_rows: int | None) -> None:
    case = make_case(shape, torch.float32)
    ours = evaluate(fused_cross_entropy, case, chunk_rows=chunk_rows, factor=0.01)
    plain, bounds = exact(case, factor=0.01), Bounds.of(case, EPS32, factor=0.01)
    assert_within(ours, plain, bounds)
    # A sum of log-sums and of their squares is off by what the losses are, times the size of a log-sum.
    largest = 1.0 + plain.stats[STATS.index("logsumexp")].abs().item()
    torch.testing.assert_close(ours.stats, plain.stats, rtol=1e-6, atol=2 * largest * bounds.loss)
    assert ours.loss.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("softcap", "bias"), [(None, False), (4.0, True)])
def test_narrow_gradients_are_right_up_to_their_rounding(
    dtype: torch.dtype, softcap: float | None, bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(products, "_cpu_multiplies", lambda dtype: True)
    case = make_case(Shape(rows=30, vocabulary=121, softcap=softcap, scale=0.5, bias=bias), dtype)
    ours = evaluate(fused_cross_entropy, case, chunk_rows=8, factor=0.01)
    eps = UNIT_ROUNDING[dtype]
    assert_within(ours, exact(case, factor=0.01), Bounds.of(case, eps, factor=0.01), rounding=2.01 * eps)
    assert [gradient.dtype for gradient in ours.gradients] == [dtype] * len(ours.gradients)


def test_rows_without_weight_cost_nothing_and_are_counted() -> None:
    case = make_case(Shape(rows=25, zero_weight=0.5, ignored=0.3), torch.float32)
    seen: list[int] = []
    whole = triton_kernels.rows_pass

    def counted(logits: torch.Tensor, *rest: Any, **named: Any) -> None:
        seen.append(len(logits))
        whole(logits, *rest, **named)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(triton_kernels, "rows_pass", counted)
        ours = evaluate(fused_cross_entropy, case, chunk_rows=7)
    scored = int(((case.labels != -100) & (case.weights != 0)).sum())
    assert sum(seen) == scored < 25
    assert ours.stats[STATS.index("scored_tokens")] == scored
    assert ours.stats[STATS.index("supervised_tokens")] == int((case.labels != -100).sum()) > scored


@pytest.mark.parametrize("rows", [0, 9])
def test_nothing_to_score_gives_zeros_that_are_there(rows: int) -> None:
    case = make_case(Shape(rows=rows, ignored=1.0, bias=True), torch.float32)
    for given_rows in (None, torch.zeros(0, dtype=torch.int64)):
        ours = evaluate(fused_cross_entropy, case, rows=given_rows)
        assert ours.loss.item() == 0.0 and not ours.stats.any()
        assert not any(gradient.any() for gradient in ours.gradients)


def test_without_gradients_nothing_is_written_over_the_logits() -> None:
    case = make_case(Shape(rows=12), torch.float32)
    with torch.no_grad():
        loss, stats = fused_cross_entropy(case.hidden, head=case.head, labels_N=case.labels, weights_N=case.weights)
    ours = evaluate(fused_cross_entropy, case)
    assert loss.item() == ours.loss.item() and torch.equal(stats, ours.stats)


def test_losses_stay_finite_and_exact_at_extreme_logits() -> None:
    hidden = torch.tensor([[1e4], [-1e4]], requires_grad=True)
    weight = torch.zeros(40, 1)
    weight[0], weight[1] = 1.0, -1.0
    case = Case(hidden, Head(weight.requires_grad_()), torch.tensor([0, 0]), torch.ones(2))
    ours = evaluate(fused_cross_entropy, case)
    assert ours.loss.item() == 2e4  # certain and right, then certain and wrong
    assert all(torch.isfinite(gradient).all() for gradient in ours.gradients)


def test_words_that_are_ruled_out_take_no_part() -> None:
    """Whole blocks of −∞, the first one too, and a finite answer; a NaN is not hidden."""
    logits = torch.full((2, 64), -math.inf)[:, :40]
    logits[0, 20], logits[0, 37] = 1.0, 1.0
    logits[1, :] = math.nan
    losses, logsumexp, correct = torch.zeros(2), torch.zeros(2), torch.zeros(2, dtype=torch.uint8)
    gradient = torch.full((2, 64), 7.0)
    rows = (torch.tensor([20, 0]), torch.ones(2), losses, logsumexp, correct)
    triton_kernels.rows_pass(logits, gradient[:, :40], bias_V=None, scale=1.0, softcap=None, rows=rows)
    assert losses[0].item() == pytest.approx(math.log(2.0), abs=2 * EPS32) and math.isnan(losses[1])
    expected = torch.zeros(40)
    expected[20], expected[37] = -0.5, 0.5
    torch.testing.assert_close(gradient[0, :40], expected)
    assert (gradient[:, 48:] == 7.0).all()  # behind the last piece of 16 columns nothing is touched


def test_a_tie_counts_as_correct() -> None:
    head = Head(torch.tensor([[1.0], [1.0], [0.0]]))
    for loss in (fused_cross_entropy, plain_cross_entropy):
        _, stats = loss(torch.ones(3, 1), head=head, labels_N=torch.tensor([0, 1, 2]), weights_N=torch.ones(3))
        assert stats[STATS.index("correct")] == 2.0


def test_the_trial_is_right_here() -> None:
    assert softmax_pass._trial_is_right(torch.device("cpu"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(triton_kernels, "rows_pass", lambda *given, **named: None)
        assert not softmax_pass._trial_is_right(torch.device("cpu"))
