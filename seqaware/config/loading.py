"""Reads a run's YAML, applies `--set` overrides, and checks it against the schema."""

from __future__ import annotations

import copy
import re
import types
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Union, get_args, get_origin

from pydantic import ValidationError

from seqaware.config.messages import config_error, nearest, section_at, show
from seqaware.config.schema import Config
from seqaware.errors import ConfigError
from seqaware.files import MAX_DEPTH, YAML_BYTES, DuplicateKeyError, MalformedError, parse_yaml, read_text
from seqaware.masking import holds_secret, is_secret, masked

REPOSITORY = Path(__file__).resolve().parents[2]
DEFAULT_CONFIG = REPOSITORY / "train_configs" / "default.yaml"
_PATH = re.compile(r"\w+(\.\w+)*")


def load_config(path: Path | None, overrides: Sequence[str] = ()) -> Config:
    """The configuration of a run.

    Args:
        path: the YAML file; None takes `train_configs/default.yaml` of the repository.
        overrides: `dotted.key=value`, the value read as YAML, or as it is for a key that takes text; later ones win
            over earlier ones, all over the file.

    Raises:
        ConfigError: the file cannot be read or is no mapping; a key is unknown, doubled or contradicted; a value has
            the wrong type or lies out of bounds. All problems of the values are in one message.
    """
    file = DEFAULT_CONFIG if path is None else path
    written = read_yaml(file)
    for override in overrides:
        written = _overridden(written, override)
    origin = f"{file}{' with --set' if overrides else ''}"
    try:
        config = Config.model_validate(written)
    except ValidationError as error:
        raise config_error(error, origin=origin) from error
    _refuse_secrets(config.model_dump(mode="json"))
    return config


def _refuse_secrets(written: Any, key: str = "") -> None:
    """A config is written into its run's folder, and from there into every copy of it."""
    own = key.rpartition(".")[2]
    if key.endswith(f"columns.{own}"):
        own = ""  # the name of a field, whose value is the name of a column
    if isinstance(written, str) and is_secret(written, own):
        shown = masked(written)
        raise ConfigError(
            f"{key} holds a password or a token, and configs are kept with their runs",
            got="***" if is_secret(shown, own) else shown,
            do="take it out; tokens come from the environment (HF_TOKEN, WANDB_API_KEY), data from a path or a hub id",
        )
    parts = written.items() if isinstance(written, dict) else enumerate(written) if isinstance(written, list) else ()
    for name, value in parts:
        if holds_secret(str(name)):
            raise ConfigError(f"a key of {key} is a password or a token", do="take it out")
        _refuse_secrets(value, f"{key}.{name}" if key else str(name))


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML file that holds a mapping.

    Raises:
        ConfigError: missing, unreadable, no YAML, empty, no mapping, or a key twice.
    """
    try:
        text = read_text(path, limit=YAML_BYTES)
    except FileNotFoundError as error:
        raise ConfigError("the config file does not exist", got=path, do=_files_beside(path)) from error
    except (OSError, MalformedError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise ConfigError("the config file cannot be read", got=f"{path} ({reason})") from error
    content = _parse(text, origin=str(path))
    if content is None:
        raise ConfigError("the config file is empty", got=path, do="see train_configs/default.yaml for the keys")
    if not isinstance(content, dict):
        raise ConfigError("the config file must be a mapping of sections", got=f"{show(content)} in {path}")
    return content


def _files_beside(path: Path) -> str | None:
    try:
        names = sorted(file.name for file in path.parent.glob("*.y*ml"))
    except OSError:
        return None
    return nearest(path.name, names) or (f"in that folder are {', '.join(names)}" if names else None)


def _parse(text: str, *, origin: str, do: str | None = None) -> Any:
    try:
        return parse_yaml(text)
    except DuplicateKeyError as error:
        where = f"line {error.second}; it was already written in line {error.first}"
        raise ConfigError(f"{origin}: duplicate key {error.key}", got=where, do="keep one of them") from error
    except MalformedError as error:
        raise ConfigError(f"{origin} is not valid YAML", got=error, do=do) from error


def _set_value(key: str, text: str) -> Any:
    """Read the value of an override.

    A key that takes text gets the text as it is where YAML would read something else: a mapping (`Q: {question}`), a
    comment (`Problem #1`), or nothing valid. Quoted text, null, numbers and booleans are YAML.
    """
    if not _takes_text(key) or text.lstrip().startswith(tuple("'\"|>")):
        return _parse(
            text, origin=f"--set {key}", do=f"quote it for YAML inside the shell's quotes: --set '{key}=\"…\"'"
        )
    try:
        value = parse_yaml(text)
    except MalformedError:
        return text
    return text if isinstance(value, dict | list) or (isinstance(value, str) and value != text.strip()) else value


def _takes_text(key: str) -> bool:
    """Return whether a key of the schema takes text and nothing else but null."""
    *parents, last = key.split(".")
    section = section_at(parents)
    field = section.model_fields.get(last) if section else None
    return field is not None and set(_leaves(field.annotation)) <= {str, type(None)}


def _leaves(annotation: Any) -> Iterator[Any]:
    """Yield the types of an optional, a union or an annotated type."""
    if hasattr(annotation, "__metadata__"):
        yield from _leaves(get_args(annotation)[0])
    elif get_origin(annotation) in (Union, types.UnionType):
        for part in get_args(annotation):
            yield from _leaves(part)
    else:
        yield annotation


def _overridden(written: dict[str, Any], override: str) -> dict[str, Any]:
    key, equals, text = override.partition("=")
    key = key.strip()
    if not equals or not _PATH.fullmatch(key):
        example = "--set training.sft.gamma=0.99"
        raise ConfigError("--set needs key=value with a dotted key", got=repr(override), do=f"as in {example}")
    if key.count(".") >= MAX_DEPTH:
        raise ConfigError("--set: the key is nested too deep", got=f"{key.count('.') + 1} parts in {key[:40]}…")
    value = _set_value(key, text)
    result = copy.deepcopy(written)
    section = result
    *parents, last = key.split(".")
    for depth, name in enumerate(parents):
        inner = section.get(name)
        if inner is not None and not isinstance(inner, dict):
            outer = ".".join(parents[: depth + 1])
            raise ConfigError(f"--set {key}: {outer} is not a section", got=show(inner))
        section[name] = {} if inner is None else inner
        section = section[name]
    section[last] = value
    return result
