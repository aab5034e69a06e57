"""The slow imports of torch, transformers and DeepSpeed, a little less slow."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def quick_imports() -> Iterator[None]:
    """Inside, modules are imported without the garbage collector, and it never walks over them again.

    It would go through the million objects of those modules many times and find nothing: a fifth of the seconds they
    take. And DeepSpeed calls it by itself up to ten times while it starts.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
