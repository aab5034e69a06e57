"""Exact match must call equal what a person calls equal, and nothing else."""

from __future__ import annotations

import signal
from concurrent.futures import ThreadPoolExecutor
from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from seqaware.data import answers
from seqaware.data.answers import answer_pattern, exact_match, extract_answer, normalise_answer
from seqaware.errors import ConfigError

GSM8K = r"####\s*(?P<answer>-?[\d.,]+)"


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("Adding 2 gives 5.\n#### 5", "5"),
        ("#### 1,234", "1,234"),
        ("####-7", "-7"),
        ("#### 3\nWait, once more.\n#### 4", "4"),
        ("The answer is 5.", None),
        ("", None),
    ],
)
def test_the_last_match_is_the_final_answer(text: str, answer: str | None) -> None:
    assert extract_answer(text, GSM8K) == answer


def test_the_named_group_wins_over_group_one() -> None:
    assert extract_answer("unit kg value 12", r"unit (\w+) value (?P<answer>\d+)") == "12"


def test_group_one_serves_when_no_group_is_named() -> None:
    assert extract_answer("answer: B", r"answer: ([A-D])") == "B"


@pytest.mark.parametrize(
    ("written", "normal"),
    [
        ("1,234.0", "1234"),
        ("$1,234", "1234"),
        ("-$5", "-5"),
        ("$-5", "-5"),
        ("+5", "5"),
        ("18.", "18"),
        ("18,", "18"),
        (" 18 \n", "18"),
        ("007", "7"),
        ("0", "0"),
        ("-0.0", "0"),
        (".50", "0.5"),
        ("0.25", "0.25"),
        ("1,234,567.890", "1234567.89"),
        ("100", "100"),
        # No grouping of thousands, so no number: nobody can say what was meant.
        ("1,2", "1,2"),
        ("1.2.3", "1.2.3"),
        ("--5", "--5"),
        ("-$-5", "-$-5"),
        ("$", "$"),
        ("-", "-"),
        ("blue.", "blue"),
        ("blue\u2003. .", "blue"),
        ("", ""),
    ],
)
def test_normal_spelling(written: str, normal: str) -> None:
    assert normalise_answer(written) == normal


@given(
    st.decimals(allow_nan=False, allow_infinity=False, places=4),
    st.decimals(allow_nan=False, allow_infinity=False, places=4),
)
def test_two_numbers_match_exactly_when_they_are_equal(first: Decimal, second: Decimal) -> None:
    assert exact_match(f"{first:f}", f"{second:f}") == (first == second)


@given(st.decimals(allow_nan=False, allow_infinity=False, places=2))
def test_the_spelling_of_a_number_does_not_matter(number: Decimal) -> None:
    for spelling in (f"{number:,f}", f"{number:f}.", f"${number:f}", f" {number:f}00"):
        if "." not in f"{number:f}" and spelling.endswith("00"):
            continue
        assert exact_match(spelling, f"{number:f}"), spelling


@given(st.text())
def test_normalising_twice_is_normalising_once(text: str) -> None:
    assert normalise_answer(normalise_answer(text)) == normalise_answer(text)


@pytest.mark.parametrize("text", [" " * 10**6 + "1", ". " * 10**6 + "x", "1" + "., " * 10**6, "1," * 10**6])
def test_a_long_answer_is_spelled_in_linear_time(text: str) -> None:
    """Quadratic time would be a quarter of an hour."""
    assert len(normalise_answer(text)) <= len(text)


@pytest.mark.parametrize("pattern", [r"(?P<answer>(a+)+)$", r"(?P<answer>(.*)*)z(.*)*z$"])
def test_a_pattern_that_takes_too_long_is_an_error(monkeypatch: pytest.MonkeyPatch, pattern: str) -> None:
    monkeypatch.setattr(answers, "CPU_SECONDS", 0.2)
    before = signal.getsignal(signal.SIGPROF)
    with pytest.raises(ConfigError, match=r"answer_pattern takes more than 0\.2 s for one text; got '\(\?P<answer>"):
        extract_answer("a" * 60 + "b", pattern)
    assert signal.getsignal(signal.SIGPROF) is before and signal.getitimer(signal.ITIMER_PROF)[0] == 0


def test_a_pattern_is_searched_in_any_thread() -> None:
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(extract_answer, "#### 7", r"#### (\d)").result() == "7"


def test_no_answer_matches_nothing() -> None:
    assert not exact_match(None, "5")
    assert not exact_match(None, "")


@pytest.mark.parametrize(("pattern", "message"), [("(", "not a regular expression"), (r"#### \d+", "no group")])
def test_a_pattern_that_cannot_serve_is_refused(pattern: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        answer_pattern(pattern)
