"""The held-out rows of a run: their loss, and how many answers come out right."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from seqaware.config.schema import EvaluationConfig
from seqaware.data.batch_loader import RowFormat, rank_batches
from seqaware.data.collate import Batch
from seqaware.data.questions import Question
from seqaware.data.store.token_store import TokenStore
from seqaware.distributed.collective_errors import not_written, raise_collectively
from seqaware.distributed.process_group import Ranks
from seqaware.engine.engine import Engine
from seqaware.engine.inference import AnsweringModel
from seqaware.evaluation.held_out_loss import held_out_loss
from seqaware.evaluation.measure import answer_questions, write_answers_file
from seqaware.evaluation.rounds import Leaving
from seqaware.evaluation.scores import Answer, scores
from seqaware.metrics.metrics_file import read_metrics

if TYPE_CHECKING:
    from seqaware.training.prepare import Prepared


@dataclass(frozen=True)
class Evaluator:
    """Evaluation on the rows of `evaluation.dataset`; every method is collective.

    Attributes:
        at_once: documents that are laid out into rows together. limit: only the first of them; None: all.
    """

    engine: Engine
    store: TokenStore
    rows: RowFormat
    config: EvaluationConfig
    tokenizer: PreTrainedTokenizerBase
    questions: list[Question]
    at_once: int = 512
    limit: int | None = None

    @classmethod
    def of(cls, prepared: Prepared, engine: Engine, *, rows: RowFormat) -> Evaluator | None:
        """The run's held-out rows, or None if the config names none."""
        if prepared.held_out is None:
            return None
        config = prepared.plan.config.evaluation
        return cls(engine, prepared.held_out, rows, config, prepared.tokenizer, prepared.questions)

    def loss(self, *, leaving: Leaving) -> dict[str, Any] | None:
        """The objective over all held-out rows; the same on every rank. None where the run leaves before the end.

        Args:
            leaving: asked between the parts of the work, on every rank; where it says so, the rest is not done.
        """
        return held_out_loss(self.engine, self._batches(), self.engine.normalize_by, leaving=leaving)

    def owes(self, done: int, total: int, *, metrics: Path) -> bool:
        """Whether the run was left in the evaluation that was due after step `done`, of `total`.

        Args:
            metrics: the run's metrics.jsonl, as rank 0 sees it.
        """
        ranks, every = self.engine.ranks, self.config.every_steps
        if not every or not 0 < done < total or done % every:
            return False
        owed = ranks.is_first and not _was_evaluated(metrics, done)
        return bool(ranks.agree(owed))

    def was_reported(self, step: int, *, metrics: Path, answers: Path) -> bool:
        """Whether an earlier launch has reported the last evaluation, of `step`, and was ended before the run was.

        Args:
            metrics, answers: the run's metrics.jsonl and answers.jsonl, as rank 0 sees them.
        """
        ranks = self.engine.ranks
        reported = ranks.is_first and _was_evaluated(metrics, step) and (not self.questions or answers.exists())
        return bool(ranks.agree(reported))

    def evaluate(self, step: int, *, answers: Path | None, leaving: Leaving) -> dict[str, Any] | None:
        """A line for `metrics.jsonl`: the loss, and what the answers are worth where the config asks.

        Args:
            answers: where rank 0 writes every generated answer; None writes none. leaving: as for `loss`.
        """
        loss = self.loss(leaving=leaving)
        if loss is None:
            return None
        line: dict[str, Any] = {"kind": "evaluation", "step": step, **loss}
        if not self.questions:
            return line
        given = self.answers(leaving=leaving)
        if given is None:
            return None
        if answers is not None:
            _write_together(self.engine.ranks, given, answers)
        return {**line, **scores(given, self.config.metric)}

    def answers(self, *, leaving: Leaving) -> list[Answer] | None:
        """Answer every held-out question once; None if the run leaves before the end. Arguments: as for `loss`."""
        model = AnsweringModel.of(self.engine)
        with self.engine.forward_only():
            return answer_questions(
                model, self.questions, tokenizer=self.tokenizer, config=self.config, leaving=leaving
            )

    def _batches(self) -> Iterator[list[Batch]]:
        ranks = self.engine.ranks
        count = len(self.store) if self.limit is None else min(self.limit, len(self.store))
        for first in range(0, count, self.at_once):
            ids = np.arange(first, min(first + self.at_once, count), dtype=np.int64)
            yield rank_batches(self.store, ids, rows=self.rows, rank=ranks.rank, size=ranks.size)


def _was_evaluated(metrics: Path, step: int) -> bool:
    lines = read_metrics(metrics) if metrics.exists() else iter(())
    return any(line["kind"] == "evaluation" and line["step"] == step for line in lines)


def _write_together(ranks: Ranks, given: Sequence[Answer], path: Path) -> None:
    raise_collectively(ranks, lambda: write_answers_file(given, path), on_first_only=True, error=not_written(str(path)))
