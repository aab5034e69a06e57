"""A token store's figures, as the Plan wants them. Imports without torch."""

from __future__ import annotations

from seqaware.data.store import TokenStore
from seqaware.plan.facts import DataFacts


def data_facts(store: TokenStore, steps_per_epoch: tuple[int, ...] | None) -> DataFacts:
    """Exact figures of prepared data.

    Args:
        steps_per_epoch: of epoch 0, 1, …; None where only the order could tell (steps bounded by tokens).
    """
    facts = store.facts()
    return DataFacts(
        documents=facts.documents,
        tokens=facts.tokens,
        supervised_tokens=facts.supervised_tokens,
        longest=facts.longest,
        fingerprint=facts.fingerprint,
        exact=True,
        steps_per_epoch=steps_per_epoch,
    )
