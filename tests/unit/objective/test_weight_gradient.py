"""A large head's gradient, narrow, lies in the bytes of its wide sum: the same numbers, and no byte beside."""

from __future__ import annotations

from itertools import accumulate

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from seqaware.objective import fused, weight_gradient
from seqaware.objective.fused import fused_cross_entropy
from seqaware.objective.weight_gradient import WeightGradient
from tests.unit.objective.cases import Bounds, Shape, assert_within, evaluate, exact, make_case

EPS_BF16 = 2.0**-8
WIDE = torch.float32


def filled(vocabulary: int, hidden: int, *, dtype: torch.dtype, large: bool = True) -> tuple[WeightGradient, Tensor]:
    """Parts that hold drawn numbers, and those numbers in one tensor."""
    numbers = torch.randn(vocabulary, hidden, generator=torch.Generator().manual_seed(0))
    gradient = WeightGradient(torch.empty(vocabulary, hidden, dtype=dtype), wide=WIDE, large=large)
    for words, part in gradient.parts:
        part.copy_(numbers[words])
    return gradient, numbers


@settings(deadline=None)
@given(
    vocabulary=st.integers(2, 70),
    hidden=st.integers(1, 9),
    piece=st.integers(1, 40),
    dtype=st.sampled_from([torch.bfloat16, torch.float16]),
)
def test_it_is_the_sum_times_the_factor_rounded_once(
    vocabulary: int, hidden: int, piece: int, dtype: torch.dtype
) -> None:
    gradient, numbers = filled(vocabulary, hidden, dtype=dtype)
    factor = torch.tensor(0.3)
    assert len(gradient.parts) == (2 if vocabulary >= 16 else 1)
    expected = (numbers * factor).to(dtype)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(weight_gradient, "_PIECE", piece)
        assert torch.equal(gradient.handed_on(factor, last=False), expected)
        assert torch.equal(torch.cat([part for _, part in gradient.parts]), numbers)
        assert torch.equal(gradient.handed_on(factor, last=True), expected)


def most_allocated(gradient: WeightGradient) -> int:
    """Bytes above what there was before, at their peak while the gradient is handed on, as torch's allocator has it."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        result = gradient.handed_on(torch.tensor(2.0), last=True)
    events = [each for each in profiled.profiler.kineto_results.events() if each.name() == "[memory]"]
    live = list(accumulate(each.nbytes() for each in sorted(events, key=lambda each: each.start_ns())))
    assert len(live) > 2 and result.dtype == torch.bfloat16
    return max(live)


def test_a_piece_and_no_more_is_held_beside_the_sum(monkeypatch: pytest.MonkeyPatch) -> None:
    piece, vocabulary, hidden = 512, 1003, 32
    monkeypatch.setattr(weight_gradient, "_PIECE", piece)
    gradient, _ = filled(vocabulary, hidden, dtype=torch.bfloat16)
    storages = {part.untyped_storage().data_ptr(): part.untyped_storage().nbytes() for _, part in gradient.parts}
    # The granule moves at most 16 words from one part to the other.
    assert sum(storages.values()) <= 4 * (vocabulary + 16) * hidden
    # One wide piece and its narrow copy, and scalars.
    assert most_allocated(gradient) <= (4 + 2) * piece + 256
    result = gradient.handed_on(torch.tensor(2.0), last=True)
    assert result.untyped_storage().nbytes() == 2 * vocabulary * hidden
    whole, _ = filled(vocabulary, hidden, dtype=torch.bfloat16, large=False)
    assert 2 * vocabulary * hidden <= most_allocated(whole) <= 2 * vocabulary * hidden + (4 + 2) * piece + 256


@pytest.mark.parametrize("rows", [20, 0])
def test_a_large_head_gets_the_gradients_of_any_other(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused, "_GPU_CHUNK_BYTES", 0)
    case = make_case(Shape(rows=20, vocabulary=50, bias=True, ignored=0.3 if rows else 1.0), torch.bfloat16)
    ours = evaluate(fused_cross_entropy, case, chunk_rows=7, factor=0.01)
    bounds = Bounds.of(case, EPS_BF16, factor=0.01)
    assert_within(ours, exact(case, factor=0.01), bounds, rounding=2.01 * EPS_BF16)


def test_it_may_be_asked_for_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused, "_GPU_CHUNK_BYTES", 0)
    case = make_case(Shape(vocabulary=50), torch.bfloat16)
    loss, _ = fused_cross_entropy(case.hidden, head=case.head, labels_N=case.labels, weights_N=case.weights)
    first = torch.autograd.grad(loss, case.inputs, retain_graph=True)
    second = torch.autograd.grad(loss, case.inputs)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    with pytest.raises(RuntimeError, match="a second time"):
        torch.autograd.grad(loss, case.inputs)
