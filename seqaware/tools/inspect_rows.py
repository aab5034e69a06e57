"""The tokenised training rows of a config, for those who want to look before they train."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedTokenizerFast

from seqaware.config.schema import Config
from seqaware.data.store.token_store import TokenStore
from seqaware.data.tokenization import prepare_store
from seqaware.training.prepare import Progress, tokenizer_and_length


@dataclass(frozen=True)
class TrainingRows:
    """The store of a config's training rows. max_seq_length: tokens a document may have."""

    store: TokenStore
    tokenizer: PreTrainedTokenizerFast
    max_seq_length: int


def training_rows(config: Config, *, progress: Progress | None = None) -> TrainingRows:
    """Tokenise the training rows if that is not done.

    Raises:
        ConfigError, DataError: the model's config, the tokenizer or the data cannot be read.
    """
    tokenizer, length = tokenizer_and_length(config)
    return TrainingRows(TokenStore.open(tokenised(config, tokenizer, length, progress=progress)), tokenizer, length)


def tokenised(
    config: Config, tokenizer: PreTrainedTokenizerFast, length: int, *, progress: Progress | None = None
) -> Path:
    """The folder of the store of the config's training rows, made if it is not there."""
    return prepare_store(
        config.dataset, config=config, tokenizer=tokenizer, max_seq_length=length, training=True, progress=progress
    )
