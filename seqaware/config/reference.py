"""docs/config.md, made from the schema: `python -m seqaware.config.reference > docs/config.md`. A test compares."""

from __future__ import annotations

import json
import sys
import types
from collections.abc import Iterator
from typing import Any, Literal, Union, get_args, get_origin

from pydantic.fields import FieldInfo

from seqaware.config.messages import section_in
from seqaware.config.schema import Config
from seqaware.config.values import Section

_HEAD = """\
# The config, key by key

Made from `seqaware/config/` by `python -m seqaware.config.reference > docs/config.md`; a test holds it to that.

A run is one YAML file. `model` and `dataset` are required; whatever else is left out has the default below. `null` is
"nothing written". Any key may be overridden on the command line, `--set training.sft.gamma=0.99`, again and again.
The value is read as YAML; a key that takes text takes it without YAML's quotes too, as in
`--set "format.prompt_template=Q: {question} A:"`.
Unknown keys, keys that stand twice and contradictions are errors that say what was got and what to do. `seqaware init`
writes a first config, `train_configs/default.yaml` shows every key in place, and `train_configs/schema.json` lets an
editor complete and check.
"""
_BOUNDS = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}


def config_reference() -> str:
    """The page."""
    return "\n".join([_HEAD, *_sections(Config, "")])


def _sections(section: type[Section], path: str) -> Iterator[str]:
    """A table for each section, those inside it behind it."""
    inner = {name: found for name, field in section.model_fields.items() if (found := _inner(field))}
    own = [
        name for name in section.model_fields if name not in inner or not _always_section(section.model_fields[name])
    ]
    if path:
        yield f"## `{path}`\n"
        yield f"{(section.__doc__ or '').strip()}\n"
    if own:
        yield "| key | what may stand there | default | |\n|---|---|---|---|"
        yield "\n".join(_row(name, section.model_fields[name]) for name in own) + "\n"
    for name, found in inner.items():
        repeated = path and found.__name__ in ("DatasetConfig",)
        if not repeated:
            suffix = "[]" if get_origin(_bare(section.model_fields[name].annotation)) is list else ""
            yield from _sections(found, f"{path}.{name}{suffix}" if path else f"{name}{suffix}")


def _inner(field: FieldInfo) -> type[Section] | None:
    return section_in(field.annotation)


def _always_section(field: FieldInfo) -> bool:
    """Not null, and no list: its keys say everything."""
    annotation = _bare(field.annotation)
    return isinstance(annotation, type) and issubclass(annotation, Section)


def _row(name: str, field: FieldInfo) -> str:
    inner = _inner(field)
    kind = _kind(field.annotation, field.metadata) if inner is None else ""
    if inner and get_origin(_bare(field.annotation)) is list:
        kind = "a list of sections"
    elif inner:
        kind = "a section, or null" if name != "dataset" else "the keys of `dataset`, or null"
    default = "required" if field.is_required() else f"`{_shown(field.get_default(call_default_factory=True))}`"
    meaning = " ".join((field.description or "").split()).replace("|", "\\|")
    return f"| `{field.alias or name}` | {kind} | {default} | {meaning} |"


def _bare(annotation: Any) -> Any:
    """Without Annotated, and without `| None`."""
    if hasattr(annotation, "__metadata__"):
        return _bare(get_args(annotation)[0])
    if get_origin(annotation) in (Union, types.UnionType):
        others = [each for each in get_args(annotation) if each is not type(None)]
        return _bare(others[0]) if len(others) == 1 else annotation
    return annotation


def _kind(annotation: Any, metadata: list[Any]) -> str:
    """What may be written, in words."""
    if hasattr(annotation, "__metadata__"):
        return _kind(get_args(annotation)[0], [*metadata, *annotation.__metadata__])
    origin, arguments = get_origin(annotation), get_args(annotation)
    match origin:
        case _ if origin is Literal:
            return " · ".join(f"`{each}`" for each in arguments)
        case _ if origin in (Union, types.UnionType):
            return ", or ".join(_kind(each, metadata) for each in arguments)
        case _ if origin in (list, tuple):
            kinds = {_kind(each, []): None for each in arguments if each is not Ellipsis}
            fixed = f"{len(arguments)} × " if origin is tuple and Ellipsis not in arguments else ""
            return f"a list of {fixed}{', '.join(kinds)}"
        case _ if origin is dict:
            return "a mapping"
    names = {str: "text", bool: "true · false", int: "a whole number", float: "a number", type(None): "null"}
    return names[annotation] + (_limits(metadata) if annotation in (int, float) else "")


def _limits(metadata: list[Any]) -> str:
    """`Field(ge=1)` is kept as a FieldInfo with a metadata of its own, or as the constraint itself."""
    constraints = [part for each in metadata for part in (each, *getattr(each, "metadata", ()))]
    bounds = ((sign, getattr(each, name, None)) for each in constraints for name, sign in _BOUNDS.items())
    parts = [f"{sign} {bound:g}" if bound < 1e6 else f"{sign} 2^32" for sign, bound in bounds if bound is not None]
    return f" {' and '.join(parts)}" if parts else ""


def _shown(value: Any) -> str:
    if isinstance(value, float) and value < 1e-3 and value:
        return f"{value:g}"
    return json.dumps(list(value) if isinstance(value, tuple) else value, ensure_ascii=False)


if __name__ == "__main__":
    sys.stdout.write(config_reference())
