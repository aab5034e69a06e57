"""Tiny models of the families people train, with random weights."""

from __future__ import annotations

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from seqaware.models.attention import NAME

VOCABULARY = 97
_COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
}
FAMILIES = {
    "llama": {**_COMMON, "num_key_value_heads": 2},
    "qwen2": {**_COMMON, "num_key_value_heads": 2},
    "qwen3": {**_COMMON, "num_key_value_heads": 2, "head_dim": 8},
    "mistral": {**_COMMON, "num_key_value_heads": 2, "sliding_window": 5},
    "gemma": {**_COMMON, "num_key_value_heads": 1, "head_dim": 8},
    "gemma2": {**_COMMON, "num_key_value_heads": 2, "head_dim": 8, "sliding_window": 5, "final_logit_softcapping": 3.0},
    "gpt2": {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128},
    "gpt_neox": _COMMON,
    "granite": {**_COMMON, "num_key_value_heads": 2, "logits_scaling": 4.0},
    "cohere": {**_COMMON, "num_key_value_heads": 2, "logit_scale": 0.25},
}


def tiny(family: str, *, attention: str = NAME, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A two-layer model of `family`; the same weights for the same arguments."""
    config = AutoConfig.for_model(family, **FAMILIES[family])
    # Larger than a trained model's, so that attention matters and a leak cannot hide in rounding.
    config.initializer_range = 0.2
    for name in ("attn_pdrop", "embd_pdrop", "resid_pdrop", "attention_dropout", "hidden_dropout"):
        if hasattr(config, name):
            setattr(config, name, 0.0)
    torch.manual_seed(0)
    config._attn_implementation = attention
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention)
    return model
