"""Digest of a user's weighting function: what `training.sft.weighting: module:function` computes, without importing it.

The function decides the loss, so its source belongs to the identity of a run. It is read, not executed: a plan needs no
torch, and the modules of the function usually import it.
"""

from __future__ import annotations

import ast
import hashlib
import importlib
import importlib.util
from collections.abc import Iterator
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path

# Found in the working directory of a checkout. They have versions of their own.
_NOT_THE_USERS = ("seqaware", "launcher")


def weighting_source(weighting: str) -> str | None:
    """Return the SHA-256 of the source behind `module:function`.

    It covers the function's module and, where that lies in the working directory, every module of the working directory
    that it imports by a statement. Line endings do not count; comments do.

    Returns:
        None for a scheme that ships with seqaware, and where the module is not found.
    """
    module, colon, _ = weighting.partition(":")
    if not colon:
        return None
    importlib.invalidate_caches()
    sources: dict[str, bytes] = {}
    names = [module]
    while names:
        name = names.pop()
        spec = _find(name)
        if name in sources or spec is None or not (spec.has_location and spec.origin):
            continue
        try:
            sources[name] = Path(spec.origin).read_bytes().replace(b"\r\n", b"\n")
        except OSError:
            continue
        names += [each for each in _imported(name, sources[name], spec) if _is_the_users(each)]
    if module not in sources:
        return None
    digests = {name: hashlib.sha256(source).hexdigest() for name, source in sources.items()}
    return hashlib.sha256(repr(sorted(digests.items())).encode()).hexdigest()


def _is_the_users(name: str) -> bool:
    top = name.partition(".")[0]
    return top not in _NOT_THE_USERS and _in_working_directory(top) is not None


def _in_working_directory(top: str) -> ModuleSpec | None:
    return PathFinder.find_spec(top, [str(Path.cwd())])


def _find(name: str) -> ModuleSpec | None:
    """Find a module where `objective.weighting` imports it from: the working directory, then where Python looks."""
    top, *rest = name.split(".")
    try:
        spec = _in_working_directory(top) or importlib.util.find_spec(top)
    except (ImportError, ValueError):  # a name that no module can have, or a module that was made by hand
        return None
    for part in rest:
        if spec is None or spec.submodule_search_locations is None:
            return None
        spec = PathFinder.find_spec(f"{spec.name}.{part}", list(spec.submodule_search_locations))
    return spec


def _imported(name: str, source: bytes, spec: ModuleSpec) -> Iterator[str]:
    """Yield the modules that a module imports by statements, and the packages that it and they lie in."""
    yield from _with_packages(name)
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError):  # not Python: an extension module, or a file that the import will refuse
        return
    package = name if spec.submodule_search_locations is not None else name.rpartition(".")[0]
    for node in ast.walk(tree):
        match node:
            case ast.Import(names=imported):
                for each in imported:
                    yield from _with_packages(each.name)
            case ast.ImportFrom(module=module, names=imported, level=level):
                parents = package.split(".")[: len(package.split(".")) - level + 1] if level else []
                base = ".".join([*parents, *([module] if module else [])])
                yield from _with_packages(base)
                for each in imported:
                    yield f"{base}.{each.name}"


def _with_packages(name: str) -> Iterator[str]:
    parts = name.split(".")
    yield from (".".join(parts[: count + 1]) for count in range(len(parts)) if all(parts))
