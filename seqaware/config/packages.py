"""Packages that only some settings need."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from types import MappingProxyType

FLASH_MODULES: Mapping[str, str] = MappingProxyType(
    {
        "flash_attention_2": "flash_attn",
        "flash_attention_3": "flash_attn_interface",
        "flash_attention_4": "flash_attn.cute",
    }
)
"""The module of each version of Dao's FlashAttention, by its name in `model.attention`."""


def is_installed(module: str) -> bool:
    """Whether the module is there; it need not be one that can be imported. Nothing is imported but its packages."""
    try:
        found = importlib.util.find_spec(module)
    except ModuleNotFoundError as error:
        # Its package is not there; or it is, and lacks what it needs itself.
        return error.name is None or not f"{module}.".startswith(f"{error.name}.")
    except Exception:  # noqa: BLE001 what the start of a foreign package may raise
        return True
    # A folder of other modules, such as flash_attn where only flash_attn.cute is installed, has no origin.
    return found is not None and found.origin is not None
