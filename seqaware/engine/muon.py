"""DeepSpeed's Muon, imported without a compiler."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, wraps
from typing import Any

Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]


def import_muon() -> None:
    """Import DeepSpeed's Muon, which every ZeRO stage does to ask whether its optimizer is one.

    As it comes it hands functions to `torch.compile` at its import, and that imports the whole compiler: 570 modules,
    a second and a half of every start. Here they are handed over when they are first called.
    """
    from deepspeed.runtime import compiler

    at_once = compiler.compile
    compiler.compile = lambda: _when_called(at_once())
    try:
        import deepspeed.runtime.zero.muon.original_muon  # noqa: F401  # for what its import does
    finally:
        compiler.compile = at_once


def _when_called(decorate: Decorator) -> Decorator:
    def later(function: Callable[..., Any]) -> Callable[..., Any]:
        decorated = cache(lambda: decorate(function))

        @wraps(function)
        def call(*arguments: Any, **options: Any) -> Any:
            return decorated()(*arguments, **options)

        return call

    return later
