"""Scalars: numbers however YAML reads them, and nothing that merely looks like one."""

from __future__ import annotations

import math
from typing import Any

import pytest
from pydantic import TypeAdapter, ValidationError

from seqaware.config.values import Count, DType, Flag, Positive, Share, Text


@pytest.mark.parametrize(("written", "value"), [("2e-5", 2e-5), (" 1E3 ", 1000.0), (".5", 0.5), (3, 3.0), (0.25, 0.25)])
def test_numbers(written: Any, value: float) -> None:
    number = TypeAdapter(Positive).validate_python(written)
    assert number == value
    assert isinstance(number, float)


@pytest.mark.parametrize("written", ["", "two", "1e", "0x10", "1_000", True, None, [1], math.nan, math.inf, "nan"])
def test_what_is_no_number(written: Any) -> None:
    with pytest.raises(ValidationError):
        TypeAdapter(Positive).validate_python(written)


@pytest.mark.parametrize(("written", "value"), [("16", 16), ("1e3", 1000), (7, 7)])
def test_whole_numbers(written: Any, value: int) -> None:
    assert TypeAdapter(Count).validate_python(written) == value


@pytest.mark.parametrize("written", [1.5, 4.0, "1.5", "1e-3", True, 0, -1, "0"])
def test_what_is_no_count(written: Any) -> None:
    with pytest.raises(ValidationError):
        TypeAdapter(Count).validate_python(written)


@pytest.mark.parametrize("written", [-1e-9, 1.0000001, "1.5"])
def test_a_share_lies_between_0_and_1(written: Any) -> None:
    with pytest.raises(ValidationError):
        TypeAdapter(Share).validate_python(written)


@pytest.mark.parametrize("written", ["yes", "true", 1, 0, None])
def test_a_flag_is_true_or_false(written: Any) -> None:
    with pytest.raises(ValidationError):
        TypeAdapter(Flag).validate_python(written)


@pytest.mark.parametrize("written", [12, True, "", None])
def test_what_is_no_text(written: Any) -> None:
    with pytest.raises(ValidationError):
        TypeAdapter(Text).validate_python(written)


@pytest.mark.parametrize(("written", "value"), [("bf16", "bfloat16"), ("fp32", "float32"), ("float16", "float16")])
def test_short_names_of_dtypes(written: str, value: str) -> None:
    assert TypeAdapter(DType).validate_python(written) == value
