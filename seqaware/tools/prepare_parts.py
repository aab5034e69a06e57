"""The training rows of a config tokenised in parts, by an array of jobs on a cluster, and put together again."""

from __future__ import annotations

from pathlib import Path

from seqaware.config.schema import Config
from seqaware.data.store.store_index import prepared_store
from seqaware.data.store.store_parts import PartNumber, merge_parts, prepare_part
from seqaware.data.tokenization import Job, Progress, prepare_store
from seqaware.errors import DataError
from seqaware.training.prepare import tokenizer_and_length


def prepare_one_part(config: Config, part: PartNumber, *, progress: Progress | None) -> Path:
    """Tokenise a part of the training rows, if that is not done; returns its folder, or the store if all is done.

    Raises:
        ConfigError, DataError: as `prepare_data`; the dataset is a prepared store.
    """
    _refuse_prepared(config)
    tokenizer, length = tokenizer_and_length(config)
    job = Job.of(config.dataset, config=config, tokenizer=tokenizer, max_seq_length=length)
    return job.found() or prepare_part(job, part, progress=progress)


def merge_all_parts(config: Config, count: int, *, command: str, progress: Progress | None) -> list[Path]:
    """Make the training store of its parts, and the held-out store of its rows, which have no parts.

    Args:
        command: what a person types before ` --part I/N`, for the message when a part is missing.

    Raises:
        ConfigError, DataError: as `prepare_data`; parts are missing, torn, or of different data.
    """
    _refuse_prepared(config)
    tokenizer, length = tokenizer_and_length(config)
    job = Job.of(config.dataset, config=config, tokenizer=tokenizer, max_seq_length=length)
    stores = [merge_parts(job, count, command=command, progress=progress)]
    if config.evaluation.dataset is not None:
        stores.append(
            prepare_store(
                config.evaluation.dataset,
                config=config,
                tokenizer=tokenizer,
                max_seq_length=length,
                training=False,
                progress=progress,
            )
        )
    return stores


def _refuse_prepared(config: Config) -> None:
    own = prepared_store(config.dataset)
    if own is not None:
        raise DataError("dataset.name is a prepared store, which has no parts to make", got=own, do="train with it")
