"""What a person writes about data: sources, how a row becomes a prompt and a completion, and the held-out rows."""

from __future__ import annotations

import re
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from seqaware.config.values import (
    AnyText,
    Count,
    Flag,
    LocalName,
    Minutes,
    NonNegative,
    Positive,
    PositiveShare,
    Processes,
    Section,
    Seed,
    Text,
)

_LEAST_TEMPERATURE = 1e-6
GENERATED = ("exact_match", "squad", "choice")
# Where the answer stands, if answer_pattern is not written: behind GSM8K's mark, on the first line, at the front.
_PATTERNS = {
    "exact_match": r"####\s*(?P<answer>-?[\d.,]+)",
    "squad": r"\A\s*(?P<answer>[^\n]*[^\s])",
    "choice": r"\A\W*(?P<answer>[A-Za-z0-9]+)\b",
}


class Source(Section):
    """Where rows come from."""

    split: Text = "train"
    """The split, also sliced as `datasets` writes it (train[:10%])."""
    subset: Text | None = None
    """The hub's configuration name of the dataset (main, en, 20231101.en …)."""
    revision: Text | None = None
    """Branch, tag or commit on the hub."""
    max_examples: Count | None = None
    """Read no more rows than this."""
    columns: dict[str, Text] = Field(default_factory=dict)
    """What the data calls a field, such as {question: problem}."""


class MixturePart(Source):
    """One of several sources."""

    name: LocalName
    """Short name, hub id, file or folder."""
    proportion: Positive | None = None
    """Share of the mixture, relative to the other parts; null: all rows, once. Written for every part or for none."""


class DatasetConfig(Source):
    """The rows: one source (`name`) or several (`mixture`)."""

    name: LocalName | None = None
    """Short name (gsm8k, squad, c4 …), hub id, file (jsonl, json, csv, parquet, txt), folder, or a prepared store."""
    streaming: Flag | None = None
    """Read rows without downloading the whole; null: when max_examples is written and the source is on the hub."""
    mixture: Annotated[list[MixturePart], Field(min_length=1)] | None = None
    """Several sources instead of name."""
    store_dir: LocalName | None = None
    """Folder of the tokenised data; null: ~/.cache/seqaware/stores."""
    workers: Processes | None = None
    """Processes that tokenise; null: one a core."""

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        named = self.written("name", "mixture")
        if len(named) != 1:
            found = "both are written" if named else "neither is written"
            raise ValueError(f"exactly one of name and mixture is needed; {found}")
        if self.mixture is None:
            return self
        of_a_part = [key for key in Source.model_fields if key in self.model_fields_set and getattr(self, key)]
        if of_a_part:
            raise ValueError(f"with a mixture, {', '.join(of_a_part)} belongs to each of its parts")
        given = [part.proportion is not None for part in self.mixture]
        if any(given) and not all(given):
            raise ValueError("proportion must be written for every part of the mixture, or for none")
        return self


class FormatConfig(Section):
    """How a row becomes a prompt and a completion."""

    prompt_template: AnyText | None = None
    """Text before the completion, with {fields}; null: the row's own prompt, messages or text."""
    answer_template: AnyText = " {answer}"
    """Text of the completion, with {fields}."""
    train_on: Literal["completion", "all"] | None = None
    """Which tokens carry loss; null: completion where there is a prompt, else all."""
    on_overlong: Literal["truncate", "drop", "split", "error"] = "truncate"
    """What happens to an example longer than max_seq_length."""
    append_eos: Flag = True
    """End every example with the tokenizer's end-of-sequence token."""
    chat_template: AnyText | None = None
    """Jinja template for rows with messages; null: the tokenizer's."""


class EvaluationConfig(Section):
    """Held-out rows."""

    dataset: DatasetConfig | None = None
    """The held-out rows, as in the section dataset; null: no evaluation."""
    every_steps: Count | None = None
    """Evaluate every so many optimizer steps; null, and every_minutes too: only at the beginning and the end."""
    every_minutes: Minutes | None = None
    """Evaluate every so many minutes, by the clock of rank 0; may be written beside every_steps."""
    metric: Literal["exact_match", "squad", "choice", "choice_likelihood", "none"] = "none"
    """Answers, compared with the rows': as numbers (exact_match), as SQuAD does (squad), by the letter of a choice
    (choice), or the likeliest of the choices (choice_likelihood); none: the loss only."""
    max_new_tokens: Count = 256
    """Tokens an answer may have."""
    batch_size: Count | None = None
    """Prompts answered at once, on each rank; null: as many as memory allows."""
    temperature: NonNegative = 0.0
    """0: the likeliest token each time; else answers are drawn, from logits divided by this."""
    top_p: PositiveShare = 1.0
    """Draw from the likeliest tokens that together have this probability."""
    seed: Seed = 42
    """Of the draws; each row has its own, whatever the ranks and batches."""
    stop: list[Text] = Field(default_factory=list)
    """Texts that end an answer, besides the end-of-sequence token; they are cut off."""
    answer_pattern: Text | None = None
    """Regular expression that finds the final answer, in its group `answer`; null: behind ####, for squad the first
    line, for choice the first word."""

    @property
    def pattern(self) -> str:
        """The regular expression, written or not. For metrics that generate."""
        return self.answer_pattern or _PATTERNS[self.metric]

    @model_validator(mode="after")
    def _checked(self) -> Self:
        if self.dataset is None and (self.written("every_steps", "every_minutes") or self.metric != "none"):
            raise ValueError("every_steps, every_minutes and metric need held-out rows: write evaluation.dataset")
        if 0 < self.temperature < _LEAST_TEMPERATURE:  # logits / temperature overflow float32
            raise ValueError(f"temperature must be 0, or at least {_LEAST_TEMPERATURE:g}; got {self.temperature:g}")
        if self.answer_pattern is None:
            return self
        try:
            groups = re.compile(self.answer_pattern).groupindex
        # The other two: a pattern nested thousands of levels deep, and a repetition {n} beyond 2^32.
        except (re.error, RecursionError, OverflowError) as error:
            raise ValueError(f"answer_pattern is no regular expression ({error}): {self.answer_pattern!r}") from error
        if "answer" not in groups:
            raise ValueError(f"answer_pattern needs a group (?P<answer>…); got {self.answer_pattern!r}")
        return self
