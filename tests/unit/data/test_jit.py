from __future__ import annotations

from typing import Any

import pytest
from numba import njit

from seqaware.data.jit import compiled


def test_a_function_that_cannot_be_cached_is_compiled_all_the_same():
    # numba finds no folder for the cache of a function without a file, as in a read-only container.
    scope: dict[str, Any] = {}
    exec(compile("def double(value):\n    return 2 * value", "<no file>", "exec"), scope)
    with pytest.raises(RuntimeError, match="no locator available"):
        njit(scope["double"], cache=True)
    assert compiled(scope["double"])(21) == 42
