"""Functions compiled to machine code by numba, kept on disk where that is possible."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from numba import njit

Function = TypeVar("Function", bound=Callable[..., Any])


def compiled(function: Function) -> Function:
    """Compile `function` at its first call and release the interpreter's lock while it runs.

    The machine code is cached beside the source or in the user's cache folder; where neither can be written (a
    read-only container), every process compiles anew.
    """
    try:
        kept: Function = njit(function, cache=True, nogil=True)
    except RuntimeError:  # numba: "no locator available": nowhere to keep the cache
        kept = njit(function, nogil=True)
    return kept
