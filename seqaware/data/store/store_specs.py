"""A token store's figures, as the Plan wants them. Imports without torch, and without numba until an order is built."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from seqaware.config.schema import ScheduleConfig
from seqaware.data.store.store_format import StoreFacts
from seqaware.data.store.token_store import TokenStore
from seqaware.plan.plan import Plan
from seqaware.plan.specs import DataFacts

if TYPE_CHECKING:
    from seqaware.data.sampler import StepSampler


def data_facts(store: TokenStore, order: StepSampler | None, schedule: ScheduleConfig) -> DataFacts:
    """What an epoch of prepared data holds: exact, but for the tokens of a mixture with proportions.

    Args:
        order: None where steps are so many documents and every epoch holds all of them (`needs_order` is False).
    """
    facts = store.facts()
    documents = facts.documents if order is None else order.documents_per_epoch
    everything = documents == facts.documents
    tokens = facts.tokens if everything else _tokens_of_an_epoch(store, documents)
    # The store does not count these by source, so their share of all its tokens stands for every source's.
    supervised = facts.supervised_tokens if everything else facts.supervised_tokens * tokens // facts.tokens
    return DataFacts(
        documents=documents,
        tokens=tokens,
        supervised_tokens=supervised,
        longest=facts.longest,
        fingerprint=facts.fingerprint,
        exact=True,
        steps_per_epoch=None if order is None else order.steps_per_epoch(schedule.epoch_limit, schedule.max_steps),
        tokens_exact=everything,
        tokenizer=store.tokenizer,
    )


def needs_order(facts: StoreFacts, plan: Plan) -> bool:
    """Whether only the order of the documents can tell how many steps an epoch has, or how many documents."""
    proportioned = any(part.proportion is not None for part in facts.parts)
    return proportioned or plan.batches.global_batch_tokens is not None


def step_order(store: TokenStore, plan: Plan) -> StepSampler:
    """The order of a run over a store: fixed by data, seed and the size of a step."""
    # Imported here: it brings numba, which a dry run over plain data does without.
    from seqaware.data.sampler import StepSampler

    return StepSampler(
        store.lengths,
        fingerprint=store.fingerprint,
        seed=plan.config.training.control.seed,
        global_batch_size=plan.batches.global_batch_size,
        global_batch_tokens=plan.batches.global_batch_tokens,
        parts=store.facts().parts,
    )


def _tokens_of_an_epoch(store: TokenStore, documents: int) -> int:
    """The expected tokens of so many documents: of every source its proportion, of its own mean length."""
    parts = store.facts().parts
    proportions = np.array([part.proportion for part in parts], dtype=np.float64)
    ends = np.cumsum([part.documents for part in parts])
    means = [float(own.mean()) for own in np.split(store.lengths, ends[:-1])]
    return round(documents * float(np.dot(proportions / proportions.sum(), means)))
