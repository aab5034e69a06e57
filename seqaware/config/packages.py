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
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False  # not even the package around it
