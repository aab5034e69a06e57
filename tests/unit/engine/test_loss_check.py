"""The check before the first step lets every head and dtype through, and no wrong kernel."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from seqaware.engine import loss_check
from seqaware.models.model import LossTargets
from seqaware.objective.cross_entropy import IGNORED_LABEL, Head
from seqaware.objective.fused import fused_cross_entropy

ROWS, HIDDEN, VOCABULARY = 100, 48, 211
HEADS = {
    "plain": {},
    "bias": {"bias": torch.linspace(-1.0, 1.0, VOCABULARY)},
    "scaled": {"scale": 0.25},
    "capped": {"softcap": 5.0},
}


def _compare(dtype: torch.dtype = torch.float32, *, loud: float = 1.0, **of_head: Any) -> loss_check.LossComparison:
    """A micro-batch of 100 places, two thirds of them with loss; hidden states as large as trained models have them."""
    generator = torch.Generator().manual_seed(0)
    hidden = loud * torch.randn(ROWS, HIDDEN, generator=generator)
    weight = torch.randn(VOCABULARY, HIDDEN, generator=generator) / HIDDEN**0.5
    # A part that all rows share, as trained heads have: softmax does not see it, rounding does.
    weight += torch.randn(1, HIDDEN, generator=generator) / HIDDEN**0.5
    labels = torch.randint(0, VOCABULARY, (1, ROWS), generator=generator)
    labels[:, ::3] = IGNORED_LABEL
    weights = torch.where(labels == IGNORED_LABEL, 0.0, 1.0 + torch.arange(ROWS))
    targets = LossTargets(labels, weights, (labels.flatten() != IGNORED_LABEL).nonzero().squeeze(1), True)
    head = Head(weight.to(dtype), **{k: v.to(dtype) if isinstance(v, Tensor) else v for k, v in of_head.items()})
    return loss_check._compare(hidden.to(dtype), targets, head)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("head", sorted(HEADS))
@pytest.mark.parametrize("loud", [0.1, 1.0, 10.0])
def test_the_fused_loss_is_the_plain_one(dtype: torch.dtype, head: str, loud: float) -> None:
    seen = _compare(dtype, loud=loud, **HEADS[head])
    assert seen.tokens == 64
    assert seen.holds, seen


def test_a_rank_without_loss_has_nothing_to_compare() -> None:
    hidden = torch.randn(4, HIDDEN)
    nothing = LossTargets(torch.full((1, 4), IGNORED_LABEL), torch.zeros(1, 4), torch.zeros(0, dtype=torch.int64), True)
    seen = loss_check._compare(hidden, nothing, Head(torch.randn(VOCABULARY, HIDDEN)))
    assert seen.tokens == 0 and seen.holds


def _loss_without_the_last(hidden: Tensor, **options: Any) -> Any:
    return fused_cross_entropy(hidden, **{**options, "rows": options["rows"][:-1]})


def _loss_of_weights_one_place_on(hidden: Tensor, **options: Any) -> Any:
    return fused_cross_entropy(hidden, **{**options, "weights_N": options["weights_N"].roll(1)})


def _gradient_of_weight_one(hidden: Tensor, **options: Any) -> Any:
    loss, stats = fused_cross_entropy(hidden, **options)
    flat, _ = fused_cross_entropy(hidden, **{**options, "weights_N": torch.ones_like(options["weights_N"])})
    return loss.detach() + flat - flat.detach(), stats


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "wrong", [_loss_without_the_last, _loss_of_weights_one_place_on, _gradient_of_weight_one], ids=lambda f: f.__name__
)
def test_a_wrong_kernel_is_found(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, wrong: Callable[..., Any]
) -> None:
    monkeypatch.setattr(loss_check, "fused_cross_entropy", wrong)
    assert not _compare(dtype).holds
