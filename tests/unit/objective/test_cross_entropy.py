"""The plain weighted cross-entropy: bitwise torch's where the weights are 1, and exact in its scaling."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from seqaware.objective.cross_entropy import Head, cross_entropy_from_logits, plain_cross_entropy
from seqaware.objective.sums import STATS
from seqaware.objective.weighting import Weighting

# A busy machine may halt a test anywhere: no deadline.
unhurried = settings(deadline=None)


def case(seed: int, rows: int = 23, vocabulary: int = 17) -> tuple[Tensor, Tensor, Tensor]:
    """Logits that require a gradient, labels with some ignored, positions 1 … rows (0 where ignored)."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(rows, vocabulary, generator=generator) * 3.0
    labels = torch.randint(0, vocabulary, (rows,), generator=generator)
    labels[torch.rand(rows, generator=generator) < 0.3] = -100
    k = torch.arange(1, rows + 1) * (labels != -100)
    return logits.requires_grad_(), labels, k


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@unhurried
@given(seed=st.integers(0, 10**6), rows=st.integers(1, 80))
def test_gamma_zero_is_bitwise_plain_cross_entropy(dtype: torch.dtype, seed: int, rows: int) -> None:
    logits, labels, k = case(seed, rows)
    logits = logits.detach().to(dtype).requires_grad_()
    weights = Weighting(0.0).weights(k, torch.full_like(k, rows))
    wide = torch.promote_types(dtype, torch.float32)
    loss, stats = cross_entropy_from_logits(logits, labels, weights)
    expected = F.cross_entropy(logits.to(wide), labels, reduction="none").sum()
    assert loss.dtype == wide and loss.ndim == 0
    assert torch.equal(loss, expected)
    (gradient,) = torch.autograd.grad(loss, logits)
    (expected_gradient,) = torch.autograd.grad(F.cross_entropy(logits.to(wide), labels, reduction="sum"), logits)
    assert torch.equal(gradient, expected_gradient)
    assert stats[STATS.index("weighted_loss")] == stats[STATS.index("loss")]


@unhurried
@given(seed=st.integers(0, 10**6), gamma=st.floats(0.0, 1.0))
def test_weights_a_power_of_two_smaller_scale_everything_exactly(seed: int, gamma: float) -> None:
    logits, labels, k = case(seed)
    weights = Weighting(gamma).weights(k, k)
    loss, _ = cross_entropy_from_logits(logits, labels, weights)
    (gradient,) = torch.autograd.grad(loss, logits)
    small_loss, _ = cross_entropy_from_logits(logits, labels, weights / 64)
    (small_gradient,) = torch.autograd.grad(small_loss, logits)
    assert torch.equal(small_loss * 64, loss)
    assert torch.equal(small_gradient * 64, gradient)


def test_statistics_are_those_of_the_rows_that_carry_loss() -> None:
    logits = torch.tensor([[2.0, 0.0], [0.0, 1.0], [3.0, 0.0], [0.0, 5.0]], dtype=torch.float64)
    labels, weights = torch.tensor([0, 0, 0, -100]), torch.tensor([2.0, 0.5, 0.0, 9.0])
    loss, stats = cross_entropy_from_logits(logits, labels, weights)
    logsumexp = torch.tensor([2.0, 1.0], dtype=torch.float64).exp().add(1.0).log()
    losses = logsumexp - torch.tensor([2.0, 0.0])
    expected = {
        "weighted_loss": (2.0 * losses[0] + 0.5 * losses[1]).item(),
        "loss": losses.sum().item(),
        "weight": 2.5,
        "supervised_tokens": 3.0,
        "scored_tokens": 2.0,
        "correct": 1.0,
        "logsumexp": logsumexp.sum().item(),
        "logsumexp_squared": logsumexp.square().sum().item(),
    }
    assert stats.tolist() == pytest.approx([expected[name] for name in STATS], rel=1e-14)
    assert loss.item() == pytest.approx(expected["weighted_loss"], rel=1e-14)
    assert not stats.requires_grad


def test_no_gradient_flows_into_the_weights() -> None:
    logits, labels, k = case(0)
    weights = k.float().requires_grad_()
    loss, _ = cross_entropy_from_logits(logits, labels, weights)
    of_logits, of_weights = torch.autograd.grad(loss, (logits, weights), allow_unused=True)
    assert of_logits is not None and of_weights is None


def test_head_logits() -> None:
    generator = torch.Generator().manual_seed(1)
    hidden, weight = (torch.randn(size, 4, generator=generator, dtype=torch.float64) for size in (3, 5))
    bias = torch.randn(5, generator=generator, dtype=torch.float64)
    head = Head(weight, bias, scale=0.25, softcap=2.0)
    expected = 2.0 * torch.tanh(0.25 * (hidden @ weight.T + bias) / 2.0)
    torch.testing.assert_close(head.logits(hidden), expected, rtol=1e-14, atol=1e-14)
    labels, weights = torch.tensor([0, 1, 2]), torch.ones(3)
    loss, _ = plain_cross_entropy(hidden, head=head, labels_N=labels, weights_N=weights)
    assert loss.item() == pytest.approx(F.cross_entropy(expected, labels, reduction="sum").item(), rel=1e-13)


@pytest.mark.parametrize("softcap", [0.0, -1.0])
def test_a_softcap_must_be_positive(softcap: float) -> None:
    with pytest.raises(ValueError, match="softcap must be positive"):
        Head(torch.zeros(2, 2), softcap=softcap)
