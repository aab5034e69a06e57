"""Bounded reading of YAML, JSON and text files that a user, a hub or another run wrote.

Every reader refuses what would cost unbounded time, memory or recursion: large files, deep nesting, aliases that
expand to many values, integers beyond a float's range, and files that are not regular (a device has no end).
"""

from __future__ import annotations

import json
import os
import re
import stat
import sys
from collections.abc import Callable, Hashable
from pathlib import Path
from typing import Any

import yaml

YAML_BYTES = 256 * 2**10
"""PyYAML reads about 150 KB a second: more than this takes seconds. The largest config here has 9 KB."""
JSON_BYTES = 16 * 2**20
"""The densest JSON (`[],[],…`) takes 22 times its size in memory."""
MAX_DEPTH = 64
MAX_DIGITS = 308
"""A larger integer may not convert to a float."""
MAX_EXPANDED = 50_000
"""Values of a YAML file with every alias written out."""
# NAME_MAX of Linux, and half of its PATH_MAX: the names of a run's own files come behind.
_NAME_BYTES, _PATH_BYTES = 255, 2048

Pairs = Callable[[list[tuple[str, Any]]], dict[str, Any]]


class MalformedError(ValueError):
    """A file's content or a path is not usable. The message is the reason, to stand behind the file's name."""


class DuplicateKeyError(MalformedError):
    """A mapping of a YAML file has a key twice."""

    def __init__(self, key: str, first: int, second: int) -> None:
        super().__init__(f"duplicate key {key} in line {second}; it was already written in line {first}")
        self.key, self.first, self.second = key, first, second


def local_path(name: str | Path) -> Path:
    """Return the path with `~` expanded.

    Raises:
        MalformedError: see `checked_path`; or the user of `~user` is unknown.
    """
    try:
        return checked_path(checked_path(Path(name)).expanduser())
    except RuntimeError as error:
        raise MalformedError(f"no home folder is known for {str(name).split('/', 1)[0]}") from error


def checked_path(path: Path) -> Path:
    """Return the path if a file system takes it: others make even `Path.is_dir` raise.

    Raises:
        MalformedError: it holds NUL or a lone surrogate, or is too long.
    """
    if "\0" in str(path):
        raise MalformedError("a path cannot contain a NUL character")
    try:
        names = [os.fsencode(part) for part in path.parts]
    except UnicodeEncodeError as error:
        raise MalformedError("a path cannot contain a lone surrogate") from error
    if max(map(len, names), default=0) > _NAME_BYTES or len(os.fsencode(path)) > _PATH_BYTES:
        raise MalformedError(f"a name in a path has at most {_NAME_BYTES} bytes, and a path {_PATH_BYTES}")
    return path


def read_text(path: Path, *, limit: int) -> str:
    """Return the text of a regular file of at most `limit` bytes.

    Raises:
        OSError: the file cannot be read.
        MalformedError: it is no regular file, larger than `limit`, or not UTF-8.
    """
    mode = checked_path(path).stat().st_mode
    # Opening a pipe waits for its other end. A folder raises IsADirectoryError below.
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
        raise MalformedError("not a regular file")
    with path.open("rb") as file:
        content = file.read(limit + 1)
    if len(content) > limit:
        raise MalformedError(f"larger than {limit / 2**20:g} MiB")
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise MalformedError(f"not UTF-8 text (byte {error.start})") from error


def read_json(path: Path, *, limit: int = JSON_BYTES, pairs: Pairs | None = None) -> Any:
    """Return the value of a JSON file; see `parse_json`.

    Raises:
        OSError: the file cannot be read.
        MalformedError: see `read_text` and `parse_json`.
    """
    return parse_json(read_text(path, limit=limit), pairs=pairs)


def parse_json(text: str | bytes, *, pairs: Pairs | None = None, large_integers: bool = False) -> Any:
    """Return the value of a JSON text with at most MAX_DEPTH levels and MAX_DIGITS digits in an integer.

    Args:
        pairs: builds an object from its key-value pairs, where doubled keys matter.
        large_integers: take integers of any size, faster: for rows, whose integers are only ever printed.

    Raises:
        MalformedError: no JSON, too deep, or an integer that is too large.
    """
    decoder = _FAST if large_integers else _BOUNDED
    if pairs is not None:
        decoder = json.JSONDecoder(parse_int=_integer, object_pairs_hook=pairs)
    try:
        written = text.decode("utf-8") if isinstance(text, bytes) else text
        value = decoder.decode(written)
    except MalformedError:
        raise
    except RecursionError as error:
        raise MalformedError(_TOO_DEEP) from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise MalformedError(str(error)) from error
    except ValueError as error:  # int() takes no more digits than this
        raise MalformedError(f"an integer of more than {sys.get_int_max_str_digits()} digits") from error
    return checked_json(value, written)


def checked_json(value: Any, written: str) -> Any:
    """Return a value that was decoded from the JSON text `written`.

    Raises:
        MalformedError: it has more than MAX_DEPTH levels, or text with a lone surrogate.
    """
    # A text with fewer brackets, or without an escaped surrogate, needs no second walk.
    if written.count("[") + written.count("{") > MAX_DEPTH:
        _check_depth(value)
    if "\\u" in written and _SURROGATE.search(written):
        _check_encodable(json.dumps(value, ensure_ascii=False))
    return value


def _check_encodable(text: str) -> None:
    """A lone surrogate (`\\ud800`) can neither be written to a file nor tokenized."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise MalformedError(f"text with a lone surrogate (U+{ord(text[error.start]):04X})") from error


_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
_TOO_LARGE = f"a number of more than {MAX_DIGITS} digits"
_TOO_DEEP = f"nested more than {MAX_DEPTH} levels deep"


def _integer(digits: str) -> int:
    if len(digits) > MAX_DIGITS:
        raise MalformedError(_TOO_LARGE)
    return int(digits)


_FAST = json.JSONDecoder()
_BOUNDED = json.JSONDecoder(parse_int=_integer)


def _check_depth(value: Any) -> None:
    level = [value]
    for _ in range(MAX_DEPTH):
        level = [inner for outer in level for inner in _values(outer) if isinstance(inner, (dict, list))]
        if not level:
            return
    raise MalformedError(_TOO_DEEP)


def _values(container: Any) -> Any:
    return container.values() if isinstance(container, dict) else container if isinstance(container, list) else ()


def parse_yaml(text: str) -> Any:
    """Return the plain value of a YAML text: mappings, lists, text, numbers, booleans and null.

    Raises:
        DuplicateKeyError: a mapping has a key twice.
        MalformedError: no YAML, larger than YAML_BYTES, nested deeper than MAX_DEPTH, more than MAX_EXPANDED values
            with aliases written out, or a value of another type (a date, a set, bytes).
    """
    if len(text) > YAML_BYTES:
        raise MalformedError(f"larger than {YAML_BYTES // 2**10} KiB")
    try:
        # A subclass of SafeLoader: it builds nothing but plain values.
        return yaml.load(text, Loader=_Loader)
    except MalformedError:
        raise
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        raise MalformedError(f"{place}{getattr(error, 'problem', None) or error}") from error
    except (ValueError, OverflowError) as error:  # PyYAML 6.0 at "\UFFFFFFFF", and at %YAML with a huge version
        raise MalformedError("a character or a version number is out of range") from error


_STANDARD = "tag:yaml.org,2002:"
_REFUSED = ("timestamp", "binary", "set", "omap", "pairs")
_TOO_MANY = f"more than {MAX_EXPANDED:,} values, aliases expanded"


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader without unbounded work, values that JSON lacks, and doubled keys (it keeps the last)."""

    depth = nodes = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        self.depth += 1
        self.nodes += 1
        if self.depth > MAX_DEPTH:
            raise MalformedError(_TOO_DEEP)
        if self.nodes > MAX_EXPANDED:
            raise MalformedError(_TOO_MANY)
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def get_single_node(self) -> yaml.Node | None:
        node = super().get_single_node()
        # Before anything is built: merge keys copy what they name.
        _Expansion().measure(node)
        return node

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        kind = node.tag.removeprefix(_STANDARD)
        if kind in _REFUSED:
            raise self._refused(node, f"a value of type {kind} is not supported; write text in quotes")
        # PyYAML takes quadratic time for 1:1:1:… (base 60).
        if kind in ("int", "float") and len(node.value) > MAX_DIGITS:
            raise self._refused(node, _TOO_LARGE)
        try:
            value = super().construct_object(node, deep)
        except MalformedError:
            raise
        # PyYAML's own conversions: `!!int x`, `!!bool x`, `!!int ''`.
        except (ValueError, KeyError, IndexError, OverflowError) as error:
            raise self._refused(node, f"this value is not of type {kind}") from error
        if isinstance(value, int) and abs(value) > sys.float_info.max:  # 0x… and 1:1:…
            raise self._refused(node, _TOO_LARGE)
        if isinstance(value, str):
            _check_encodable(value)
        return value

    @staticmethod
    def _refused(node: yaml.Node, problem: str) -> yaml.constructor.ConstructorError:
        return yaml.constructor.ConstructorError(None, None, problem, node.start_mark)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        lines: dict[str, int] = {}
        for key, _ in node.value:
            line = key.start_mark.line + 1
            if not isinstance(key, yaml.ScalarNode):
                raise self._refused(key, "a key must be plain text")
            if key.value in lines:
                raise DuplicateKeyError(key.value, lines[key.value], line)
            lines[key.value] = line
        return super().construct_mapping(node, deep)


class _Expansion:
    """Counts the values and the levels of a YAML tree as if every alias were written out; each node is read once."""

    def __init__(self) -> None:
        self.known: dict[int, tuple[int, int]] = {}
        self.open: set[int] = set()

    def measure(self, node: yaml.Node | None) -> tuple[int, int]:
        if not isinstance(node, yaml.CollectionNode):
            return 1, 0
        if id(node) in self.known:
            return self.known[id(node)]
        if id(node) in self.open:
            raise MalformedError(f"line {node.start_mark.line + 1}: a value contains itself")
        self.open.add(id(node))
        values = [pair[1] for pair in node.value] if isinstance(node, yaml.MappingNode) else node.value
        inner = [self.measure(value) for value in values]
        size, depth = 1 + sum(size for size, _ in inner), 1 + max((depth for _, depth in inner), default=0)
        if size > MAX_EXPANDED:
            raise MalformedError(_TOO_MANY)
        if depth > MAX_DEPTH:
            raise MalformedError(_TOO_DEEP)
        self.known[id(node)] = size, depth
        self.open.remove(id(node))
        return size, depth
