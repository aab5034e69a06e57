"""Layouts that the tests of memory, time and search share."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

from seqaware.config.loading import REPOSITORY
from seqaware.estimate.decoder import Decoder, decoder_of
from seqaware.estimate.known_models import known_facts
from seqaware.estimate.layout import Layout, ZeroSettings
from seqaware.plan.specs import World

SMALL = Decoder("gated", 512, 1408, 4, 8, 4, 64, 8192, 2048, tied=False)


def known(name: str) -> Decoder:
    decoder = decoder_of(known_facts(f"meta-llama/Llama-3.1-{name}"))
    assert decoder is not None
    return decoder


def shipped(name: str) -> ZeroSettings:
    """Of ds_configs/<name>.json."""
    path = REPOSITORY / "ds_configs" / f"{name}.json"
    return ZeroSettings.of(json.loads(path.read_text())["zero_optimization"])


def gpus(size: int, *, sequence: int = 1) -> World:
    of_node = min(size, 8)
    return World(size, of_node, size // of_node, "cuda", bf16=True, sequence=sequence)


def layout(
    zero: str | dict[str, Any] = "zero3", *, size: int = 8, decoder: Decoder | None = None, **changes: Any
) -> Layout:
    """Llama 8B in bfloat16 on GPUs of nodes of 8, with fused AdamW."""
    settings = shipped(zero) if isinstance(zero, str) else ZeroSettings.of(zero)
    base = Layout(decoder or known("8B"), gpus(size), "bfloat16", settings, "adamw_fused", 8192, 8192)
    return replace(base, **changes)
