"""The slow imports of torch, transformers and DeepSpeed, less slow."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager

# Imported, where it is installed, by DeepSpeed's autotuner, which no run uses: 500 modules.
_UNUSED = "mlflow"


@contextmanager
def quick_imports() -> Iterator[None]:
    """Inside, modules are imported without the garbage collector, and it never walks over them again.

    It would go through the million objects of those modules many times and find nothing: a fifth of the seconds they
    take. And DeepSpeed calls it by itself up to ten times while it starts. MLflow cannot be imported in here, and can
    be afterwards.
    """
    hidden = _UNUSED not in sys.modules
    if hidden:
        sys.modules[_UNUSED] = None  # type: ignore[assignment]  # Python's own way to say that there is none
    gc.disable()
    try:
        yield
    finally:
        if hidden:
            del sys.modules[_UNUSED]
        gc.freeze()
        gc.enable()
