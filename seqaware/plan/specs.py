"""What the Plan knows about the machine, the model and the data: plain numbers, read without torch."""

from __future__ import annotations

import io
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from seqaware.config.messages import show
from seqaware.config.schema import DatasetConfig, ModelConfig
from seqaware.errors import ConfigError, DataError
from seqaware.files import MalformedError, local_path, read_json

MOST_LAYERS = 1024
"""ZeRO-3's gathers are simulated module by module. The deepest published models have some 130 layers."""
MOST_SIZE = 2**40
_SAMPLE_BYTES = 32 * 2**20

# Families spell the same figure differently; the first spelling that is there counts.
_MAX_POSITIONS = ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "seq_length", "max_sequence_length")
_HIDDEN_SIZE = ("hidden_size", "n_embd", "d_model", "dim")
_LAYERS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")
_PARAMETERS = ("num_parameters", "n_parameters")
_HEADS = ("num_attention_heads", "n_head", "num_heads", "n_heads")
_KEY_VALUE_HEADS = ("num_key_value_heads", "num_kv_heads", "n_head_kv")
_INTERMEDIATE = ("intermediate_size", "n_inner", "ffn_dim", "d_ff")


@dataclass(frozen=True)
class World:
    """The ranks of a run.

    Attributes:
        size: all ranks. local_size: ranks on one node. nodes: machines.
        bf16: the device computes in bfloat16.
        sequence: ranks that share one sequence; each such group is one data-parallel rank.
        elsewhere: this is none of its machines, whose packages and drives cannot be looked at.
    """

    size: int
    local_size: int
    nodes: int
    device: Literal["cpu", "cuda"]
    bf16: bool
    sequence: int = 1
    elsewhere: bool = False

    @property
    def groups(self) -> int:
        """Data-parallel ranks: groups of ranks that hold sequences of their own."""
        return self.size // self.sequence


@dataclass(frozen=True)
class ModelFacts:
    """Figures of a model's configuration; None where it does not say.

    Attributes:
        max_positions: the longest sequence, in tokens. parameters: number of weights.
        heads, key_value_heads, head_dim: of the attention. intermediate_size: of the MLP.
        tied: the output head is the input embedding.
        defaults_known: False where only written fields were read, and the family's defaults fill in the others.
    """

    vocab_size: int | None
    max_positions: int | None
    hidden_size: int | None
    layers: int | None
    parameters: int | None
    model_type: str
    defaults_known: bool = True
    heads: int | None = None
    key_value_heads: int | None = None
    head_dim: int | None = None
    intermediate_size: int | None = None
    tied: bool = False


@dataclass(frozen=True)
class DataFacts:
    """Figures of the training data.

    Attributes:
        documents, tokens, supervised_tokens: counts over one epoch; 0 tokens where they were not counted.
        longest: tokens of the longest document, of those that an epoch leaves out too.
        fingerprint: of the prepared data; empty where there is none yet.
        exact: counted in a prepared store, not guessed from rows.
        steps_per_epoch: of epoch 0, 1, … as the order of the data has them, as in `BatchPlan`; None: as many as
            `documents` make.
        tokens_exact: False where every epoch draws other documents, so that its tokens are known on average only.
        tokenizer: digest of the tokenizer that made the tokens; empty where it is not known.
    """

    documents: int
    tokens: int
    supervised_tokens: int
    longest: int
    fingerprint: str
    exact: bool
    steps_per_epoch: tuple[int, ...] | None = None
    tokens_exact: bool = True
    tokenizer: str = ""


def divisors(number: int) -> list[int]:
    """Every divisor, ascending, in time of the square root."""
    small = [n for n in range(1, math.isqrt(number) + 1) if number % n == 0]
    return small + [number // n for n in reversed(small) if n * n != number]


def model_facts(model: ModelConfig) -> ModelFacts | None:
    """Facts from `model.from_scratch`, a folder's config.json, or the hub's cache on this machine.

    Returns:
        None where the configuration must first come from the hub.

    Raises:
        ConfigError: `model.base_name` is a folder without a readable config.json.
    """
    if model.from_scratch is not None:
        return replace(facts_from_dict(model.from_scratch, origin="model.from_scratch"), defaults_known=False)
    assert model.base_name is not None, "the schema wants one of base_name and from_scratch"
    folder = local_path(model.base_name)
    if folder.is_dir():
        return _facts_from_file(folder / "config.json")
    if folder.is_absolute() or model.base_name.startswith("."):
        raise ConfigError(
            "model.base_name: no such folder", got=folder, do="name a Hugging Face model folder or a hub id"
        )
    cached = _cached_config(model.base_name, model.revision)
    return None if cached is None else _facts_from_file(cached)


def facts_from_dict(config: Mapping[str, Any], *, origin: str = "the model's configuration") -> ModelFacts:
    """Facts from a transformers configuration as a mapping (config.json, or `PreTrainedConfig.to_dict()`).

    Args:
        origin: what an error names.

    Raises:
        ConfigError: a size is below 1, too large, or a boolean.
    """
    # Models of several modalities keep the language model's figures in a configuration of its own.
    inner = config.get("text_config")
    text = {**config, **inner} if isinstance(inner, Mapping) else config

    def figure(names: tuple[str, ...], most: int = MOST_SIZE) -> int | None:
        name = next((name for name in names if isinstance(text.get(name), int)), None)
        if name is None:
            return None
        size: int = text[name]
        if isinstance(size, bool) or not 1 <= size <= most:
            raise ConfigError(f"{origin}: {name} must be a whole number from 1 to {most:,}", got=show(size))
        return size

    hidden, heads = figure(_HIDDEN_SIZE), figure(_HEADS)
    return ModelFacts(
        vocab_size=figure(("vocab_size",)),
        max_positions=figure(_MAX_POSITIONS),
        hidden_size=hidden,
        layers=figure(_LAYERS, MOST_LAYERS),
        parameters=figure(_PARAMETERS, MOST_SIZE**2),
        model_type=str(config.get("model_type", "unknown")),
        heads=heads,
        key_value_heads=figure(_KEY_VALUE_HEADS) or heads,
        head_dim=figure(("head_dim",)) or (hidden // heads if hidden and heads else None),
        intermediate_size=figure(_INTERMEDIATE),
        tied=text.get("tie_word_embeddings") is True,
    )


def _facts_from_file(path: Path) -> ModelFacts:
    try:
        content = read_json(path)
    except FileNotFoundError as error:
        raise ConfigError(
            "model.base_name: the folder has no config.json", got=path.parent, do="name a Hugging Face model folder"
        ) from error
    except (OSError, MalformedError) as error:
        raise ConfigError("model.base_name: config.json cannot be read", got=f"{path} ({error})") from error
    if not isinstance(content, dict):
        raise ConfigError("model.base_name: config.json is no mapping", got=path)
    return facts_from_dict(content, origin=str(path))


def _cached_config(name: str, revision: str | None) -> Path | None:
    # Imported here: only a hub id needs it, and it costs a tenth of a second.
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(name, "config.json", revision=revision)
    except HFValidationError as error:
        raise ConfigError("model.base_name is neither a folder nor a hub id", got=repr(name)) from error
    return Path(found) if isinstance(found, str) else None


def rows_of_local_file(dataset: DatasetConfig) -> DataFacts | None:
    """A guess at the data before it is tokenised: the rows of a local jsonl file, or None for any other source.

    Raises:
        DataError: the file has no rows.
    """
    if dataset.name is None or not dataset.name.endswith(".jsonl") or not Path(dataset.name).is_file():
        return None
    rows = _rows(Path(dataset.name))
    if rows == 0:
        raise DataError("the dataset is empty", got=dataset.name)
    if dataset.max_examples is not None:
        rows = min(rows, dataset.max_examples)
    return DataFacts(rows, tokens=0, supervised_tokens=0, longest=0, fingerprint="", exact=False)


def _rows(path: Path) -> int:
    """Return the lines that are not empty; of a large file, as many as its beginning suggests."""
    with path.open("rb") as file:
        beginning = file.read(_SAMPLE_BYTES)
        rest = file.seek(0, os.SEEK_END) - len(beginning)
    rows = sum(1 for line in io.BytesIO(beginning) if line.strip())
    return rows if rest <= 0 else round(rows * (1 + rest / len(beginning)))
