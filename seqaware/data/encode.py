"""Examples to tokens: what a tokenising process does with a chunk of records.

`Recipe` is all that such a process needs, and can be sent to one. transformers (and with it torch) is imported in it
only where there are conversations.
"""

from __future__ import annotations

import itertools
import pickle
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from seqaware.data.sources import Record
from seqaware.data.splitting import split_document
from seqaware.data.store.store_format import COUNTED_FIELDS
from seqaware.data.store.store_writer import Block
from seqaware.data.templates import Example, Format, Renderer, Segment, fields_of
from seqaware.errors import ConfigError, DataError, SeqawareError

NO_SUPERVISION = "no supervised token"
PIECE_NO_SUPERVISION = "piece without a supervised token"
OVERLONG = "longer than max_seq_length"
EMPTY = "empty"
TEXT_BYTES = 6 * 2**20
"""An example may have so much text, as UTF-8: a tokenizer takes 160 times its size in memory. Long novels have 5 MB."""
_DUMMY_SPACE = "\u2581"
_ANCHOR = "\n"


@dataclass(frozen=True)
class Recipe:
    """How records become tokens.

    Attributes:
        tokenizer_json: the tokenizer as `tokenizers` serialises it.
        prefix_ids: special tokens that the tokenizer puts at the front of a text.
        bos_id, eos_id: the tokenizer's, if it has them.
        chat_tokenizer: the transformers tokenizer, pickled; unpickled only for conversations.
    """

    tokenizer_json: str
    prefix_ids: tuple[int, ...]
    bos_id: int | None
    eos_id: int
    chat_tokenizer: bytes
    chat_template: str | None
    form: Format
    max_seq_length: int
    on_overlong: Literal["truncate", "drop", "split", "error"]
    append_eos: bool


@dataclass
class Outcome:
    """What became of a chunk of records."""

    block: Block
    dropped: list[tuple[str, str]] = field(default_factory=list)
    truncated: int = 0
    split: int = 0


@dataclass(frozen=True)
class Prompt:
    """What stands before a record's first answer, as text and as ids, and the answer itself as text."""

    text: str
    ids: tuple[int, ...]
    completion: str


@dataclass(frozen=True)
class _Tokens:
    """One example, tokenised: [n] each."""

    ids: NDArray[np.uint32]
    supervised: NDArray[np.bool_]
    turn_start: NDArray[np.bool_]
    weights: NDArray[np.float32] | None


@contextmanager
def tokenizer_errors(what: str = "the tokenizer") -> Iterator[None]:
    """Inside, whatever the tokenizers library or transformers raise becomes a ConfigError.

    The library raises `Exception` itself, and a panic of its Rust code is no `Exception`.
    """
    try:
        yield
    except SeqawareError:
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        got = " ".join(str(error).split())[:300]
        do = "write a folder or hub id that holds another one as model.tokenizer"
        raise ConfigError(f"{what} cannot be used", got=got, do=do) from error


class TextEncoder:
    """Texts to ids as they continue what stands before them: no special tokens are added.

    Tokenizers of SentencePiece's kind put a space before every text. Between a prompt and a completion there is none,
    so for them a text is encoded behind a line break, which is then cut off.
    """

    def __init__(self, tokenizer_json: str) -> None:
        with tokenizer_errors():
            self._tokenizer: Any = Tokenizer.from_str(tokenizer_json)
            self._tokenizer.no_truncation()
            self._tokenizer.no_padding()
        first = self._plain(["a"])[0][:1]
        dummy = bool(first) and str(self._tokenizer.id_to_token(first[0])).startswith(_DUMMY_SPACE)
        self._anchor_ids = self._plain([_ANCHOR])[0] if dummy else []

    def opening(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of texts with which a sequence begins."""
        return self._plain(texts)

    def continuing(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of texts that stand behind other text."""
        if not self._anchor_ids:
            return self._plain(texts)
        cut = len(self._anchor_ids)
        anchored = self._plain([_ANCHOR + text for text in texts])
        # Where the line break itself merged with the text, the text alone is the better reading.
        return [
            ids[cut:] if ids[:cut] == self._anchor_ids else self._plain([text])[0]
            for ids, text in zip(anchored, texts, strict=True)
        ]

    def _plain(self, texts: Sequence[str]) -> list[list[int]]:
        with tokenizer_errors():
            return [
                encoding.ids
                for batch in _batches(texts)
                for encoding in self._tokenizer.encode_batch_fast(batch, add_special_tokens=False)
            ]


class ExampleEncoder:
    """Records to tokens by a recipe."""

    def __init__(self, recipe: Recipe) -> None:
        self._recipe = recipe
        self._texts = TextEncoder(recipe.tokenizer_json)
        self._renderer = Renderer(recipe.form)
        self._chat: Any = None

    def encode(self, records: Sequence[Record]) -> Outcome:
        """The documents of records of one prefix.

        Raises:
            DataError: a record that cannot be used, by name.
        """
        examples = self._examples(records)
        encoded = self._encode_segments(examples)
        builder = _BlockBuilder(self._recipe, records[0].prefix)
        for record, example, segments in zip(records, examples, encoded, strict=True):
            builder.add(record, example, segments)
        return builder.outcome()

    def prompt(self, record: Record) -> Prompt:
        """What a model is given to answer a record, tokenised as for training.

        Raises:
            DataError: the record cannot be used, or has no prompt.
        """
        (example,) = self._examples([record])
        turns = [index for index, segment in enumerate(example.segments) if segment.turn]
        if not turns or turns[0] == 0:
            do = "evaluate rows with a question and an answer, a prompt and a completion, or messages"
            raise DataError(f"{record.name}: there is no prompt to answer", do=do)
        before, after = example.segments[: turns[0]], example.segments[turns[0] :]
        encoded = self._encode_segments([replace(example, segments=before)])[0]
        ids = [*_opened(self._recipe, example, encoded[0]), *itertools.chain(*encoded[1:])]
        return Prompt("".join(each.text for each in before), tuple(ids), "".join(each.text for each in after))

    def choices(self, record: Record) -> list[tuple[str, str, tuple[int, ...]]]:
        """Of a question with choices: (label, text, ids of the completion that says it).

        Raises:
            DataError: the record has no choices.
        """
        found = self._renderer.choices(record.fields, record.name)
        encoded = self._texts.continuing([completion for _, _, completion in found])
        return [(label, text, tuple(ids)) for (label, text, _), ids in zip(found, encoded, strict=True)]

    def _examples(self, records: Sequence[Record]) -> list[Example]:
        rows = [(fields_of(record.fields, self._recipe.form.columns, record.name), record.name) for record in records]
        wants = [self._renderer.wants_messages(fields) for fields, _ in rows]
        talks = [row for row, is_talk in zip(rows, wants, strict=True) if is_talk]
        rendered: Iterator[Example] = iter(self._chat_process().examples(talks) if talks else ())
        return [
            _bounded(next(rendered) if is_talk else self._renderer.example(*row), row[1])
            for row, is_talk in zip(rows, wants, strict=True)
        ]

    def _chat_process(self) -> Any:
        if self._chat is None:
            from seqaware.data.chat import ChatRenderer
            from seqaware.data.chat_process import ChatProcess

            tokenizer = pickle.loads(self._recipe.chat_tokenizer)
            form = self._recipe.form
            renderer = ChatRenderer(tokenizer, chat_template=self._recipe.chat_template, train_on=form.train_on)
            self._chat = ChatProcess(renderer)
        return self._chat

    def _encode_segments(self, examples: Sequence[Example]) -> list[list[list[int]]]:
        """Ids of every segment of every example, in two calls of the tokenizer for the whole chunk."""
        first = iter(self._texts.opening([example.segments[0].text for example in examples if example.segments]))
        rest = iter(self._texts.continuing([each.text for example in examples for each in example.segments[1:]]))
        return [
            [next(first), *(next(rest) for _ in example.segments[1:])] if example.segments else []
            for example in examples
        ]


def _batches(texts: Iterable[str]) -> Iterator[list[str]]:
    """The texts in groups of at most TEXT_BYTES characters, or of one text."""
    batch: list[str] = []
    size = 0
    for text in texts:
        if batch and size + len(text) > TEXT_BYTES:
            yield batch
            batch, size = [], 0
        batch.append(text)
        size += len(text)
    if batch:
        yield batch


def _bounded(example: Example, name: str) -> Example:
    size = sum(len(segment.text.encode("utf-8", "surrogatepass")) for segment in example.segments)
    if size > TEXT_BYTES:
        what = f"{name}: an example may have {TEXT_BYTES // 2**20} MiB of text"
        raise DataError(what, got=f"{size:,} bytes", do="split it into several rows")
    return example


class _BlockBuilder:
    """Collects the documents of one chunk."""

    def __init__(self, recipe: Recipe, prefix: str) -> None:
        self._recipe = recipe
        self._prefix = prefix
        self._documents: list[_Tokens] = []
        self._rows: list[int] = []
        self._counted: dict[int, tuple[int, ...]] = {}
        self._dropped: list[tuple[str, str]] = []
        self._truncated = 0
        self._split = 0

    def add(self, record: Record, example: Example, encoded: list[list[int]]) -> None:
        limit = self._recipe.max_seq_length
        if not any(encoded) and example.opening == "separator":
            self._drop(record, EMPTY)
            return
        tokens = self._join(record, example, encoded)
        length = len(tokens.ids)
        if length > limit:
            match self._recipe.on_overlong:
                case "error":
                    do = "raise training.parameters.max_seq_length, or write another format.on_overlong"
                    raise DataError(f"{record.name}: longer than {limit} tokens", got=f"{length} tokens", do=do)
                case "drop":
                    self._drop(record, OVERLONG)
                    return
                case "split":
                    self._add_pieces(record, tokens)
                    return
                case "truncate":
                    self._truncated += 1
                    tokens = _cut(tokens, 0, limit)
        if tokens.supervised[1:].any():
            self._keep(record, tokens)
        else:
            self._drop(record, NO_SUPERVISION)

    def outcome(self) -> Outcome:
        documents = self._documents
        counted = None
        if self._counted:
            counted = np.zeros((len(documents), COUNTED_FIELDS), dtype=np.int32)
            for index, values in self._counted.items():
                counted[index] = values
        weights = None
        if any(each.weights is not None for each in documents):
            ones = [
                np.ones(len(each.ids), dtype=np.float32) if each.weights is None else each.weights for each in documents
            ]
            weights = np.concatenate(ones)
        block = Block(
            tokens=np.concatenate([np.empty(0, np.uint32), *(each.ids for each in documents)]),
            supervised=np.concatenate([np.empty(0, np.bool_), *(each.supervised for each in documents)]),
            turn_start=np.concatenate([np.empty(0, np.bool_), *(each.turn_start for each in documents)]),
            weights=weights,
            lengths=np.array([len(each.ids) for each in documents], dtype=np.int64),
            rows=np.array(self._rows, dtype=np.int64),
            counted=counted,
            prefix=self._prefix,
        )
        return Outcome(block, self._dropped, self._truncated, self._split)

    def _join(self, record: Record, example: Example, encoded: list[list[int]]) -> _Tokens:
        """The segments of an example behind one another, with what opens and ends it."""
        ids = _opened(self._recipe, example, encoded[0] if encoded else [])
        opening = len(ids) - len(encoded[0]) if encoded else 0
        lengths = [len(ids), *map(len, encoded[1:])]
        for each in encoded[1:]:
            ids += each
        if self._recipe.append_eos and example.ends and ids[-1:] != [self._recipe.eos_id]:
            ids.append(self._recipe.eos_id)
            lengths[-1] += 1
        supervised = np.repeat([segment.supervised for segment in example.segments], lengths)
        turn_start = np.zeros(len(ids), dtype=np.bool_)
        begins = np.cumsum([0, *lengths[:-1]])
        for segment, begin, length in zip(example.segments, begins, lengths, strict=True):
            turn_start[begin : begin + 1] |= segment.turn and length > 0
        weights = None
        if any(segment.weights != 1.0 for segment in example.segments):
            per_segment = [
                _token_weights(segment, len(own), length, front=opening if index == 0 else 0, name=record.name)
                for index, (segment, own, length) in enumerate(zip(example.segments, encoded, lengths, strict=True))
            ]
            weights = np.concatenate(per_segment)
            supervised = supervised & (weights > 0)
        return _Tokens(np.array(ids, dtype=np.uint32), supervised, turn_start, weights)

    def _add_pieces(self, record: Record, tokens: _Tokens) -> None:
        if not tokens.supervised[1:].any():
            self._drop(record, NO_SUPERVISION)
            return
        self._split += 1
        for piece in split_document(tokens.supervised, tokens.turn_start, self._recipe.max_seq_length):
            part = _cut(tokens, piece.begin, piece.end)
            if not part.supervised[1:].any():
                self._drop(record, PIECE_NO_SUPERVISION)
                continue
            if piece.begin > 0:
                # The token in common was predicted, and counted, in the piece before.
                part.supervised[0] = part.turn_start[0] = False
            self._counted[len(self._documents)] = piece.counted
            self._keep(record, part)

    def _keep(self, record: Record, tokens: _Tokens) -> None:
        self._documents.append(tokens)
        self._rows.append(record.number)

    def _drop(self, record: Record, reason: str) -> None:
        self._dropped.append((record.name, reason))


def _opened(recipe: Recipe, example: Example, ids: list[int]) -> list[int]:
    match example.opening:
        case "tokenizer":
            return _open(list(recipe.prefix_ids), ids)
        case "separator":
            return _open([] if recipe.bos_id is None else [recipe.bos_id], ids)
        case "none":
            return list(ids)


def _open(opening: list[int], ids: list[int]) -> list[int]:
    """The opening tokens once, also where the text brings them itself."""
    return list(ids) if opening and ids[: len(opening)] == opening else opening + ids


def _cut(tokens: _Tokens, begin: int, end: int) -> _Tokens:
    return _Tokens(
        tokens.ids[begin:end],
        tokens.supervised[begin:end].copy(),
        tokens.turn_start[begin:end].copy(),
        None if tokens.weights is None else tokens.weights[begin:end],
    )


def _token_weights(segment: Segment, own: int, length: int, *, front: int, name: str) -> NDArray[np.float32]:
    """Factors of a segment's tokens: `own` of text, `front` special ones before, and perhaps EOS behind them."""
    if isinstance(segment.weights, float):
        return np.full(length, segment.weights, dtype=np.float32)
    given = len(segment.weights)
    if given not in (own, length - front):
        what = f"{name}: a list of weights must have one for each token of the completion"
        raise DataError(what, got=f"{given} weights for {own} tokens (without EOS)")
    weights = np.ones(length, dtype=np.float32)
    weights[front : front + given] = segment.weights
    return weights
