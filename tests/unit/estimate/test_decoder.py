"""Counting parameters without torch, against the models themselves."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from seqaware.estimate.decoder import decoder_of
from seqaware.plan.specs import ModelFacts, facts_from_dict
from tests.unit.plan.layouts import SMALL, known

SIZES = {
    "vocab_size": 1000,
    "hidden_size": 96,
    "intermediate_size": 200,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {**SIZES, "tie_word_embeddings": False}),
    "tied llama": ("llama", {**SIZES, "tie_word_embeddings": True}),
    "mistral": ("mistral", SIZES),
    "qwen2": ("qwen2", SIZES),
    "qwen3": ("qwen3", {**SIZES, "head_dim": 32}),
    "gpt2": ("gpt2", {"vocab_size": 1000, "n_embd": 96, "n_layer": 3, "n_head": 6, "n_positions": 64}),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_the_count_is_the_models_own(name: str) -> None:
    model_type, fields = FAMILIES[name]
    config = AutoConfig.for_model(model_type, **fields)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    decoder = decoder_of(facts_from_dict(config.to_dict()))
    assert decoder is not None and decoder.exact
    assert decoder.parameters == sum(parameter.numel() for parameter in model.parameters())


def test_known_models_have_the_sizes_they_are_known_for() -> None:
    assert known("8B").parameters == 8_030_261_248
    assert known("70B").parameters == 70_553_706_496


def test_matrices_are_all_weights_but_norms_and_the_embedding() -> None:
    norms = (2 * SMALL.layers + 1) * SMALL.hidden
    assert SMALL.matrix_parameters == SMALL.parameters - norms - SMALL.vocabulary * SMALL.hidden


def test_too_few_figures_make_no_decoder() -> None:
    assert decoder_of(None) is None
    assert decoder_of(ModelFacts(50257, 1024, 768, 12, None, "gpt2")) is None


def test_an_unknown_family_is_marked() -> None:
    facts = facts_from_dict({**SIZES, "model_type": "marvin"})
    decoder = decoder_of(facts)
    assert decoder is not None and not decoder.exact
