"""Figures of models that are often planned for, so that a plan needs no hub: as their config.json has them."""

from __future__ import annotations

from dataclasses import replace

from seqaware.plan.specs import ModelFacts

_LLAMA_8B = ModelFacts(
    vocab_size=128256,
    max_positions=131072,
    hidden_size=4096,
    layers=32,
    parameters=None,
    model_type="llama",
    heads=32,
    key_value_heads=8,
    head_dim=128,
    intermediate_size=14336,
)
_LLAMA_70B = ModelFacts(
    vocab_size=128256,
    max_positions=131072,
    hidden_size=8192,
    layers=80,
    parameters=None,
    model_type="llama",
    heads=64,
    key_value_heads=8,
    head_dim=128,
    intermediate_size=28672,
)
_KNOWN = {
    "meta-llama/Llama-3.1-8B": _LLAMA_8B,
    "meta-llama/Llama-3.1-8B-Instruct": _LLAMA_8B,
    "gradientai/Llama-3-8B-Instruct-1048k": replace(_LLAMA_8B, max_positions=1048576),
    "meta-llama/Llama-3.1-70B": _LLAMA_70B,
    "meta-llama/Llama-3.1-70B-Instruct": _LLAMA_70B,
}


def known_facts(name: str | None) -> ModelFacts | None:
    """Facts of a model by its hub id; None for one that is not known here."""
    return _KNOWN.get(name or "")
