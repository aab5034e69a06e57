"""The products of a head in narrow dtypes: what this machine does by itself, and what another one would do."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from seqaware.objective import products
from seqaware.objective.fused import fused_cross_entropy
from tests.unit.objective.cases import Bounds, Case, Shape, assert_within, evaluate, exact, make_case

UNIT_ROUNDING = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
NARROW = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)


@pytest.fixture
def narrow_arithmetic(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A CPU that multiplies narrow operands; one without such arithmetic emulates it, slowly and correctly."""
    monkeypatch.setattr(products, "_cpu_multiplies", lambda dtype: True)
    yield


def on_gpu(case: Case) -> Case:
    head = case.head
    weight, hidden = (x.detach().cuda().requires_grad_() for x in (head.weight, case.hidden))
    moved = type(head)(weight, scale=head.scale, softcap=head.softcap)
    return Case(hidden, moved, case.labels.cuda(), case.weights.cuda())


@NARROW
@pytest.mark.parametrize("softcap", [None, 4.0])
@pytest.mark.usefixtures("narrow_arithmetic")
def test_narrow_products_are_right_up_to_their_rounding(dtype: torch.dtype, softcap: float | None) -> None:
    case = make_case(Shape(rows=40, vocabulary=20, softcap=softcap, scale=0.5), dtype)
    ours = evaluate(fused_cross_entropy, case, chunk_rows=8, factor=0.01)
    eps = UNIT_ROUNDING[dtype]
    assert_within(ours, exact(case, factor=0.01), Bounds.of(case, eps, factor=0.01), rounding=2.01 * eps)


@pytest.mark.usefixtures("narrow_arithmetic")
def test_the_weight_gradient_is_added_up_in_float32() -> None:
    """One row at a time, 512 equal contributions: a bfloat16 sum would stop growing at 256 of them."""
    rows = 512
    hidden = torch.ones(rows, 1, dtype=torch.bfloat16)
    head = make_case(Shape(hidden=1, vocabulary=2), torch.bfloat16).head
    head.weight.data.zero_()
    case = Case(hidden.requires_grad_(), head, torch.zeros(rows, dtype=torch.int64), torch.ones(rows))
    _, weight_gradient = evaluate(fused_cross_entropy, case, chunk_rows=1).gradients
    # p = ½ for both words: −½ and ½ a row, exact in every dtype.
    assert weight_gradient.flatten().tolist() == [-rows / 2, rows / 2]


@pytest.mark.parametrize("wide_result", [False, True])
def test_a_gpu_multiplies_the_last_words_of_an_odd_vocabulary_by_themselves(
    wide_result: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a GPU's products acted out in float64: each word is multiplied once, and everything is rounded once."""
    words: list[int] = []

    def mm(left: torch.Tensor, right: torch.Tensor, *, out: torch.Tensor, out_dtype: torch.dtype) -> torch.Tensor:
        words.append(right.shape[1])
        return out.copy_((left.double() @ right.double()).to(out_dtype))

    def addmm(total: torch.Tensor, left: torch.Tensor, right: torch.Tensor, **named: Any) -> torch.Tensor:
        return named["out"].copy_((total.double() + left.double() @ right.double()).to(named["out_dtype"]))

    draw = torch.Generator().manual_seed(0)
    weight, hidden, grad_logits = (
        torch.randn(shape, generator=draw).bfloat16() for shape in ((21, 6), (5, 6), (5, 21))
    )
    exact_weight, exact_hidden, exact_logits = (each.double() for each in (weight, hidden, grad_logits))
    monkeypatch.setattr(products, "operand_dtype", lambda dtype, device: dtype)
    monkeypatch.setattr(products, "rounds_products", lambda dtype, device: False)
    monkeypatch.setattr(torch, "mm", mm)
    monkeypatch.setattr(torch, "addmm", addmm)
    head = products.HeadProducts(weight, chunk_rows=5)
    logits, sums = torch.empty(5, 32)[:, :21], torch.empty(21, 6)
    head.logits(hidden, out_CV=logits)
    assert words == [16, 5] and torch.equal(logits, (exact_hidden @ exact_weight.T).float())
    result = torch.empty(5, 6, dtype=torch.float32 if wide_result else torch.bfloat16)
    head.hidden_gradient(grad_logits, out_CH=result)
    torch.testing.assert_close(result, (exact_logits @ exact_weight).float().to(result.dtype), rtol=2e-7, atol=1e-6)
    head.add_weight_gradient(grad_logits, hidden, sum_VH=sums, first=True)
    head.add_weight_gradient(grad_logits, hidden, sum_VH=sums)
    torch.testing.assert_close(sums, (2 * exact_logits.T @ exact_hidden).float(), rtol=2e-7, atol=1e-6)


@pytest.mark.parametrize("weight", [2.0**-30, 2.0**14])
@pytest.mark.usefixtures("narrow_arithmetic")
def test_float16_gradients_wait_for_the_loss_scale(weight: float) -> None:
    """Gradients that float16 could not hold before the backward's factor, and can after it."""
    case = make_case(Shape(rows=40, ignored=0.0, zero_weight=0.0), torch.float16)
    case = Case(case.hidden, case.head, case.labels, torch.full((40,), weight))
    ours, reference = (evaluate_at(case, weight) for evaluate_at in (_fused_at, _exact_at))
    unit = Case(case.hidden, case.head, case.labels, torch.ones(40))
    # Times 1 / weight, both are the gradients at weight 1; their own rounding to float16 and its smallest step remain.
    for got, want in zip(ours, reference, strict=True):
        error = (got.double() - want).abs() - 2 * UNIT_ROUNDING[torch.float16] * want.abs()
        bounds = Bounds.of(unit, UNIT_ROUNDING[torch.float16])
        assert error.max().item() <= max(bounds.hidden, bounds.weight)
        assert want.abs().max().item() > 0.1  # far from nothing: a flush to zero would show


def test_operands_are_widened_where_the_cpu_cannot_multiply_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "_cpu_multiplies", lambda dtype: False)
    assert products.operand_dtype(torch.bfloat16, torch.device("cpu")) == torch.float32
    assert products.operand_dtype(torch.float64, torch.device("cpu")) == torch.float64
    assert products.operand_dtype(torch.bfloat16, torch.device("cuda")) == torch.bfloat16


@NARROW
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_narrow_products_on_a_gpu(dtype: torch.dtype) -> None:
    case = on_gpu(make_case(Shape(rows=200, hidden=64, vocabulary=512), dtype))
    ours = evaluate(fused_cross_entropy, case, chunk_rows=64, factor=0.01)
    eps = UNIT_ROUNDING[dtype]
    assert_within(ours, exact(case, factor=0.01), Bounds.of(case, eps, factor=0.01), rounding=2.01 * eps)


def _fused_at(case: Case, weight: float) -> tuple[torch.Tensor, ...]:
    return evaluate(fused_cross_entropy, case, factor=1.0 / weight).gradients


def _exact_at(case: Case, weight: float) -> tuple[torch.Tensor, ...]:
    return exact(case, factor=1.0 / weight).gradients
