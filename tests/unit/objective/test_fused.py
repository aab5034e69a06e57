"""The fused loss against the plain one, and what it promises beside: memory, rows not multiplied, nothing kept."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from seqaware.objective import fused, softmax_pass
from seqaware.objective.cross_entropy import Head, plain_cross_entropy
from seqaware.objective.fused import fused_cross_entropy
from seqaware.objective.products import operand_dtype
from seqaware.objective.sums import STATS
from seqaware.objective.weighting import Weighting
from tests.unit.objective.cases import Bounds, Case, Shape, assert_within, drawn_shapes, evaluate, exact, make_case

# A busy machine may halt a test anywhere: no deadline.
unhurried = settings(deadline=None)

# Unit roundings: half the distance from 1 to the next number.
EPS64, EPS32, EPS_BF16 = 2.0**-53, 2.0**-24, 2.0**-8

shapes = drawn_shapes(most_rows=40)
chunk_sizes = st.sampled_from([None, 1, 2, 7, 64])


class Recorder(TorchDispatchMode):
    """What the operations under it made and multiplied."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.largest = 0  # elements of the largest tensor that an operation returned
        self.left_operands: list[tuple[int, int]] = []  # shapes of the left operands of matrix products

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        # The weight's transpose and expanded scalars are views: they take no memory.
        owned = result if isinstance(result, Tensor) and result._base is None else None
        if owned is not None:
            self.largest = max(self.largest, owned.numel())
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm_):
            left = args[0] if func.overloadpacket is torch.ops.aten.mm else args[1]
            self.left_operands.append(tuple(left.shape))
        return result


@unhurried
@given(shape=shapes, chunk_rows=chunk_sizes)
def test_equals_the_plain_loss_in_float64(shape: Shape, chunk_rows: int | None) -> None:
    case = make_case(shape)
    ours, plain = evaluate(fused_cross_entropy, case, chunk_rows=chunk_rows), exact(case)
    bounds = Bounds.of(case, EPS64)
    assert_within(ours, plain, bounds)
    # Sums of at most `rows` terms, each off by at most what a weighted loss may be off by.
    torch.testing.assert_close(ours.stats, plain.stats, rtol=1e-12, atol=bounds.loss)


@pytest.mark.parametrize(
    ("dtype", "eps", "rounding"), [(torch.float32, EPS32, 0.0), (torch.bfloat16, EPS32, EPS_BF16)], ids=str
)
@unhurried
@given(shape=shapes, chunk_rows=chunk_sizes)
def test_equals_float64_up_to_rounding(
    dtype: torch.dtype, eps: float, rounding: float, shape: Shape, chunk_rows: int | None
) -> None:
    """A bfloat16 head is multiplied in float32 here, so only its gradients are rounded to bfloat16."""
    case = make_case(shape, dtype)
    if dtype == torch.bfloat16 and operand_dtype(dtype, case.hidden.device) == dtype:
        eps = EPS_BF16  # a CPU with bfloat16 arithmetic rounds logits and their gradient to it
    ours = evaluate(fused_cross_entropy, case, chunk_rows=chunk_rows, factor=0.01)
    bounds = Bounds.of(case, eps, factor=0.01)
    # dh is rounded when it is made and again when the backward multiplies it; to first order the two add.
    assert_within(ours, exact(case, factor=0.01), bounds, rounding=2.01 * rounding)
    assert [gradient.dtype for gradient in ours.gradients] == [dtype] * len(ours.gradients)
    assert ours.loss.dtype == torch.float32


@unhurried
@given(seed=st.integers(0, 10**6), rows=st.integers(1, 40))
def test_gamma_zero_is_the_cross_entropy_of_torch(seed: int, rows: int) -> None:
    case = make_case(Shape(rows=rows, seed=seed, zero_weight=0.0))
    k = (case.labels != -100).int()
    plain = Case(case.hidden, case.head, case.labels, Weighting(0.0).weights(k, k))
    loss = F.cross_entropy(case.hidden @ case.head.weight.T, case.labels, reduction="sum")
    expected = torch.autograd.grad(loss, case.inputs)
    ours = evaluate(fused_cross_entropy, plain)
    bounds = Bounds.of(plain, EPS64)
    assert abs(ours.loss - loss.detach()).item() <= bounds.loss
    for got, want, limit in zip(ours.gradients, expected, (bounds.hidden, bounds.weight), strict=True):
        assert (got - want).abs().max().item() <= limit
    uniform = evaluate(fused_cross_entropy, Case(*_parts(case), weights=Weighting(0.9, "uniform").weights(k, k)))
    assert all(torch.equal(a, b) for a, b in zip(ours.gradients, uniform.gradients, strict=True))
    assert torch.equal(ours.loss, uniform.loss)


@unhurried
@given(shape=shapes)
def test_weights_a_power_of_two_smaller_scale_everything_exactly(shape: Shape) -> None:
    case = make_case(shape, torch.float32)
    small = Case(*_parts(case), weights=case.weights / 64)
    whole, part = evaluate(fused_cross_entropy, case), evaluate(fused_cross_entropy, small)
    assert torch.equal(part.loss * 64, whole.loss)
    for got, want in zip(part.gradients, whole.gradients, strict=True):
        # Below the smallest normal number a division by 64 may lose bits; nothing this large is made of such terms.
        ordinary = want.abs() > 2.0**-60
        assert torch.equal(torch.where(ordinary, got * 64, 0.0), torch.where(ordinary, want, 0.0))


@unhurried
@given(shape=shapes, padding=st.integers(0, 20), data=st.data())
def test_order_and_padding_change_nothing(shape: Shape, padding: int, data: st.DataObject) -> None:
    case = make_case(shape)
    places = torch.tensor(data.draw(st.permutations(range(shape.rows + padding)))[: shape.rows])
    hidden = torch.full((shape.rows + padding, shape.hidden), 1e3, dtype=torch.float64)
    labels, weights = torch.full((len(hidden),), -100), torch.ones(len(hidden))
    hidden[places], labels[places], weights[places] = case.hidden.detach(), case.labels, case.weights
    moved = Case(hidden.requires_grad_(), case.head, labels, weights)
    ours, theirs = evaluate(fused_cross_entropy, case, chunk_rows=7), evaluate(fused_cross_entropy, moved, chunk_rows=5)
    bounds = Bounds.of(case, EPS64)
    of_hidden, *of_head = theirs.gradients
    assert_within(type(ours)(theirs.loss, theirs.stats, (of_hidden[places], *of_head)), ours, bounds)
    untouched = torch.ones(len(hidden), dtype=torch.bool)
    untouched[places] = False
    assert not of_hidden[untouched].any()


@pytest.mark.parametrize("given_rows", [False, True])
def test_rows_without_weight_are_never_multiplied(given_rows: bool) -> None:
    case = make_case(Shape(rows=50, zero_weight=0.6, ignored=0.2))
    rows = (case.labels != -100).nonzero().squeeze(1) if given_rows else None
    scored = int(((case.labels != -100) & (case.weights != 0)).sum())
    with Recorder() as recorder:
        ours = evaluate(fused_cross_entropy, case, rows=rows, chunk_rows=8)
    logits = [rows for rows, inner in recorder.left_operands if inner == 8 and rows <= 8]
    assert sum(logits) == scored < 50
    assert ours.stats[STATS.index("scored_tokens")] == scored
    assert ours.stats[STATS.index("supervised_tokens")] == int((case.labels != -100).sum()) > scored
    assert_within(ours, exact(case), Bounds.of(case, EPS64))


def test_rows_that_the_caller_vouches_for_are_taken_as_they_are() -> None:
    case = make_case(Shape(rows=50, zero_weight=0.0, ignored=0.2))
    rows = (case.labels != -100).nonzero().squeeze(1)
    looked, taken = (
        evaluate(fused_cross_entropy, case, rows=rows, weights_are_positive=vouched) for vouched in (False, True)
    )
    assert torch.equal(looked.loss, taken.loss) and torch.equal(looked.stats, taken.stats)
    assert all(torch.equal(a, b) for a, b in zip(looked.gradients, taken.gradients, strict=True))
    assert fused._scored_rows(case.labels, case.weights, rows, weights_are_positive=True) is rows


@pytest.mark.skipif(not torch.cuda.is_available(), reason="waiting for the device needs a device")
def test_on_a_gpu_only_rows_that_are_vouched_for_need_no_wait() -> None:
    labels, weights = torch.tensor([3, -100, 5, 7]).cuda(), torch.tensor([1.0, 1.0, 0.0, 2.0]).cuda()
    labelled, positive = torch.tensor([0, 2, 3]).cuda(), torch.tensor([0, 3]).cuda()
    found = fused._scored_rows(labels, weights, labelled, weights_are_positive=False)
    torch.cuda.set_sync_debug_mode("error")
    try:
        assert fused._scored_rows(labels, weights, positive, weights_are_positive=True) is positive
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert found is not None and found.tolist() == [0, 3]


def test_rows_of_the_caller_may_lie_anywhere() -> None:
    case = make_case(Shape(rows=30))
    rows = (case.labels != -100).nonzero().squeeze(1)
    ours = evaluate(fused_cross_entropy, case, rows=rows.flip(0), chunk_rows=4)
    assert_within(ours, exact(case), Bounds.of(case, EPS64))


@pytest.mark.parametrize("softcap", [None, 5.0])
def test_no_tensor_is_larger_than_a_chunk_or_the_weight(softcap: float | None) -> None:
    shape = Shape(rows=64, hidden=4, vocabulary=100, ignored=0.0, zero_weight=0.0, bias=True, softcap=softcap)
    case = make_case(shape, torch.float32)
    with Recorder() as recorder:
        evaluate(fused_cross_entropy, case, chunk_rows=8)
    assert recorder.largest == 8 * shape.vocabulary
    with Recorder() as recorder:
        evaluate(plain_cross_entropy, case)
    assert recorder.largest == shape.rows * shape.vocabulary  # the recorder does see what it looks for


@pytest.mark.parametrize(
    ("vocabulary", "hidden", "rows"), [(32_000, 512, 524), (152_064, 512, 512), (152_064, 8192, 4096)]
)
def test_chunks_are_bounded_by_the_budget_or_the_gradient(vocabulary: int, hidden: int, rows: int) -> None:
    weight = torch.empty(1, 1).expand(vocabulary, hidden)  # a shape that takes no memory
    assert fused._most_chunk_rows(weight) == rows


def test_blocks_of_a_chunk_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    case = make_case(Shape(rows=40, vocabulary=30, bias=True, softcap=4.0, scale=0.5))
    whole = evaluate(fused_cross_entropy, case, chunk_rows=16)
    monkeypatch.setattr(softmax_pass, "_CPU_BLOCK_BYTES", 3 * 4 * 30)  # 3 rows, which do not divide a chunk
    parts = evaluate(fused_cross_entropy, case, chunk_rows=16)
    assert torch.equal(parts.loss, whole.loss) and torch.equal(parts.stats, whole.stats)
    assert all(torch.equal(a, b) for a, b in zip(parts.gradients, whole.gradients, strict=True))


@pytest.mark.parametrize("loss", [fused_cross_entropy, plain_cross_entropy])
def test_a_tie_counts_as_correct(loss: Any) -> None:
    head = Head(torch.tensor([[1.0], [1.0], [0.0]]))
    _, stats = loss(torch.ones(3, 1), head=head, labels_N=torch.tensor([0, 1, 2]), weights_N=torch.ones(3))
    assert stats[STATS.index("correct")] == 2.0


def test_only_wanted_products_are_made() -> None:
    case = make_case(Shape(rows=16, ignored=0.0, zero_weight=0.0, bias=True))
    frozen = Head(case.head.weight.detach(), case.head.bias.detach() if case.head.bias is not None else None)
    with Recorder() as recorder:
        loss, _ = _call(Case(case.hidden, frozen, case.labels, case.weights))
    assert len(recorder.left_operands) == 2 and loss.requires_grad
    with Recorder() as recorder:
        loss, _ = _call(Case(case.hidden.detach(), case.head, case.labels, case.weights))
    assert len(recorder.left_operands) == 2 and loss.requires_grad
    with Recorder() as recorder, torch.no_grad():
        loss, stats = _call(case)
    assert len(recorder.left_operands) == 1 and not loss.requires_grad
    assert loss.item() == _call(case)[0].item() and torch.equal(stats, _call(case)[1])
    bias = case.head.bias
    assert bias is not None
    (of_bias,) = torch.autograd.grad(_call(Case(case.hidden.detach(), case.head, case.labels, case.weights))[0], bias)
    limit = Bounds.of(case, EPS64).bias
    assert (of_bias - exact(case).gradients[2]).abs().max().item() <= limit


def test_tied_weight_gets_both_gradients() -> None:
    case = make_case(Shape(rows=12, hidden=6, vocabulary=12))
    weight, tokens = case.head.weight, torch.arange(12)

    def gradient(loss: Any) -> Tensor:
        value, _ = loss(weight[tokens].tanh(), head=Head(weight), labels_N=case.labels, weights_N=case.weights)
        return torch.autograd.grad(value, weight)[0]

    bounds = Bounds.of(Case(weight[tokens].tanh(), case.head, case.labels, case.weights), EPS64)
    error = (gradient(fused_cross_entropy) - gradient(plain_cross_entropy)).abs().max().item()
    assert error <= bounds.weight + bounds.hidden


@pytest.mark.parametrize("rows", [0, 9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nothing_to_score_gives_zeros_that_are_there(rows: int, dtype: torch.dtype) -> None:
    case = make_case(Shape(rows=rows, ignored=1.0, bias=True), dtype)
    for given_rows in (None, torch.zeros(0, dtype=torch.int64)):
        ours = evaluate(fused_cross_entropy, case, rows=given_rows)
        assert ours.loss.item() == 0.0 and not ours.stats.any()
        assert [g.shape for g in ours.gradients] == [x.shape for x in case.inputs]
        assert not any(gradient.any() for gradient in ours.gradients)


def test_the_weight_may_be_gone_when_the_backward_runs() -> None:
    """A ZeRO-3 parameter is whole in the forward only: its memory is overwritten here before the backward."""
    case = make_case(Shape(rows=20))
    expected = evaluate(fused_cross_entropy, case)
    loss, _ = _call(case)
    with torch.no_grad():
        case.head.weight.data.fill_(float("nan"))
    gradients = torch.autograd.grad(loss, case.inputs)
    assert all(torch.equal(a, b) for a, b in zip(gradients, expected.gradients, strict=True))


def test_backward_twice_gives_the_same() -> None:
    case = make_case(Shape())
    loss, _ = _call(case)
    first = torch.autograd.grad(loss, case.inputs, retain_graph=True)
    second = torch.autograd.grad(loss, case.inputs)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_losses_stay_finite_and_exact_at_extreme_logits() -> None:
    hidden = torch.tensor([[1e4], [-1e4]], requires_grad=True)
    head = Head(torch.tensor([[1.0], [-1.0], [0.0]], requires_grad=True))
    case = Case(hidden, head, torch.tensor([0, 0]), torch.ones(2))
    ours = evaluate(fused_cross_entropy, case)
    assert ours.loss.item() == 2e4  # certain and right, then certain and wrong
    assert all(torch.isfinite(gradient).all() for gradient in ours.gradients)


def _parts(case: Case) -> tuple[Tensor, Head, Tensor]:
    return case.hidden, case.head, case.labels


def _call(case: Case) -> tuple[Tensor, Tensor]:
    return fused_cross_entropy(case.hidden, head=case.head, labels_N=case.labels, weights_N=case.weights)
