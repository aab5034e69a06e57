"""Exact match: find the final answer in a text and compare it as a number where it is one.

Pure functions of strings. Evaluation generates the texts; nothing here knows models or ranks.
"""

from __future__ import annotations

import re
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from types import FrameType
from typing import NoReturn

from seqaware.errors import ConfigError

# A sign, perhaps a currency sign on either side of it, digits with or without thousands separators, a fraction.
_NUMBER = re.compile(
    r"(?P<sign>[+-]?)\$?(?P<sign_after>[+-]?)"
    r"(?:(?P<grouped>[0-9]{1,3}(?:,[0-9]{3})+)|(?P<plain>[0-9]*))"
    r"(?:\.(?P<fraction>[0-9]*))?"
)
CPU_SECONDS = 2.0
"""A pattern may take so much CPU time on one text; most take a hundred thousandth of it."""


@lru_cache(maxsize=32)
def answer_pattern(pattern: str | re.Pattern[str]) -> re.Pattern[str]:
    """Compile `evaluation.answer_pattern`.

    Raises:
        ConfigError: it is no regular expression, or it has neither a group named `answer` nor a group 1.
    """
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise ConfigError(
            "evaluation.answer_pattern is not a regular expression", got=repr(pattern), do=str(error)
        ) from error
    if compiled.groups == 0:
        raise ConfigError(
            "evaluation.answer_pattern has no group for the answer",
            got=repr(pattern),
            do="put the answer in a group, such as (?P<answer>...)",
        )
    return compiled


def extract_answer(text: str, pattern: str | re.Pattern[str]) -> str | None:
    """The final answer in `text`: the last match's group `answer`, or its group 1; None when nothing matches.

    The last one, because a worked answer may name what looks like an answer on its way to the end.

    Raises:
        ConfigError: as `answer_pattern`; or the pattern takes more than CPU_SECONDS.
    """
    compiled = answer_pattern(pattern)
    group: str | int = "answer" if "answer" in compiled.groupindex else 1
    found: str | None = None
    with _limited_time(compiled.pattern):
        for match in compiled.finditer(text):
            found = match.group(group)
    return found


@contextmanager
def _limited_time(pattern: str) -> Iterator[None]:
    """Inside, a signal ends the search: `re` looks for signals while it backtracks.

    Other threads than the main one cannot handle signals, and are not limited.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def ring(signum: int, frame: FrameType | None) -> NoReturn:
        del signum, frame
        raise ConfigError(
            f"evaluation.answer_pattern takes more than {CPU_SECONDS:g} s for one text",
            got=repr(pattern),
            do="write it without repetitions of repetitions, such as (a+)+",
        )

    before = signal.signal(signal.SIGPROF, ring)
    signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0.0)
        signal.signal(signal.SIGPROF, before)


def normalise_answer(answer: str) -> str:
    """One spelling for equal answers: "1,234.0", "$1234." and "+1234" all become "1234".

    What is no number keeps its text, without the spaces and the full stop around it. Digits are handled as text, so
    a number of any length stays exact. Commas count as separators only where they part groups of three digits.
    """
    # What a sentence leaves behind a number: "18.", "18, ". A regular expression takes quadratic time for it.
    text = answer.strip()
    end = len(text)
    while end and (text[end - 1] in ".," or text[end - 1].isspace()):
        end -= 1
    text = text[:end]
    match = _NUMBER.fullmatch(text)
    if match is None or (match["sign"] and match["sign_after"]):
        return text
    whole = (match["grouped"] or match["plain"] or "").replace(",", "")
    fraction = match["fraction"] or ""
    if not whole and not fraction:
        return text
    whole, fraction = whole.lstrip("0") or "0", fraction.rstrip("0")
    number = f"{whole}.{fraction}" if fraction else whole
    negative = "-" in (match["sign"], match["sign_after"]) and number != "0"
    return f"-{number}" if negative else number


def exact_match(predicted: str | None, gold: str) -> bool:
    """Whether two extracted answers are equal once normalised. No answer (None) matches nothing."""
    return predicted is not None and normalise_answer(predicted) == normalise_answer(gold)
