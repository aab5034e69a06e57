"""Turns what pydantic found into one message for a person: dotted path, what was expected, what was got, what to do."""

from __future__ import annotations

import difflib
import types
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Union, get_args, get_origin

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from seqaware.config.schema import Config
from seqaware.config.values import Section
from seqaware.errors import ConfigError

_EXPECTED = {
    "string_type": "a string",
    "bool_type": "true or false",
    "int_type": "a whole number",
    "float_type": "a number",
    "list_type": "a list",
    "dict_type": "a mapping",
    "tuple_type": "a list",
    "model_type": "a section (a mapping of keys)",
    "model_attributes_type": "a section (a mapping of keys)",
    "finite_number": "a finite number",
    "string_too_short": "a string that is not empty",
}
_NEAR = 0.6
_VERY_NEAR = 0.8
_MOST_PROBLEMS = 20


@dataclass(frozen=True)
class _Problem:
    what: str
    got: str | None
    do: str | None

    def line(self) -> str:
        return "; ".join(part for part in (self.what, self.got and f"got {self.got}", self.do) if part)


def config_error(error: ValidationError, *, origin: str) -> ConfigError:
    """Every problem of a configuration in one error.

    Args:
        origin: the file the values come from, as the message names it.
    """
    details = error.errors(include_url=False)
    # Each unknown key is compared with every key there is: a file may hold thousands.
    problems = [_problem(detail) for detail in details[:_MOST_PROBLEMS]]
    if len(details) == 1:
        only = problems[0]
        return ConfigError(f"{origin}: {only.what}", got=only.got, do=only.do)
    lines = "".join(f"\n  - {problem.line()}" for problem in problems)
    more = "" if len(details) <= _MOST_PROBLEMS else f"\n  - and {len(details) - _MOST_PROBLEMS} more"
    return ConfigError(f"{origin}: {len(details)} problems:{lines}{more}")


def _problem(detail: ErrorDetails) -> _Problem:
    path, value = dotted(detail["loc"]), detail["input"]
    context = detail.get("ctx", {})
    match detail["type"]:
        case "extra_forbidden" | "invalid_key":
            return _Problem(f"unknown key {path}", None, _nearest_key(detail["loc"]))
        case "missing":
            return _Problem(f"{path} is missing", None, "write it")
        case "literal_error":
            return _Problem(f"{path} must be {context['expected']}", show(value), nearest(value, _literals(context)))
        case "value_error":
            return _Problem(f"{path}: {context['error']}", None, None)
        case "greater_than" | "greater_than_equal" | "less_than" | "less_than_equal":
            return _Problem(f"{path} must be {_bound(detail['type'], context)}", show(value), None)
        case "too_short" | "too_long" if "actual_length" in context:
            wanted = context.get("min_length", context.get("max_length"))
            return _Problem(f"{path} must be a list of {wanted}", show(value), None)
        case kind if kind in _EXPECTED:
            return _Problem(f"{path} must be {_EXPECTED[kind]}", show(value), _quoting(kind, value))
        case _:
            return _Problem(f"{path}: {detail['msg']}", show(value), None)


def dotted(location: Sequence[str | int]) -> str:
    """`("dataset", "mixture", 0, "name")` → `dataset.mixture[0].name`."""
    path = ""
    for part in location:
        path += f"[{part}]" if isinstance(part, int) else f".{part}" if path else part
    return path


def show(value: object) -> str:
    """A value as the message shows it: with its type where that is the point, and never a page long."""
    text = repr(value)
    text = text if len(text) <= 80 else text[:77] + "…"
    return "nothing (null)" if value is None else f"{text} ({_TYPE_NAMES.get(type(value), type(value).__name__)})"


_TYPE_NAMES: dict[type, str] = {
    str: "a string",
    bool: "a boolean",
    int: "a whole number",
    float: "a number",
    list: "a list",
    dict: "a mapping",
}


def nearest(value: object, names: Sequence[str]) -> str | None:
    """`did you mean …?` where one of the names is near."""
    near = difflib.get_close_matches(str(value), names, n=1, cutoff=_NEAR)
    return f"did you mean {near[0]}?" if near else None


def _bound(kind: str, context: dict[str, Any]) -> str:
    words = {"greater_than": "gt", "greater_than_equal": "ge", "less_than": "lt", "less_than_equal": "le"}
    signs = {"gt": "more than", "ge": "at least", "lt": "less than", "le": "at most"}
    name = words[kind]
    return f"{signs[name]} {context[name]:g}"


def _literals(context: dict[str, Any]) -> list[str]:
    return [part.strip("'") for part in str(context["expected"]).replace(" or ", ", ").split(", ")]


def _quoting(kind: str, value: object) -> str | None:
    if kind != "string_type" or value is None:
        return None
    # A template with a colon and braces reads as a mapping.
    return "write the whole text in quotes" if isinstance(value, dict | list) else f'write "{value}" in quotes'


def _nearest_key(location: Sequence[str | int]) -> str:
    *parents, key = location
    section = section_at(parents)
    prefix = f"{dotted(parents)}." if parents else ""
    siblings = [field.alias or name for name, field in section.model_fields.items()] if section else []
    if guess := difflib.get_close_matches(str(key), siblings, n=1, cutoff=_NEAR):
        return f"did you mean {prefix}{guess[0]}?"
    # Written in the wrong section, perhaps: the first path that ends in this name, or in one very near.
    elsewhere: dict[str, str] = {}
    for path in _paths(Config):
        elsewhere.setdefault(path.rsplit(".", 1)[-1], path)
    if guess := difflib.get_close_matches(str(key), elsewhere, n=1, cutoff=_VERY_NEAR):
        return f"did you mean {elsewhere[guess[0]]}?"
    return f"the keys of {dotted(parents) or 'the file'} are {', '.join(siblings)}"


def section_at(location: Sequence[str | int]) -> type[Section] | None:
    """Return the section at a location of the config, or None."""
    section: type[Section] = Config
    for part in location:
        if isinstance(part, int):
            continue
        field = section.model_fields.get(part)
        inner = section_in(field.annotation) if field else None
        if inner is None:
            return None
        section = inner
    return section


def section_in(annotation: Any) -> type[Section] | None:
    """The section that an annotation names, inside an optional or a list too."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return annotation
    if get_origin(annotation) in (Union, types.UnionType, list) or hasattr(annotation, "__metadata__"):
        return next((found for part in get_args(annotation) if (found := section_in(part))), None)
    return None


def _paths(section: type[Section], prefix: str = "") -> Iterator[str]:
    for name, field in section.model_fields.items():
        inner = section_in(field.annotation)
        yield f"{prefix}{field.alias or name}"
        if inner is not None and name != "mixture":
            yield from _paths(inner, f"{prefix}{name}.")


def config_paths() -> list[str]:
    """Every dotted path of the schema, sections included; those inside a mixture's parts are left out."""
    return list(_paths(Config))
