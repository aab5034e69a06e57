"""Answers judged, one by one, and what they come to together, with the intervals that so many rows leave.

Pure functions of strings and numbers.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from seqaware.data.answers import exact_match, extract_answer
from seqaware.data.questions import Question
from seqaware.metrics.intervals import wilson

_RESAMPLES = 2000
_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


@dataclass(frozen=True)
class Answer:
    """A line of `answers.jsonl`.

    Attributes:
        generated: what the model wrote; None where choices were weighed. prediction: what was read out of it, or None.
        answer: what is right: one of these. f1: SQuAD's; None for other metrics.
        log_likelihoods: of every choice, by its label, in nats. normalised: whether the choice that is likeliest by
            its length in characters is right.
    """

    name: str
    prompt: str
    generated: str | None
    prediction: str | None
    answer: tuple[str, ...]
    correct: bool
    f1: float | None = None
    log_likelihoods: dict[str, float] | None = None
    normalised: bool | None = None

    def as_json(self) -> dict[str, Any]:
        optional = ("f1", "log_likelihoods", "normalised")
        return {key: value for key, value in asdict(self).items() if value is not None or key not in optional}


def judge_text(question: Question, text: str, *, metric: str, pattern: str) -> Answer:
    """What a generated text is worth."""
    found = extract_answer(text, pattern)
    right = question.references
    match metric:
        case "squad":
            f1 = max(squad_f1(found or "", each) for each in right)
            correct = found is not None and any(squad_normal(found) == squad_normal(each) for each in right)
            return Answer(question.name, question.prompt, text, found, right, correct, f1)
        case "choice":
            # Another word than a label is no answer at all.
            labels = {choice.label.casefold(): choice.label for choice in question.choices}
            found = labels.get((found or "").casefold())
            return Answer(question.name, question.prompt, text, found, right, found in right)
        case _:
            correct = any(exact_match(found, each) for each in right)
            return Answer(question.name, question.prompt, text, found, right, correct)


def judge_choices(question: Question, log_likelihoods: Sequence[float]) -> Answer:
    """Whether the likeliest choice is the right one: as it stands, and divided by its length in characters."""
    choices = question.choices
    by_label = {choice.label: value for choice, value in zip(choices, log_likelihoods, strict=True)}
    lengths = {choice.label: max(1, len(choice.text)) for choice in choices}
    best = max(by_label, key=lambda label: by_label[label])
    by_length = max(by_label, key=lambda label: by_label[label] / lengths[label])
    right = question.references
    return Answer(
        question.name,
        question.prompt,
        None,
        best,
        right,
        best in right,
        log_likelihoods=by_label,
        normalised=by_length in right,
    )


def scores(answers: Sequence[Answer], metric: str) -> dict[str, float | int]:
    """The metrics of a line of `metrics.jsonl`: each share with the ends of its 95 % interval as _low and _high.

    coverage is the share of rows in which an answer was found.
    """
    found: dict[str, float | int] = {"questions": len(answers)}
    name = "choice_accuracy" if metric.startswith("choice") else "exact_match"
    found |= _share(name, [answer.correct for answer in answers])
    if metric == "choice_likelihood":
        found |= _share("choice_accuracy_normalised", [bool(answer.normalised) for answer in answers])
    else:
        found["coverage"] = sum(answer.prediction is not None for answer in answers) / len(answers)
    if metric == "squad":
        values = np.array([answer.f1 for answer in answers], dtype=np.float64)
        low, high = bootstrap(values)
        found |= {"f1": float(values.mean()), "f1_low": low, "f1_high": high}
    return found


def _share(name: str, right: Sequence[bool]) -> dict[str, float]:
    share = sum(right) / len(right)
    low, high = wilson(share, len(right))
    return {name: share, f"{name}_low": low, f"{name}_high": high}


def bootstrap(values: NDArray[np.float64]) -> tuple[float, float]:
    """The 95 % percentile interval of the mean, from samples of the rows with replacement (B. Efron, 1979)."""
    chooser = np.random.default_rng(0)
    means = [values[chooser.integers(0, len(values), len(values))].mean() for _ in range(_RESAMPLES)]
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)


def squad_normal(text: str) -> str:
    """Small letters, no punctuation, no articles, single spaces: as SQuAD v1.1's official evaluation, in its order."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def squad_f1(predicted: str, right: str) -> float:
    """The harmonic mean of precision and recall over the words that both have, as SQuAD counts them."""
    words, wanted = squad_normal(predicted).split(), squad_normal(right).split()
    common = sum((Counter(words) & Counter(wanted)).values())
    return 2 * common / (len(words) + len(wanted)) if common else 0.0
