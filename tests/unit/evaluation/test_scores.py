"""Answers judged by hand-made cases."""

from __future__ import annotations

import numpy as np
import pytest

from seqaware.data.questions import Choice, Question
from seqaware.evaluation.scores import bootstrap, judge_choices, judge_text, scores, squad_f1, squad_normal

CHOICES = (Choice("A", "a", (1,)), Choice("B", "a long marsh", (2, 3)))
FIRST_LINE = r"\A\s*(?P<answer>[^\n]*[^\s])"


def question(*right: str, choices: tuple[Choice, ...] = ()) -> Question:
    return Question("rows:1", "Q", (5,), right, choices)


def test_squad_compares_without_case_punctuation_and_articles() -> None:
    assert squad_normal("The  Denver-Broncos, an NFL team!") == "denverbroncos nfl team"
    assert squad_f1("Levi's Stadium in Santa Clara", "levis stadium") == pytest.approx(2 * 1.0 * 0.4 / 1.4)
    assert squad_f1("nothing", "levis stadium") == 0.0
    assert squad_f1("big big dog", "big dog dog") == pytest.approx(2 / 3)  # a word counts as often as both have it


def test_squad_takes_the_best_of_the_right_answers() -> None:
    asked = question("Santa Clara, California", "Levi's Stadium")
    answer = judge_text(asked, " The Levis Stadium.\nQuestion: more", metric="squad", pattern=FIRST_LINE)
    assert (answer.prediction, answer.correct, answer.f1) == ("The Levis Stadium.", True, 1.0)
    partly = judge_text(asked, "Clara", metric="squad", pattern=FIRST_LINE)
    assert not partly.correct and partly.f1 == pytest.approx(0.5)
    nothing = judge_text(asked, "\n\n", metric="squad", pattern=FIRST_LINE)
    assert nothing.prediction is None and nothing.f1 == 0.0


def test_a_letter_is_an_answer_only_if_it_is_a_choice() -> None:
    asked = question("B", choices=CHOICES)
    pattern = r"\A\W*(?P<answer>[A-Za-z0-9]+)\b"
    judged = [
        judge_text(asked, text, metric="choice", pattern=pattern) for text in (" (b) a marsh", "A", "Because", "")
    ]
    assert [(each.prediction, each.correct) for each in judged] == [
        ("B", True),
        ("A", False),
        (None, False),
        (None, False),
    ]


def test_the_likeliest_choice_and_the_likeliest_by_length() -> None:
    answer = judge_choices(question("B", choices=CHOICES), [-3.0, -6.0])
    assert (answer.prediction, answer.correct, answer.normalised) == ("A", False, True)
    assert answer.as_json()["log_likelihoods"] == {"A": -3.0, "B": -6.0}
    assert "f1" not in answer.as_json() and answer.as_json()["generated"] is None


def test_scores_have_intervals_and_coverage() -> None:
    pattern = r"#### (?P<answer>\d+)"
    texts = ["#### 1", "#### 2", "nothing", "#### 1,000"]
    answers = [judge_text(question("1"), text, metric="exact_match", pattern=pattern) for text in texts]
    found = scores(answers, "exact_match")
    assert found["questions"] == 4 and found["exact_match"] == 0.5 and found["coverage"] == 0.75
    # Wilson's interval of 2 in 4, worked out by hand.
    assert (found["exact_match_low"], found["exact_match_high"]) == pytest.approx((0.15004, 0.84996), abs=1e-5)


def test_a_bootstrap_interval_is_about_the_normal_one() -> None:
    values = np.random.default_rng(1).uniform(size=400)
    low, high = bootstrap(values)
    half = 1.96 * values.std() / 20
    # Quantiles of 2,000 resamples: a standard error of √(0.025 · 0.975 / 2000) / φ(1.96) ≈ 0.06 standard deviations.
    assert low == pytest.approx(values.mean() - half, abs=0.2 * half)
    assert high == pytest.approx(values.mean() + half, abs=0.2 * half)
