"""Generation and likelihoods on a tiny model: of the row alone, every row once, and smaller where memory runs out."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from seqaware.data.questions import Choice, Question
from seqaware.engine.inference import AnsweringModel
from seqaware.errors import ConfigError
from seqaware.evaluation import generate, rounds
from seqaware.evaluation.generate import generate_texts
from seqaware.evaluation.likelihood import log_likelihoods
from seqaware.evaluation.sampling import Decoding
from tests.patience import LAUNCH_SECONDS
from tests.tiny import train_tokenizer
from tests.unit.models.tiny_models import tiny

PROMPTS = ((3, 4, 5), (6,), (7, 8), (3, 3, 9, 10, 11), (12, 4), (5, 5, 5, 5))
CHOICES = (Choice("A", "x", (3,)), Choice("B", "xy", (4, 5, 6)))
QUESTIONS = [Question(f"row:{number}", "", ids, ("A",), CHOICES) for number, ids in enumerate(PROMPTS)]
TOKENIZER = train_tokenizer()


class ThreadRank:
    """A rank that is a thread: what `Ranks` is to an evaluation."""

    device = torch.device("cpu")
    address = SimpleNamespace(local_size=1)

    def __init__(self, rank: int, box: list[Any], barrier: threading.Barrier) -> None:
        self.rank, self.size, self.is_first = rank, len(box), rank == 0
        self._box, self._barrier = box, barrier

    def gather(self, value: Any) -> list[Any]:
        self._box[self.rank] = value
        self._barrier.wait(timeout=LAUNCH_SECONDS)
        everything = list(self._box)
        self._barrier.wait(timeout=LAUNCH_SECONDS)
        return everything


def on_ranks(count: int, work: Callable[[AnsweringModel], Any]) -> list[Any]:
    """What each rank returns; each has the same weights in a model of its own."""
    box: list[Any] = [None] * count
    barrier = threading.Barrier(count)
    models = [AnsweringModel(tiny("llama"), ThreadRank(rank, box, barrier), sharded=False) for rank in range(count)]  # type: ignore[arg-type]
    with ThreadPoolExecutor(count) as threads:
        return list(threads.map(work, models))


def texts(decoding: Decoding, *, ranks: int = 1, batch_size: int | None = None) -> list[str]:
    def work(model: AnsweringModel) -> list[str] | None:
        return generate_texts(
            model, QUESTIONS, tokenizer=TOKENIZER, decoding=decoding, batch_size=batch_size, leaving=lambda: False
        )

    first, *others = on_ranks(ranks, work)
    assert all(other == first for other in others)
    assert first is not None
    return list(first)


@pytest.mark.parametrize("decoding", [Decoding(8), Decoding(8, temperature=1.0, top_p=0.9, seed=5)])
def test_batches_and_ranks_do_not_change_what_is_written(decoding: Decoding) -> None:
    alone = texts(decoding, batch_size=1)
    assert len(set(alone)) > 3
    assert texts(decoding, batch_size=4) == alone
    # Seven ranks for six rows: one has none.
    assert texts(decoding, ranks=7) == texts(decoding, ranks=2, batch_size=2) == alone


def test_a_stop_text_ends_an_answer_and_is_cut_off() -> None:
    whole = texts(Decoding(12, temperature=1.0))
    word = max(whole, key=len).split()[1]
    cut = texts(Decoding(12, temperature=1.0, stop=(word,)))
    assert cut == [text.partition(word)[0] for text in whole] != whole


def test_the_models_own_generation_config_changes_nothing() -> None:
    model = on_ranks(1, lambda model: model)[0]
    asked: dict[str, Any] = {"tokenizer": TOKENIZER, "decoding": Decoding(8), "batch_size": 3, "leaving": lambda: False}
    plain = generate_texts(model, QUESTIONS, **asked)
    model.model.generation_config.repetition_penalty = 5.0
    assert generate_texts(model, QUESTIONS, **asked) == plain
    assert model.model.generation_config.repetition_penalty == 5.0


def test_where_memory_runs_out_the_work_is_halved(monkeypatch: pytest.MonkeyPatch) -> None:
    whole, sizes = texts(Decoding(4)), []
    written = generate.write_answers

    def narrow(model: AnsweringModel, questions: Any, **options: Any) -> list[str]:
        sizes.append(len(questions))
        if len(questions) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return written(model, questions, **options)

    monkeypatch.setattr(generate, "write_answers", narrow)
    assert texts(Decoding(4)) == whole
    assert sizes == [6, 3, 1, 2, 3, 1, 2]


def test_memory_that_runs_out_for_one_row_or_in_step_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def nothing(*_: Any, **__: Any) -> list[str]:
        raise MemoryError

    monkeypatch.setattr(generate, "write_answers", nothing)
    with pytest.raises(ConfigError, match=r"memory ran out while answering; got 1 at once on rank 0"):
        texts(Decoding(4))


def test_a_round_takes_what_fits_the_fullest_rank_and_more_of_shorter_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rounds.BatchSize, "_free", lambda self: 4000 if self._ranks.rank else 80)
    lengths = [10, 1, 5, 2, 2, 1, 1, 1]

    def work(model: AnsweringModel) -> list[list[int]]:
        batch = rounds.BatchSize(model, lambda longest: 4 * longest, fixed=None)
        return list(rounds.rounds(lengths, batch, rank=model.ranks.rank, size=2))

    first, second = on_ranks(2, work)
    # Half of 80 bytes, grown to 50 by the first round, holds one row of 10; then 62 hold three of 5 or less; the rest.
    assert [len(mine) for mine in first] == [1, 3] and [len(mine) for mine in second] == [1, 3]
    assert sorted(row for mine in first + second for row in mine) == list(range(8))
    assert first[0] == [0] and second[0] == [2]


def test_a_try_that_fails_on_one_rank_halves_the_rounds_of_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rounds.BatchSize, "_free", lambda self: 1600)
    monkeypatch.setattr(rounds.BatchSize, "_fits", lambda self, size: self._ranks.rank == 0 or size <= 300)

    def work(model: AnsweringModel) -> list[int]:
        batch = rounds.BatchSize(model, lambda longest: 100, fixed=None)
        before = batch.rows(1, left=99)
        if model.ranks.rank == 1:
            batch.too_large()
        return [before, batch.rows(1, left=99)]

    assert on_ranks(2, work) == [[2, 1], [2, 1]]


def test_likelihoods_are_those_of_each_row_alone() -> None:
    def work(model: AnsweringModel) -> Any:
        return log_likelihoods(model, QUESTIONS, tokenizer=TOKENIZER, batch_size=None, leaving=lambda: False)

    (found,) = on_ranks(1, work)
    model = tiny("llama", attention="sdpa").eval()
    for question, values in zip(QUESTIONS, found, strict=True):
        for choice, value in zip(question.choices, values, strict=True):
            ids = torch.tensor([question.prompt_ids + choice.ids])
            with torch.no_grad():
                log_p = torch.log_softmax(model(ids).logits[0].double(), -1)
            places = range(len(question.prompt_ids) - 1, ids.shape[1] - 1)
            expected = sum(log_p[place, ids[0, place + 1]] for place in places)
            # Float32 logits of size 1 over two layers: a few roundings of 6e-8 for each token.
            assert value == pytest.approx(float(expected), abs=1e-5)
    for ranks in (2, 7):
        for other in on_ranks(ranks, work):
            torch.testing.assert_close(torch.tensor(other), torch.tensor(found), atol=1e-5, rtol=0)


def test_a_run_that_is_asked_to_leave_has_no_answers() -> None:
    (model,) = on_ranks(1, lambda model: model)
    asked: dict[str, Any] = {"tokenizer": TOKENIZER, "batch_size": 2, "leaving": lambda: True}
    assert generate_texts(model, QUESTIONS, decoding=Decoding(2), **asked) is None
    assert log_likelihoods(model, QUESTIONS, **asked) is None
