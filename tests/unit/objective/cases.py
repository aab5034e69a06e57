"""A random head with rows to score, the gradients of a loss over it, and bounds derived from a dtype's rounding."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

from seqaware.objective import fused
from seqaware.objective.cross_entropy import Head, plain_cross_entropy
from seqaware.objective.sums import LossStats

Loss = Callable[..., tuple[Tensor, LossStats]]


@dataclass(frozen=True)
class Shape:
    """What a case is made of. Rows, hidden size and vocabulary are small: the algebra does not depend on them."""

    rows: int = 20
    hidden: int = 8
    vocabulary: int = 30
    bias: bool = False
    scale: float = 1.0
    softcap: float | None = None
    ignored: float = 0.3  # share of rows without a label
    zero_weight: float = 0.3  # share of rows with weight 0
    seed: int = 0


def drawn_shapes(*, most_rows: int) -> st.SearchStrategy[Shape]:
    """Every kind of head and of rows, for hypothesis."""
    return st.builds(
        Shape,
        rows=st.integers(1, most_rows),
        hidden=st.integers(1, 16),
        vocabulary=st.integers(2, 50),
        bias=st.booleans(),
        scale=st.sampled_from([1.0, 0.25, 1.7]),
        softcap=st.sampled_from([None, 3.0, 30.0]),
        ignored=st.sampled_from([0.0, 0.3, 1.0]),
        zero_weight=st.sampled_from([0.0, 0.6]),
        seed=st.integers(0, 10**6),
    )


@dataclass(frozen=True, eq=False)
class Case:
    """Inputs of a loss; hidden and head require a gradient."""

    hidden: Tensor
    head: Head
    labels: Tensor
    weights: Tensor

    @property
    def inputs(self) -> tuple[Tensor, ...]:
        given = (self.hidden, self.head.weight, self.head.bias)
        return tuple(tensor for tensor in given if tensor is not None)

    def to(self, dtype: torch.dtype) -> Case:
        """The same values in another dtype."""
        hidden, weight = (x.detach().to(dtype).requires_grad_() for x in (self.hidden, self.head.weight))
        bias = None if self.head.bias is None else self.head.bias.detach().to(dtype).requires_grad_()
        head = Head(weight, bias, scale=self.head.scale, softcap=self.head.softcap)
        return Case(hidden, head, self.labels, self.weights)


@dataclass(frozen=True, eq=False)
class Outcome:
    loss: Tensor
    stats: LossStats
    gradients: tuple[Tensor, ...]


def make_case(shape: Shape, dtype: torch.dtype = torch.float64) -> Case:
    generator = torch.Generator().manual_seed(shape.seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator).to(dtype).requires_grad_()

    labels = torch.randint(0, shape.vocabulary, (shape.rows,), generator=generator)
    labels[torch.rand(shape.rows, generator=generator) < shape.ignored] = -100
    weights = 1.0 + 49.0 * torch.rand(shape.rows, generator=generator)
    weights[torch.rand(shape.rows, generator=generator) < shape.zero_weight] = 0.0
    head = Head(
        normal(shape.vocabulary, shape.hidden),
        normal(shape.vocabulary) if shape.bias else None,
        scale=shape.scale,
        softcap=shape.softcap,
    )
    return Case(normal(shape.rows, shape.hidden), head, labels, weights)


def evaluate(
    loss: Loss, case: Case, *, factor: float = 1.0, chunk_rows: int | None = None, **options: object
) -> Outcome:
    """Loss, statistics and the gradients of factor · loss; chunk_rows: at most so many rows in a chunk of ours."""
    with pytest.MonkeyPatch.context() as patch:
        if chunk_rows is not None:
            patch.setattr(fused, "_most_chunk_rows", lambda weight: chunk_rows)
        value, stats = loss(case.hidden, head=case.head, labels_N=case.labels, weights_N=case.weights, **options)
    return Outcome(value.detach(), stats, torch.autograd.grad(value * factor, case.inputs))


def exact(case: Case, *, factor: float = 1.0) -> Outcome:
    """The plain loss on the same values in float64."""
    return evaluate(plain_cross_entropy, case.to(torch.float64), factor=factor)


@dataclass(frozen=True)
class Bounds:
    """Largest absolute error of a loss computed in arithmetic of relative rounding `eps`, to first order, doubled.

    dz_label of a row is an error of a logit: H products and a bias, each rounded, and tanh where there is a cap (its
    slope is at most 1). The softmax moves by at most twice the largest logit error, and its sum over V by V roundings.
    Sums of n terms add n roundings of the sum of magnitudes. First order holds while eps · terms ≪ 1, hence 2×.
    """

    loss: float
    hidden: float
    weight: float
    bias: float

    @classmethod
    def of(cls, case: Case, eps: float, *, factor: float = 1.0) -> Bounds:
        """Bounds for gradients of factor · loss; the factor itself and its product are rounded too."""
        wide = case.to(torch.float64)
        hidden, weight = wide.hidden.detach().abs(), wide.head.weight.detach().abs()
        rows, width, vocabulary = len(hidden), hidden.shape[1], len(weight)
        bias = 0.0 if wide.head.bias is None else wide.head.bias.detach().abs().max().item()
        scale, cap = abs(wide.head.scale), wide.head.softcap
        magnitude = scale * ((hidden @ weight.T).max().item() + bias)
        logit = eps * (width + 4) * magnitude + (0.0 if cap is None else 4 * eps * cap)
        slope = 0.0 if cap is None else 2 * logit / cap + 4 * eps
        gradient = scale * (2 * logit + (vocabulary + 10) * eps + slope)  # of dz / w, whose magnitude is at most scale
        largest, total = wide.weights.max().item(), wide.weights.sum().item()
        per_row = 2 * logit + (vocabulary + 8) * eps * (1 + magnitude)
        return cls(
            loss=2 * total * (per_row + rows * eps * (2 * magnitude + vocabulary)),
            hidden=2 * factor * largest * weight.max().item() * vocabulary * (gradient + vocabulary * eps * scale),
            weight=2 * factor * total * hidden.max().item() * (gradient + (rows + 2) * eps * scale),
            bias=2 * factor * total * (gradient + (rows + 2) * eps * scale),
        )


def assert_within(actual: Outcome, expected: Outcome, bounds: Bounds, *, rounding: float = 0.0) -> None:
    """Loss and gradients within the bounds; `rounding` is the relative error of a gradient's own dtype."""
    limits = (bounds.hidden, bounds.weight, bounds.bias)
    assert abs(actual.loss.double() - expected.loss.double()).item() <= bounds.loss
    for got, want, limit in zip(actual.gradients, expected.gradients, limits, strict=False):
        error = (got.double() - want.double()).abs() - rounding * want.double().abs()
        assert error.max().item() <= limit, (error.max().item(), limit)
