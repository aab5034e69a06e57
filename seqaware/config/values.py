"""The base of every section, and the scalar types of the configuration.

They are strict, except that a number may be written as YAML readers happen to read it: PyYAML reads `2e-5` and `1e3`
as strings, so a number field takes a string that spells a number, and nothing else. `"yes"` is no boolean, `3.7` is no
whole number, `123` is no name.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, Strict

from seqaware.files import local_path

_NUMBER = re.compile(r"[+-]?(\d+(\.\d*)?|\.\d+)([eE][+-]?\d+)?")


def _number(value: Any) -> Any:
    """A string that spells a number becomes it; whatever else it is, the strict type behind us judges."""
    if not isinstance(value, str) or not _NUMBER.fullmatch(value.strip()):
        return value
    return float(value)


def _whole_number(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    number = _number(value)
    return int(number) if isinstance(number, float) and number.is_integer() else value


_DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


def _dtype(value: Any) -> Any:
    return _DTYPES.get(value, value) if isinstance(value, str) else value


LARGEST = 10**12
"""Of every number. What is computed from numbers below it stays within a float, an int64 and an index."""
MOST_MINUTES = 10**6
"""Waiting functions of Python take 292 years at most, in nanoseconds."""
MOST_PROCESSES = 1024


def _at_most(largest: float) -> AfterValidator:
    # A validator and not Field(le=…): the limit is no part of what the reference says of each key.
    def check(value: float) -> float:
        if value > largest:
            raise ValueError(f"must be at most {largest:,}; got {value:.4g}")
        return value

    return AfterValidator(check)


def _usable(value: str) -> str:
    local_path(value)
    return value


Text = Annotated[str, Strict(), Field(min_length=1)]
LocalName = Annotated[str, Strict(), Field(min_length=1), AfterValidator(_usable)]
"""A path, or a name that is looked for as a path first."""
AnyText = Annotated[str, Strict()]
Flag = Annotated[bool, Strict()]
CountOrZero = Annotated[int, Strict(), Field(ge=0), BeforeValidator(_whole_number), _at_most(LARGEST)]
_Count = Annotated[int, Strict(), Field(ge=1), BeforeValidator(_whole_number)]
Count = Annotated[_Count, _at_most(LARGEST)]
SequenceLength = Annotated[int, Strict(), Field(ge=2), BeforeValidator(_whole_number), _at_most(LARGEST)]
Seed = Annotated[int, Strict(), Field(ge=0, lt=2**32), BeforeValidator(_whole_number)]
FromOne = Annotated[float, Strict(), Field(ge=1, allow_inf_nan=False), BeforeValidator(_number), _at_most(LARGEST)]
_Positive = Annotated[float, Strict(), Field(gt=0, allow_inf_nan=False), BeforeValidator(_number)]
Positive = Annotated[_Positive, _at_most(LARGEST)]
Minutes = Annotated[_Positive, _at_most(MOST_MINUTES)]
Processes = Annotated[_Count, _at_most(MOST_PROCESSES)]
NonNegative = Annotated[float, Strict(), Field(ge=0, allow_inf_nan=False), BeforeValidator(_number), _at_most(LARGEST)]
Share = Annotated[float, Strict(), Field(ge=0, le=1, allow_inf_nan=False), BeforeValidator(_number)]
ShareBelowOne = Annotated[float, Strict(), Field(ge=0, lt=1, allow_inf_nan=False), BeforeValidator(_number)]
PositiveShare = Annotated[float, Strict(), Field(gt=0, le=1, allow_inf_nan=False), BeforeValidator(_number)]

DType = Annotated[Literal["auto", "float32", "bfloat16", "float16"], BeforeValidator(_dtype)]


class Section(BaseModel):
    """Frozen; an unknown key is an error; the docstrings under the fields become the JSON Schema's descriptions."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    def written(self, *names: str) -> list[str]:
        """Those of `names` that hold a value."""
        return [name for name in names if getattr(self, name) is not None]
