"""Weights by position: closed form against the literal sum of suffixes, scales, schemes, refusals."""

from __future__ import annotations

import itertools
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from seqaware.objective.weighting import Weighting, log_suffix_weight, resolve_scheme

# A busy machine may halt a test anywhere: no deadline.
unhurried = settings(deadline=None)

FLOAT32_ROUNDING = 2.0**-24  # relative error of one rounding to float32

discounts = st.one_of(st.sampled_from([0.0, 1e-300, 0.5, 0.9, 0.98, 1.0 - 2.0**-53, 1.0]), st.floats(0.0, 1.0))


def suffix_sum_weights(length: int, gamma: float) -> list[float]:
    """The coefficient of l_k in Σ_s Σ_{k≥s} γ^(k−s) l_k, added up literally: O(length²), Python floats."""
    weights = [0.0] * length
    for start in range(length):
        for k in range(start, length):
            weights[k] += gamma ** (k - start)
    return weights


def square_root(k: Tensor, length: Tensor) -> Tensor:
    """A user's scheme."""
    return (k / length).sqrt()


def one_too_many(k: Tensor, length: Tensor) -> Tensor:
    return torch.ones(k.numel() + 1)


def negative(k: Tensor, length: Tensor) -> Tensor:
    return -k.float()


def infinite(k: Tensor, length: Tensor) -> Tensor:
    return k / (length - length)


def not_a_tensor(k: Tensor, length: Tensor) -> float:
    return 1.0


NOT_CALLABLE = 3


@unhurried
@given(length=st.integers(1, 60), gamma=discounts)
def test_closed_form_is_the_sum_over_suffixes(length: int, gamma: float) -> None:
    weights = log_suffix_weight(torch.arange(1, length + 1), gamma)
    expected = torch.tensor(suffix_sum_weights(length, gamma), dtype=torch.float64)
    # One rounding to float32, and `length` additions and powers in float64 (relative 2^-53 each, all terms positive).
    torch.testing.assert_close(weights.double(), expected, rtol=FLOAT32_ROUNDING + 4 * length * 2.0**-53, atol=0.0)


def test_the_ends_of_the_range_are_exact() -> None:
    k = torch.arange(0, 5000, dtype=torch.int32)
    assert torch.equal(log_suffix_weight(k, 0.0), (k > 0).float())
    assert torch.equal(log_suffix_weight(k, 1.0), k.float())
    assert torch.equal(log_suffix_weight(torch.ones(1, dtype=torch.int32), 0.98), torch.ones(1))


@unhurried
@given(k=st.integers(1, 100_000), exponent=st.integers(20, 53))
def test_continuous_at_gamma_one(k: int, exponent: int) -> None:
    step = 2.0**-exponent
    weight = log_suffix_weight(torch.tensor([k]), 1.0 - step).item()
    # k − w_k = Σ_j (1 − γ^j) lies between 0 and Σ_j j·(1 − γ) = k(k−1)/2 · step.
    slack = k * FLOAT32_ROUNDING
    assert k - k * (k - 1) / 2 * step - slack <= weight <= k + slack


def test_positions_far_out_reach_the_horizon() -> None:
    weights = log_suffix_weight(torch.tensor([10**6]), 0.98)
    assert weights.item() == pytest.approx(50.0, rel=2 * FLOAT32_ROUNDING)


@unhurried
@given(length=st.integers(1, 60), gamma=st.floats(0.0, 1.0, exclude_max=True))
def test_horizon_multiplies_by_one_minus_gamma(length: int, gamma: float) -> None:
    k = torch.arange(1, length + 1)
    horizon = Weighting(gamma, scale="horizon").weights(k, torch.full_like(k, length))
    raw = Weighting(gamma).weights(k, torch.full_like(k, length))
    # Two roundings to float32, relative; below float32's normal numbers their spacing instead.
    torch.testing.assert_close(
        horizon.double(), raw.double() * (1.0 - gamma), rtol=4 * FLOAT32_ROUNDING, atol=2.0**-149
    )


def test_schemes() -> None:
    k, length = torch.tensor([[0, 1, 2], [3, 4, 0]]), torch.tensor([[0, 4, 4], [4, 4, 0]])
    assert Weighting(0.5, "uniform").weights(k, length).tolist() == [[0, 1, 1], [1, 1, 0]]
    assert Weighting(0.5, "linear").weights(k, length).tolist() == [[0, 0.25, 0.5], [0.75, 1, 0]]
    assert Weighting(0.5).weights(k, length).tolist() == [[0, 1, 1.5], [1.75, 1.875, 0]]
    named = Weighting(0.5, f"{__name__}:square_root").weights(k, length)
    assert torch.equal(named, Weighting(0.5, square_root).weights(k, length))
    assert named.flatten().tolist() == pytest.approx([0, 0.5, math.sqrt(0.5), math.sqrt(0.75), 1, 0], rel=1e-6)
    assert named.dtype == torch.float32


def test_token_weight_multiplies_in_after_the_scaling() -> None:
    k, offsets = torch.tensor([1, 2, 3, 0]), torch.tensor([0, 4])
    token_weight = torch.tensor([1.0, 0.0, 2.0, 5.0])
    weighting = Weighting(0.9, scale="mean_one")
    plain = weighting.weights(k, torch.full_like(k, 3), offsets)
    weighted = weighting.weights(k, torch.full_like(k, 3), offsets, token_weight=token_weight)
    assert torch.equal(weighted, plain * token_weight)


@unhurried
@given(
    documents=st.lists(st.lists(st.booleans(), max_size=30), min_size=1, max_size=8),
    gamma=discounts,
    scheme=st.sampled_from(["log_suffix", "linear", "uniform"]),
)
def test_mean_one_averages_one_in_every_sequence(documents: list[list[bool]], gamma: float, scheme: str) -> None:
    # Positions count supervised tokens; the first of a document has no predecessor, like everything without loss.
    counted = [[sum(flags[: i + 1]) if flag else 0 for i, flag in enumerate(flags)] for flags in documents]
    k = torch.tensor([position for document in counted for position in document], dtype=torch.int32)
    length = torch.tensor([max(document) for document in counted for _ in document], dtype=torch.int32)
    offsets = torch.tensor([0, *itertools.accumulate(map(len, documents))])
    weights = Weighting(gamma, scheme, scale="mean_one").weights(k, length, offsets)
    raw = Weighting(gamma, scheme).weights(k, length)
    assert torch.equal(weights == 0.0, k == 0)
    for start, stop in itertools.pairwise(offsets.tolist()):
        part, has_loss = weights[start:stop].double(), k[start:stop] > 0
        if has_loss.any():
            # The mean of values that were each rounded to float32 once.
            assert part[has_loss].mean().item() == pytest.approx(1.0, rel=2 * FLOAT32_ROUNDING)
            ratio = part[has_loss] / raw[start:stop][has_loss].double()
            torch.testing.assert_close(ratio, ratio[:1].expand_as(ratio), rtol=4 * FLOAT32_ROUNDING, atol=0.0)


def test_mean_one_of_uniform_weights_is_exactly_one() -> None:
    k, offsets = torch.tensor([1, 2, 3, 0, 1, 0, 0]), torch.tensor([0, 3, 3, 6, 7])
    for weighting in (Weighting(0.0, scale="mean_one"), Weighting(0.9, "uniform", scale="mean_one")):
        assert torch.equal(weighting.weights(k, torch.full_like(k, 3), offsets), (k > 0).float())


def test_a_sequence_does_not_feel_its_neighbours() -> None:
    k, length = torch.tensor([1, 2, 3, 4, 5]), torch.tensor([5] * 5)
    weighting = Weighting(0.98, scale="mean_one")
    alone = weighting.weights(k, length, torch.tensor([0, 5]))
    twice = weighting.weights(torch.cat((k[:2], k)), torch.cat((length[:2], length)), torch.tensor([0, 2, 7]))
    assert torch.equal(alone, twice[2:])


def test_all_zero_weights_of_a_sequence_stay_zero_under_mean_one() -> None:
    weighting = Weighting(0.9, lambda k, length: torch.zeros(k.shape), scale="mean_one")
    k = torch.tensor([1, 2])
    assert weighting.weights(k, k, torch.tensor([0, 2])).tolist() == [0.0, 0.0]


@pytest.mark.parametrize("gamma", [-0.1, 1.0001, math.nan, math.inf])
def test_gamma_outside_its_range_is_refused(gamma: float) -> None:
    with pytest.raises(ValueError, match=r"gamma must lie in \[0, 1\]"):
        Weighting(gamma)


@pytest.mark.parametrize(
    ("gamma", "scheme", "scale", "message"),
    [
        (1.0, "log_suffix", "horizon", "0 at gamma 1"),
        (0.9, "linear", "horizon", "belongs to scheme log_suffix"),
        (0.9, "log_suffix", "mean", "scale must be one of raw, horizon, mean_one"),
        (0.9, "quadratic", "raw", "log_suffix, linear, uniform, or module:function; got 'quadratic'"),
        (0.9, "no_such_module_here:f", "raw", "cannot import 'no_such_module_here'"),
        (0.9, f"{__name__}:nothing", "raw", "has no function 'nothing'"),
        (0.9, f"{__name__}:NOT_CALLABLE", "raw", "has no function 'NOT_CALLABLE'"),
    ],
)
def test_contradictions_are_refused_at_construction(gamma: float, scheme: str, scale: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Weighting(gamma, scheme, scale)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("one_too_many", r"tensor of k's shape \(3,\); got \(4,\)"),
        ("not_a_tensor", "got float"),
        ("negative", "negative or not finite"),
        ("infinite", "negative or not finite"),
    ],
)
def test_what_a_users_function_returns_is_checked(name: str, message: str) -> None:
    k = torch.tensor([1, 2, 3])
    with pytest.raises(ValueError, match=message):
        Weighting(0.9, f"{__name__}:{name}").weights(k, k)


def test_mean_one_asks_for_the_offsets() -> None:
    with pytest.raises(ValueError, match="sequence_offsets"):
        Weighting(0.9, scale="mean_one").weights(torch.tensor([1]), torch.tensor([1]))


def test_a_scheme_is_imported_once() -> None:
    assert resolve_scheme(f"{__name__}:square_root") is square_root


def test_a_scheme_is_found_in_the_working_directory(tmp_path: Path) -> None:
    """As under the launcher: a script in another folder, which Python searches in place of the working directory."""
    (tmp_path / "launcher").mkdir()
    # Names of a script beside the launcher's, and of a helper module that is installed too.
    (tmp_path / "launcher" / "weights.py").write_text("")
    (tmp_path / "weights.py").write_text("from packaging import one\ndef ones(k, length):\n    return k * 0.0 + one\n")
    (tmp_path / "packaging.py").write_text("one = 1.0\n")
    (tmp_path / "json.py").write_text("def ones(k, length):\n    return k * 0.0 + 1\n")
    (tmp_path / "launcher" / "train.py").write_text(
        "import os, sys\n"
        f"sys.path.append({str(Path(__file__).resolve().parents[3])!r})\n"
        "from seqaware.objective.weighting import Weighting\n"
        "import torch\n"
        "before = list(sys.path)\n"
        "k = torch.tensor([1, 2])\n"
        "assert Weighting(0.9, 'weights:ones').weights(k, k).tolist() == [1.0, 1.0]\n"
        "assert sys.path == before and os.getcwd() not in before\n"
        "try:\n"
        "    Weighting(0.9, 'json:ones')\n"
        "except ValueError as error:\n"
        "    assert 'is loaded under that name already; rename' in str(error), error\n"
        "else:\n"
        "    raise AssertionError('another module answered')\n"
    )
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    script = [sys.executable, "launcher/train.py"]
    done = subprocess.run(script, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
