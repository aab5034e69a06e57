"""Intervals beside means: of counts by Wilson's score, of runs that differ in their seed by Student's t."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

# Two-sided 95 % quantiles of Student's t for 1, 2, … degrees of freedom; beyond them the first terms of its expansion.
_T95 = (
    *(12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131),
    *(2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042),
)
_Z95 = 1.959964


@dataclass(frozen=True)
class Mean:
    """A mean over runs. half: of the 95 % interval; None for a single run, NaN where a value is not finite."""

    value: float
    half: float | None
    runs: int

    def __str__(self) -> str:
        return f"{self.value:.4f}" if self.half is None else f"{self.value:.4f} ± {self.half:.4f}"

    @property
    def excludes_zero(self) -> bool:
        return self.half is not None and abs(self.value) > self.half


def mean(values: Sequence[float]) -> Mean:
    """The mean of runs and its 95 % interval: t · s / √n with n − 1 degrees of freedom."""
    n = len(values)
    if n < 2:
        return Mean(values[0] if n else math.nan, None, n)
    if not all(map(math.isfinite, values)):  # a run that diverged
        return Mean(sum(values) / n, math.nan, n)
    freedom = n - 1
    quantile = _T95[freedom - 1] if freedom <= len(_T95) else _Z95 + (_Z95**3 + _Z95) / (4 * freedom)
    return Mean(fmean(values), quantile * stdev(values) / math.sqrt(n), n)


def wilson(share: float, of: int) -> tuple[float, float]:
    """The 95 % score interval of a share of `of` answers (E. B. Wilson, 1927)."""
    if of == 0:
        return (0.0, 1.0)
    z2 = _Z95 * _Z95
    centre = (share + z2 / (2 * of)) / (1 + z2 / of)
    half = _Z95 * math.sqrt(share * (1 - share) / of + z2 / (4 * of * of)) / (1 + z2 / of)
    return (max(0.0, centre - half), min(1.0, centre + half))
