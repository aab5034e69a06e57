"""What transformers cannot build of `model.from_scratch` is one error, whatever it raises."""

from __future__ import annotations

from typing import Any

import pytest

from seqaware.config.loading import REPOSITORY
from seqaware.config.schema import ModelConfig
from seqaware.data.tokenization import load_tokenizer
from seqaware.errors import ConfigError
from seqaware.models.model import empty_causal_lm, initial_config
from seqaware.models.model_source import check_model_source

TOKENIZER = str(REPOSITORY / "demo" / "tokenizer")
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}


@pytest.mark.parametrize(
    "fields",
    [
        {"model_type": "llama", "attention_dropout": "x"},
        {"model_type": "llama", "num_attention_heads": 3},
        {"model_type": "llama", "hidden_act": "no such"},
        {"model_type": "llama", "id2label": "x"},
        {"model_type": "qwen3_moe", "num_attention_heads": 64},
        {"model_type": "gemma3_text", "layer_types": [1]},
    ],
    ids=lambda fields: " ".join(map(str, fields.values())),
)
def test_fields_that_transformers_refuses(fields: dict[str, Any]) -> None:
    tokenizer = load_tokenizer(ModelConfig(base_name=TOKENIZER))
    with pytest.raises(ConfigError, match=r"not a config transformers can build|makes no causal language model"):
        empty_causal_lm(initial_config({**SIZES, **fields}, tokenizer))


def test_a_size_is_checked_before_transformers_sees_it() -> None:
    model = ModelConfig(from_scratch={"model_type": "llama", "num_hidden_layers": 10**9}, tokenizer=TOKENIZER)
    with pytest.raises(ConfigError, match="num_hidden_layers must be a whole number"):
        check_model_source(model)
