"""From a config to a prepared token store: once per node, whoever comes first."""

from __future__ import annotations

import hashlib
import json
import math
import os
import pickle
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from seqaware.config.dataset_config import DatasetConfig
from seqaware.config.schema import Config, ModelConfig
from seqaware.data.encode import Recipe, tokenizer_errors
from seqaware.data.encode_pool import encode_records
from seqaware.data.sources import Record, open_source
from seqaware.data.store.store_format import Tally
from seqaware.data.store.store_index import (
    CODE_VERSION,
    matching_stores,
    prepared_store,
    request_key,
    sources_of,
    store_folder,
    store_name,
)
from seqaware.data.store.store_writer import disk_errors, remove_unfinished
from seqaware.data.store.token_store import StoreWriter, TokenStore
from seqaware.data.templates import Format
from seqaware.errors import ConfigError, DataError
from seqaware.files import JSON_BYTES, MalformedError, local_path, parse_json, read_text
from seqaware.locks import acquire

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

Progress = Callable[[int], None]
_TRIAL = "a 1.\n\té\U0001f642"
_SMALL_FILES = (
    *("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "config.json", "chat_template.json"),
    "chat_template.jinja",
)
_TOKENIZER_BYTES = 64 * 2**20
"""The largest known tokenizer.json have 35 MB, and two million values."""
_TOKENIZER_VALUES = 5_000_000
_EXPANSION = 64


def load_tokenizer(model: ModelConfig) -> PreTrainedTokenizerFast:
    """The tokenizer of the config: `model.tokenizer`, or else the base model's.

    Raises:
        ConfigError: it cannot be read, is not a fast one, or has no EOS.
    """
    from transformers import AutoTokenizer

    name = model.tokenizer or model.base_name
    assert name is not None, "the schema demands one of them"
    folder = local_path(name)
    _check_files(folder, name)
    what = f"the tokenizer {name!r}"
    with tokenizer_errors(what):
        try:
            tokenizer: Any = AutoTokenizer.from_pretrained(
                str(folder) if folder.is_dir() else name,
                revision=model.revision if name == model.base_name else None,
                trust_remote_code=model.trust_remote_code,
                use_fast=True,
            )
        except Exception as error:
            refuse_custom_code(error, what)
            raise
    if not tokenizer.is_fast:
        raise ConfigError(
            f"the tokenizer {name!r} has no fast version (tokenizer.json)", do="convert it, or name another"
        )
    _eos_id(tokenizer, name)
    with tokenizer_errors(what):
        tokenizer.decode(tokenizer.encode(_TRIAL), skip_special_tokens=True)
    fast: PreTrainedTokenizerFast = tokenizer
    return fast


def refuse_custom_code(error: Exception, what: str) -> None:
    """Raise a better error where transformers refused to run code that comes with a model; else nothing happens.

    Raises:
        ConfigError: `error` is that refusal.
    """
    if "custom code" in str(error):
        raise ConfigError(
            f"{what} comes with code of its own, which was not run",
            do="name a model that transformers knows; or read that code, and write model.trust_remote_code: true",
        ) from error


def recipe_of(
    dataset: DatasetConfig, *, config: Config, tokenizer: PreTrainedTokenizerFast, max_seq_length: int
) -> Recipe:
    """How this config makes tokens of the records of a dataset (or of a mixture's part: only its columns differ)."""
    form = config.format
    backend = tokenizer.backend_tokenizer
    return Recipe(
        tokenizer_json=backend.to_str(),
        prefix_ids=_prefix_ids(tokenizer),
        bos_id=tokenizer.bos_token_id,
        eos_id=_eos_id(tokenizer, tokenizer.name_or_path),
        chat_tokenizer=pickle.dumps(tokenizer),
        chat_template=form.chat_template,
        form=Format(form.prompt_template, form.answer_template, form.train_on, dict(dataset.columns)),
        max_seq_length=max_seq_length,
        on_overlong=form.on_overlong,
        append_eos=form.append_eos,
    )


@dataclass(frozen=True)
class Job:
    """A store that is wanted: of which rows, made how, and where it shall lie.

    Attributes:
        path: of the store, without the fingerprint that its name ends with.
        identity: what makes the tokens; stores of other ones are not this one.
        section: what messages call the dataset.
    """

    dataset: DatasetConfig
    recipe: Recipe
    path: Path
    vocab_size: int
    identity: dict[str, Any]
    section: str

    @classmethod
    def of(
        cls,
        dataset: DatasetConfig,
        *,
        config: Config,
        tokenizer: PreTrainedTokenizerFast,
        max_seq_length: int,
        training: bool = True,
    ) -> Job:
        """The job of a dataset that is not a prepared store itself.

        Raises:
            DataError: a source is not there.
        """
        identity = {
            "code": CODE_VERSION,
            "tokenizer": _tokenizer_digest(tokenizer),
            "format": config.format.model_dump(mode="json"),
            "max_seq_length": max_seq_length,
        }
        return cls(
            dataset,
            recipe=recipe_of(dataset, config=config, tokenizer=tokenizer, max_seq_length=max_seq_length),
            path=store_folder(dataset) / request_key(config, dataset),
            vocab_size=len(tokenizer),
            identity=identity,
            section="dataset" if training else "evaluation.dataset",
        )

    def found(self) -> Path | None:
        """The newest store of this job that is complete, if its files are there in their sizes.

        Raises:
            DataError: it is damaged.
        """
        stores = matching_stores(self.path.parent, self.path.name, self.identity)
        if not stores:
            return None
        store = TokenStore.open(stores[0])
        facts = store.facts()
        # They follow from the tokenizer, whose digest is in the identity.
        if (facts.vocab_size, facts.eos_id) != (self.vocab_size, self.recipe.eos_id):
            got = f"a vocabulary of {facts.vocab_size} with EOS {facts.eos_id}"
            do = "delete the folder and prepare the data again"
            raise DataError(f"the token store {store.path} is corrupt: its manifest contradicts itself", got=got, do=do)
        return store.path

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Inside, no other process on this file system writes this store."""
        with disk_errors(self.path.parent):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            lock = acquire(self.path.with_name(f"{self.path.name}.lock"))
        try:
            yield
        finally:
            lock.release()

    def writer(self, path: Path | None = None) -> StoreWriter:
        """A writer of the store, or of a part of it that shall lie at `path`."""
        return StoreWriter(
            path or self.path,
            vocab_size=self.vocab_size,
            eos_id=self.recipe.eos_id,
            max_seq_length=self.recipe.max_seq_length,
            identity=self.identity,
        )

    def write(
        self,
        writer: StoreWriter,
        *,
        columns: Mapping[str, str],
        records: Iterable[Record],
        progress: Progress | None,
    ) -> None:
        """Tokenise records of one source into a store.

        Raises:
            DataError: a record that cannot be used.
        """
        recipe = replace(self.recipe, form=replace(self.recipe.form, columns=dict(columns)))
        workers = self.dataset.workers or len(os.sched_getaffinity(0))
        for count, outcome in encode_records(recipe, records, workers=workers):
            writer.append_block(outcome.block)
            for name, reason in outcome.dropped:
                writer.tally.drop(name, reason)
            writer.tally.add(Tally(records=count, truncated=outcome.truncated, split=outcome.split))
            if progress is not None:
                progress(writer.tally.records)

    def finish(self, writer: StoreWriter) -> Path:
        """Put the whole store in its place.

        Raises:
            DataError: there is nothing to train on; no space.
        """
        if writer.supervised_tokens == 0:
            reasons = ", ".join(f"{count} {reason}" for reason, count in writer.tally.dropped.items())
            raise DataError(
                f"{self.section} has no example with a supervised token",
                got=f"{writer.tally.records} rows: {reasons}",
                do="raise training.parameters.max_seq_length if prompts fill it, or correct the templates and train_on",
            )
        return writer.finish(lambda fingerprint: store_name(self.path.name, fingerprint))


def empty_source(name: str) -> DataError:
    """A source without rows: most likely not the one that was meant."""
    return DataError(f"the dataset {name} is empty", got="no rows", do="correct its name or split")


def prepare_store(
    dataset: DatasetConfig,
    *,
    config: Config,
    tokenizer: PreTrainedTokenizerFast,
    max_seq_length: int,
    training: bool = True,
    progress: Progress | None = None,
) -> Path:
    """The token store of a dataset: found, or made by this process while the others on the node wait.

    Args:
        training: False for `evaluation.dataset`; messages name the section.
        progress: called with the number of rows done so far; not called where the store was found.

    Raises:
        DataError: a source, a record or a store that cannot be used; no space; nothing to train on.
        ConfigError: the templates or the tokenizer do not fit.
    """
    own = prepared_store(dataset)
    if own is not None:
        return _verified(_fitting(own, tokenizer, max_seq_length))
    job = Job.of(dataset, config=config, tokenizer=tokenizer, max_seq_length=max_seq_length, training=training)
    # First without the lock: a folder of stores may be there to read only.
    found = job.found()
    if found is not None:
        return _verified(found)
    with job.locked():
        found = job.found()
        if found is not None:
            return found  # made while we waited
        remove_unfinished(job.path)
        with job.writer() as writer:
            _write_sources(job, writer, progress)
            return job.finish(writer)


def _write_sources(job: Job, writer: StoreWriter, progress: Progress | None) -> None:
    for each in sources_of(job.dataset):
        source = open_source(each, streaming=job.dataset.streaming)
        before = writer.tally.records
        job.write(writer, columns=each.columns, records=source.records(), progress=progress)
        if writer.tally.records == before:
            raise empty_source(source.name)
        writer.end_part(source.name, getattr(each, "proportion", None))


def _verified(path: Path) -> Path:
    """A store of an earlier run, once its contents are what was written then."""
    with disk_errors(path):
        TokenStore.open(path).verify_once()
    return path


def _fitting(path: Path, tokenizer: PreTrainedTokenizerFast, max_seq_length: int) -> Path:
    """A prepared store that was named outright: it must fit what the run is about to do with it."""
    facts = TokenStore.open(path).facts()
    if facts.vocab_size != len(tokenizer) or facts.eos_id != tokenizer.eos_token_id:
        got = f"a vocabulary of {facts.vocab_size} with EOS {facts.eos_id}"
        have = f"the tokenizer has {len(tokenizer)} with EOS {tokenizer.eos_token_id}"
        raise DataError(f"the token store {path} was made by another tokenizer", got=got, do=have)
    if facts.longest > max_seq_length:
        do = "raise training.parameters.max_seq_length, or prepare the data again"
        raise DataError(
            f"the token store {path} holds documents longer than a row", got=f"{facts.longest} tokens", do=do
        )
    return path


def _eos_id(tokenizer: Any, name: str) -> int:
    if tokenizer.eos_token_id is None:
        do = "set eos_token in its tokenizer_config.json"
        raise ConfigError(f"the tokenizer {name!r} has no end-of-sequence token", do=do)
    return int(tokenizer.eos_token_id)


def _prefix_ids(tokenizer: PreTrainedTokenizerFast) -> tuple[int, ...]:
    """The special tokens that the tokenizer puts before a text. Those behind it would stand before the completion."""
    with tokenizer_errors(f"the tokenizer {tokenizer.name_or_path!r}"):
        plain = tokenizer.encode("a", add_special_tokens=False)
        full = tokenizer.encode("a", add_special_tokens=True)
    for begin in range(len(full) - len(plain) + 1):
        if full[begin : begin + len(plain)] == plain:
            return tuple(full[:begin])
    raise ConfigError(f"the tokenizer {tokenizer.name_or_path!r} changes a text when it adds special tokens")


def _tokenizer_digest(tokenizer: PreTrainedTokenizerFast) -> str:
    """What the tokenizer is, by its content: the same wherever it was loaded from."""
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    content.update(truncation=None, padding=None)
    own = [content, tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.chat_template]
    return hashlib.sha256(json.dumps(own, sort_keys=True).encode()).hexdigest()


def _check_files(folder: Path, name: str) -> None:
    """Refuse files that transformers and the tokenizers library would read without bounds."""
    for file in (*_SMALL_FILES, "tokenizer.json"):
        if not (folder / file).is_file():
            continue
        try:
            _check_file(folder / file)
        except (OSError, MalformedError) as error:
            raise ConfigError(f"the tokenizer {name!r} is damaged: {file} cannot be used", got=error) from error


def _check_file(path: Path) -> None:
    text = read_text(path, limit=JSON_BYTES if path.name in _SMALL_FILES else _TOKENIZER_BYTES)
    if path.suffix != ".json":
        return
    if text.count(",") + text.count("[") + text.count("{") > _TOKENIZER_VALUES:
        raise MalformedError(f"more than {_TOKENIZER_VALUES:,} values")
    value = parse_json(text)
    for part in ("normalizer", "decoder"):
        if isinstance(value, dict) and _expansion(value.get(part)) > _EXPANSION:
            raise MalformedError(f"its {part} makes texts more than {_EXPANSION} times longer")


def _expansion(part: Any) -> int:
    """How many times longer a normalizer or a decoder may make a text, one character replaced by many."""
    match part:
        case {"type": "Sequence", "normalizers": [*parts]} | {"type": "Sequence", "decoders": [*parts]}:
            return math.prod(map(_expansion, parts))
        case {"type": "Replace", "content": str(content)}:
            return max(1, len(content))
        case _:
            return 1
