"""Which prepared store belongs to a config: computed from the config and the files it names, without torch.

A store lies in <store_dir>/<request key>-<fingerprint>. The request key stands for what was asked for; the fingerprint,
for the tokens that came of it. For local data the key holds path, size and time of every file, for the hub its name and
revision: data of the hub is taken to stay the same until `dataset.revision` names another.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from seqaware.config.dataset_config import DatasetConfig, Source
from seqaware.config.schema import Config
from seqaware.data.resolve_source import Located, SourceSpec, locate
from seqaware.data.store.store_format import MANIFEST, read_manifest
from seqaware.errors import DataError
from seqaware.files import local_path

# Raise it whenever the same data, tokenizer and format would give other tokens or flags than before.
CODE_VERSION = 1
_FINGERPRINT_SHOWN = 16
_TOKENIZER_FILES = ("*.json", "*.model", "*.jinja", "vocab*", "merges*", "*.tiktoken")


def sources_of(dataset: DatasetConfig) -> list[SourceSpec]:
    """The one source, or the parts of the mixture."""
    return list(dataset.mixture) if dataset.mixture is not None else [dataset]


def store_folder(dataset: DatasetConfig) -> Path:
    """Where the token stores of a dataset lie."""
    return local_path(dataset.store_dir or "~/.cache/seqaware/stores")


def prepared_store(dataset: DatasetConfig) -> Path | None:
    """The store, where `dataset.name` is one itself.

    Raises:
        DataError: a store is part of a mixture, or rows of it are chosen or renamed; there is no such source.
    """
    found = [located.path for located in map(locate, sources_of(dataset)) if located.kind == "store"]
    if found and dataset.mixture is not None:
        raise DataError(f"{found[0]} is a prepared store and cannot be part of a mixture", do="name its source instead")
    if not found:
        return None
    # A run's config.yaml writes every key: what is written as its default asks for nothing.
    asked = [
        f"{key}: {getattr(dataset, key)}"
        for key, field in Source.model_fields.items()
        if getattr(dataset, key) != field.get_default(call_default_factory=True)
    ]
    if asked:
        raise DataError(
            f"{found[0]} is a prepared store, whose rows were chosen when it was made",
            got=", ".join(asked),
            do="leave these keys out, or name the store's source instead",
        )
    return found[0]


def request_key(config: Config, dataset: DatasetConfig) -> str:
    """What is asked for, as 16 hexadecimal digits.

    Raises:
        DataError: a source is not there.
    """
    model = config.model
    tokenizer = model.tokenizer or model.base_name or ""
    length = config.training.parameters.max_seq_length
    request = {
        "code": CODE_VERSION,
        "sources": [_source_request(source, locate(source)) for source in sources_of(dataset)],
        "format": config.format.model_dump(mode="json"),
        "tokenizer": _folder_or_name(tokenizer, model.revision if tokenizer == model.base_name else None),
        # Where no length is written the model's decides.
        "max_seq_length": length if length is not None else [model.base_name, model.revision, model.from_scratch],
    }
    return hashlib.sha256(json.dumps(request, sort_keys=True).encode()).hexdigest()[:16]


def store_name(key: str, fingerprint: str) -> str:
    """The name of the folder."""
    return f"{key}-{fingerprint[:_FINGERPRINT_SHOWN]}"


def find_store(config: Config, dataset: DatasetConfig | None = None) -> Path | None:
    """The newest complete store for what the config asks for, or None.

    Args:
        dataset: the dataset of the config that is meant: None for `config.dataset`, or `config.evaluation.dataset`.

    Raises:
        DataError: a source is not there, or the store is damaged.
    """
    dataset = config.dataset if dataset is None else dataset
    own = prepared_store(dataset)
    if own is not None:
        read_manifest(own)
        return own
    return next(iter(matching_stores(store_folder(dataset), request_key(config, dataset))), None)


def matching_stores(folder: Path, key: str, identity: dict[str, Any] | None = None) -> list[Path]:
    """The complete stores of a request, newest first.

    Args:
        identity: only those that were made by this tokenizer, format and length.

    Raises:
        DataError: one of them is damaged.
    """
    manifests = list(folder.glob(f"{key}-*/{MANIFEST}")) if folder.is_dir() else []
    manifests.sort(key=lambda file: file.stat().st_mtime_ns, reverse=True)
    stores = [file.parent for file in manifests]
    return [path for path in stores if identity is None or read_manifest(path).identity == identity]


def _source_request(source: SourceSpec, located: Located) -> dict[str, Any]:
    return {
        "name": [located.kind, located.hub.repository, located.hub.subset, located.hub.revision],
        "files": _stamps(located.local_files()),
        "split": source.split,
        "max_examples": source.max_examples,
        "columns": dict(sorted(source.columns.items())),
        "proportion": getattr(source, "proportion", None),
    }


def _folder_or_name(name: str, revision: str | None) -> list[Any]:
    folder = local_path(name)
    if not folder.is_dir():
        return [name, revision]
    return _stamps(sorted({file for pattern in _TOKENIZER_FILES for file in folder.glob(pattern)}))


def _stamps(files: Iterable[Path]) -> list[Any]:
    stamps = []
    for file in files:
        status = file.stat()
        stamps.append([str(file.resolve()), status.st_size, status.st_mtime_ns])
    return stamps
