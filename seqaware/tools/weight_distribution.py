"""Where a run's objective puts its weight, on its own data: by position, by document, and what truncation loses.

Only weights are known before a model runs. Shares of the loss assume that every token has the same loss.

Letters: D documents, N tokens with loss.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from seqaware.config.schema import Config
from seqaware.data.collate import NO_LABEL, build_batch
from seqaware.data.store.token_store import TokenStore
from seqaware.objective.weighting import Weighting
from seqaware.tools.inspect_rows import TrainingRows, tokenised
from seqaware.training.prepare import build_weighting

_TOKENS_AT_ONCE = 1 << 20


@dataclass(frozen=True)
class Band:
    """Positions k, or documents with so many counted tokens, from first to last, and their shares of all."""

    first: int
    last: int
    tokens: float
    weight: float
    documents: float | None = None


@dataclass(frozen=True)
class WeightsView:
    """Of some documents: all of a store, or the first ones.

    Attributes:
        curve: (k, w) of a document as long as the longest. mean, rms, largest: of the weights of tokens with loss.
        effective_tokens: (Σ w)² / Σ w², how many equal weights would average as much noise away.
        lost: share of the loss weight that on_overlong leaves out; None where it was not looked for.
        factor_aligned, factor_independent: the gradient of a step against that of plain cross-entropy per token, if the
            tokens' gradients point the same way, or are independent.
    """

    curve: tuple[tuple[int, float], ...]
    by_position: tuple[Band, ...]
    by_length: tuple[Band, ...]
    documents: int
    of_documents: int
    tokens: int
    weight_sum: float
    mean: float
    rms: float
    largest: float
    effective_tokens: float
    overlong: int
    lost: float | None
    factor_aligned: float
    factor_independent: float


@dataclass(frozen=True)
class _TokenWeights:
    """k, w and the document of every token with loss: [N] each; documents: D."""

    k: NDArray[np.int64]
    weights: NDArray[np.float64]
    document: NDArray[np.int64]
    documents: int


def weights_view(config: Config, rows: TrainingRows, *, documents: int | None, find_lost: bool) -> WeightsView:
    """Weigh the tokens of the first so many documents (None: all).

    Args:
        find_lost: tokenise the rows again, where some are too long, to see what is left out.
    """
    weighting = build_weighting(config)
    store = rows.store
    tokens = _weigh(store, config, weighting, documents)
    weights = tokens.weights
    total, squares, count = float(weights.sum()), float((weights**2).sum()), len(weights)
    mean, rms = total / count, (squares / count) ** 0.5
    divisor = {"tokens": 1.0, "weight": mean, "sequences": tokens.documents / count}[config.training.sft.normalize_by]
    facts = store.facts()
    overlong = facts.truncated + sum(number for reason, number in facts.dropped.items() if "long" in reason)
    look = find_lost and overlong > 0 and documents is None
    return WeightsView(
        curve=tuple(_curve(weighting, int(tokens.k.max()))),
        by_position=tuple(_bands(tokens.k, weights)),
        by_length=tuple(_by_length(tokens)),
        documents=tokens.documents,
        of_documents=len(store),
        tokens=count,
        weight_sum=total,
        mean=mean,
        rms=rms,
        largest=float(weights.max()),
        effective_tokens=total**2 / squares if squares else 0.0,
        overlong=overlong,
        lost=_lost(config, rows, weighting, kept=total) if look else (0.0 if overlong == 0 else None),
        factor_aligned=mean / divisor,
        factor_independent=rms / divisor,
    )


def _weigh(store: TokenStore, config: Config, weighting: Weighting, most: int | None) -> _TokenWeights:
    ks, weights, owners = [], [], []
    count = len(store) if most is None else min(most, len(store))
    for first, last in _chunks(store.lengths[:count]):
        sft = config.training.sft
        ids = range(first, last)
        batch = build_batch(store, [ids], positions=sft.positions, on_split=sft.on_split, pad_id=0)
        of_token = weighting.weights(batch.k, batch.length, batch.sequence_offsets, token_weight=batch.token_weight)
        # Not loss_rows: what the data weighs with 0 has a label all the same, and counts in the denominator.
        places = np.flatnonzero(batch.labels.flatten().numpy() != NO_LABEL)
        owner = np.repeat(np.arange(first, last), store.lengths[first:last])
        ks.append(batch.k.flatten().numpy()[places].astype(np.int64))
        weights.append(of_token.flatten().double().numpy()[places])
        owners.append(owner[places])
    return _TokenWeights(np.concatenate(ks), np.concatenate(weights), np.concatenate(owners), count)


def _chunks(lengths: NDArray[np.int32]) -> Iterator[tuple[int, int]]:
    """Runs of documents of about so many tokens."""
    ends = np.cumsum(lengths, dtype=np.int64)
    first = 0
    while first < len(lengths):
        before = ends[first - 1] if first else 0
        last = max(first + 1, int(np.searchsorted(ends, before + _TOKENS_AT_ONCE, side="right")))
        yield first, last
        first = last


def _curve(weighting: Weighting, longest: int) -> Iterator[tuple[int, float]]:
    import torch

    k = torch.arange(1, longest + 1)
    values = weighting.weights(k, torch.full_like(k, longest), torch.tensor([0, longest])).tolist()
    shown = sorted({int(each) for each in np.geomspace(1, longest, 60).round()})
    yield from ((each, values[each - 1]) for each in shown)


def _bands(values: NDArray[np.int64], weights: NDArray[np.float64]) -> Iterator[Band]:
    """By powers of two: 1, 2, 3–4, 5–8 …"""
    bands = np.ceil(np.log2(values)).astype(np.int64)
    for band in np.unique(bands):
        here = bands == band
        first = 1 if band == 0 else 2 ** (int(band) - 1) + 1
        yield Band(first, 2 ** int(band), float(here.mean()), float(weights[here].sum() / weights.sum()))


def _by_length(tokens: _TokenWeights) -> Iterator[Band]:
    sizes = np.bincount(tokens.document, minlength=tokens.documents)
    for band in _bands(sizes[tokens.document], tokens.weights):
        share = float(((sizes >= band.first) & (sizes <= band.last)).mean())
        yield Band(band.first, band.last, band.tokens, band.weight, share)


def _lost(config: Config, rows: TrainingRows, weighting: Weighting, *, kept: float) -> float:
    """The same rows, cut into pieces instead: together they hold every token, and k goes on from piece to piece."""
    changed: dict[str, Any] = {"format": config.format.model_copy(update={"on_overlong": "split"})}
    with tempfile.TemporaryDirectory(prefix="seqaware-weights-") as folder:
        changed["dataset"] = config.dataset.model_copy(update={"store_dir": folder})
        whole = config.model_copy(update=changed)
        store = TokenStore.open(tokenised(whole, rows.tokenizer, rows.max_seq_length))
        everything = float(_weigh(store, whole, weighting, None).weights.sum())
        return 1.0 - kept / everything
