"""The oracle's weights: by hand where that is short, and against the trainer's own, which share no code with them."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from seqaware.config import schema
from seqaware.config.schema import SftConfig
from seqaware.data.collate import build_batch
from seqaware.data.splitting import split_document
from seqaware.data.store.token_store import Document
from seqaware.objective.weighting import SCHEMES, Weighting
from seqaware.verify import world_batches
from seqaware.verify.items import WEIGHT_ROUNDING
from seqaware.verify.weight_oracle import denominator, scored_tokens
from tests.fakes import MemoryStore, document
from tests.oracles import suffix_weights


def _weights(document: Document, **sft: object) -> list[float]:
    return [token.weight for token in scored_tokens(document, SftConfig(**{"gamma": 0.5, **sft}))]


ROW = document([9, 8, 7, 6, 5, 4], supervised=[True, False, True, True, False, True], turn_starts=[2, 5])


def test_places_and_labels_are_those_of_the_predicted_tokens() -> None:
    scored = scored_tokens(ROW, SftConfig(gamma=0.5))
    assert [(token.place, token.label) for token in scored] == [(2, 7), (3, 6), (5, 4)]


def test_the_recurrence_is_the_sum_over_suffixes() -> None:
    long = document(range(1, 40))
    assert _weights(long, gamma=0.9) == pytest.approx(suffix_weights(38, 0.9))


@pytest.mark.parametrize(
    ("sft", "expected"),
    [
        ({}, [1.0, 1.5, 1.75]),
        ({"positions": "sequence"}, [1.5, 1.75, 1.9375]),
        ({"positions": "turn"}, [1.0, 1.5, 1.0]),
        ({"gamma": 0.0}, [1.0, 1.0, 1.0]),
        ({"gamma": 1.0}, [1.0, 2.0, 3.0]),
        ({"scale": "horizon"}, [0.5, 0.75, 0.875]),
        ({"scale": "mean_one", "gamma": 1.0}, [0.5, 1.0, 1.5]),
        ({"weighting": "linear"}, [1 / 3, 2 / 3, 1.0]),
        ({"weighting": "linear", "positions": "turn"}, [0.5, 1.0, 1.0]),
        ({"weighting": "uniform"}, [1.0, 1.0, 1.0]),
    ],
)
def test_by_hand(sft: dict[str, object], expected: list[float]) -> None:
    assert _weights(ROW, **sft) == pytest.approx(expected)


def test_a_scheme_without_a_formula_here_is_the_runs_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """CONTRIBUTING's recipe: a name in both lists, and a case of `_evaluate`."""
    own = Weighting._evaluate

    def with_squares(self: Weighting, k: Tensor, length: Tensor) -> Tensor:
        return (k - 1).double() ** 2 if self.scheme == "squares" else own(self, k, length)

    for module in ("seqaware.config.schema", "seqaware.objective.weighting"):
        monkeypatch.setattr(f"{module}.SCHEMES", (*SCHEMES, "squares"))
    monkeypatch.setattr(Weighting, "_evaluate", with_squares)
    assert _weights(ROW, weighting="squares") == [0.0, 1.0, 4.0]
    # Its first token weighs 0, which nothing knows of before it looks.
    assert not Weighting(0.5, "squares").is_positive and Weighting(0.5).is_positive


def test_both_lists_of_schemes_are_one() -> None:
    assert schema.SCHEMES == SCHEMES


def test_the_datas_factors_multiply_in_after_the_scaling() -> None:
    factors = [1.0, 1.0, 3.0, 1.0, 1.0, 2.0]
    weighted = document(ROW.tokens, supervised=ROW.supervised, turn_starts=[2, 5], weights=factors)
    assert _weights(weighted, gamma=1.0, scale="mean_one") == pytest.approx([1.5, 1.0, 3.0])


def test_denominators() -> None:
    scored = [scored_tokens(ROW, SftConfig(gamma=0.5)), scored_tokens(document([1, 2]), SftConfig(gamma=0.5))]
    assert [denominator(scored, by) for by in ("tokens", "weight", "sequences")] == [4.0, 5.25, 2.0]


@st.composite
def _documents(draw: st.DrawFn) -> list[Document]:
    """Up to three documents, each whole or cut into pieces of up to five tokens."""
    found: list[Document] = []
    for number in range(draw(st.integers(1, 3))):
        n = draw(st.integers(2, 14))
        flags = st.lists(st.booleans(), min_size=n, max_size=n)
        supervised, starts = draw(flags), [place for place, start in enumerate(draw(flags)) if start]
        weights = draw(st.none() | st.lists(st.sampled_from([0.5, 1.0, 2.0]), min_size=n, max_size=n))
        tokens = draw(st.lists(st.integers(1, 99), min_size=n, max_size=n))
        whole = document(tokens, supervised=supervised, turn_starts=starts, weights=weights, name=f"rows:{number}")
        found += _pieces(whole) if draw(st.booleans()) else [whole]
    return found


def _pieces(whole: Document) -> list[Document]:
    pieces = []
    for piece in split_document(whole.supervised, whole.turn_start, 5):
        part = slice(piece.begin, piece.end)
        supervised, turn_start = whole.supervised[part].copy(), whole.turn_start[part].copy()
        if piece.begin:
            supervised[0] = turn_start[0] = False
        weights = None if whole.weights is None else whole.weights[part]
        name = f"{whole.name}#{piece.begin}"
        cut = Document(whole.tokens[part], supervised, turn_start, weights, piece.counted, name)
        pieces.append(cut)
    return pieces


@given(
    documents=_documents(),
    positions=st.sampled_from(["supervised", "sequence", "turn"]),
    on_split=st.sampled_from(["continue", "restart"]),
    weighting=st.sampled_from(["log_suffix", "linear", "uniform"]),
    mean_one=st.booleans(),
    gamma=st.sampled_from([0.0, 0.3, 0.98, 1.0]),
)
@settings(deadline=None)
def test_the_trainer_weighs_alike(
    documents: list[Document], positions: str, on_split: str, weighting: str, mean_one: bool, gamma: float
) -> None:
    sft = SftConfig(
        gamma=gamma,
        positions=positions,  # type: ignore[arg-type]
        on_split=on_split,  # type: ignore[arg-type]
        weighting=weighting,
        scale="mean_one" if mean_one else "raw",
    )
    rows = [list(range(len(documents)))]
    store = MemoryStore(documents)
    batch = build_batch(store, rows, positions=positions, on_split=on_split, pad_id=0)  # type: ignore[arg-type]
    ours = world_batches.of_batches([batch], Weighting(gamma, weighting, sft.scale))
    theirs = world_batches.of_documents(documents, [scored_tokens(each, sft) for each in documents])
    found = world_batches.compare(ours, theirs)
    assert (found.missing, found.surplus) == (0, 0)
    # float32 has 24 bits: a weight is rounded once, and once more where the data's factor multiplies it.
    assert found.weights <= WEIGHT_ROUNDING


def test_the_comparison_is_not_deaf() -> None:
    sft = SftConfig(gamma=0.5)
    right = world_batches.of_documents([ROW], [scored_tokens(ROW, sft)])
    (shifted,) = world_batches.of_documents([ROW], [scored_tokens(ROW, sft)[1:]])
    assert world_batches.compare([shifted], right) == world_batches.Mismatch(1, 1, 0.0)
    assert world_batches.compare([], right) == world_batches.Mismatch(1, 0, 0.0)
    assert world_batches.compare([*right, *right], right) == world_batches.Mismatch(0, 1, 0.0)
    cast = dataclasses.replace(right[0], weights=right[0].weights.astype(int).astype(float))
    assert world_batches.compare([cast], right).weights == pytest.approx(0.75 / 1.75)
    assert world_batches.hash_of([cast]) != world_batches.hash_of(right)


def test_the_hash_is_of_the_set_whatever_its_order_and_rows() -> None:
    other = document([3, 4, 5], name="rows:1")
    store = MemoryStore([ROW, other])

    def hashed(rows: list[list[int]]) -> str:
        batch = build_batch(store, rows, positions="supervised", on_split="continue", pad_id=0)  # type: ignore[arg-type]
        return world_batches.hash_of(world_batches.of_batches([batch], Weighting(0.5)))

    assert hashed([[0, 1]]) == hashed([[1, 0]]) == hashed([[1], [0]])
    assert hashed([[0, 1]]) != hashed([[0]]) != hashed([[0, 0]])
