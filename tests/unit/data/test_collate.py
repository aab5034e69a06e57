from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from seqaware.data.collate import NO_LABEL, Batch, build_batch
from seqaware.data.packing import layout_step
from seqaware.data.splitting import split_document
from seqaware.data.store.token_store import Counted, Document
from seqaware.errors import ConfigError
from tests.fakes import MemoryStore, document

# The first call of a compiled function compiles it: no deadline.
unhurried = settings(deadline=None)
POSITIONS = ("supervised", "sequence", "turn")


def build(store: MemoryStore, rows, *, positions: str = "supervised", on_split: str = "continue") -> Batch:
    return build_batch(store, rows, positions=positions, on_split=on_split, pad_id=0)


def by_hand(document: Document, positions: str) -> dict[int, tuple[int, int]]:
    """{token: (k, length of its unit)} of the tokens of a whole document that carry loss, counted one by one."""
    unit, k = 0, 0
    places: dict[int, tuple[int, int]] = {}
    sizes: dict[int, int] = {}
    for token in range(1, len(document.tokens)):
        if positions == "turn" and document.turn_start[token]:
            unit, k = unit + 1, 0
        if positions == "sequence" or document.supervised[token]:
            k += 1
            sizes[unit] = k
        if document.supervised[token]:
            places[token] = (unit, k)
    return {token: (k, sizes[unit]) for token, (unit, k) in places.items()}


def read_back(batch: Batch) -> list[tuple]:
    """(document, token, its id, k, length, weight) of every label, found through the segments alone."""
    flat = {name: getattr(batch, name).flatten().tolist() for name in ("input_ids", "labels", "k", "length")}
    weights = [1.0] * len(flat["k"]) if batch.token_weight is None else batch.token_weight.flatten().tolist()
    borders = batch.cu_seqlens.tolist()
    ends_of_rows = {row * batch.input_ids.shape[1] for row in range(batch.input_ids.shape[0] + 1)}
    names = iter(batch.document_names)
    found = []
    for begin, end in itertools.pairwise(borders):
        segment = [label for label in flat["labels"][begin:end] if label != NO_LABEL]
        # Ids of documents are 1 or more here: a segment of zeros is padding, and ends a row.
        if not any(flat["input_ids"][begin:end]):
            assert not segment and end in ends_of_rows
            continue
        name = next(names)
        for place in range(begin, end):
            if flat["labels"][place] == NO_LABEL:
                assert flat["k"][place] == flat["length"][place] == 0
                continue
            assert flat["labels"][place] == flat["input_ids"][place + 1] and place + 1 < end
            counts = flat["k"][place], flat["length"][place], weights[place]
            found.append((name, place + 1 - begin, flat["labels"][place], *counts))
    assert next(names, None) is None
    return found


@st.composite
def documents(draw, longest: int = 12):
    n = draw(st.integers(2, longest))
    flags = st.lists(st.booleans(), min_size=n, max_size=n)
    weights = draw(st.none() | st.lists(st.sampled_from([0.0, 0.5, 1.0, 2.0]), min_size=n, max_size=n))
    tokens = draw(st.lists(st.integers(1, 99), min_size=n, max_size=n))
    starts = [place for place, starts in enumerate(draw(flags)) if starts and place % 3 == 0]
    return document(tokens, supervised=draw(flags), turn_starts=starts, weights=weights)


@st.composite
def stores(draw):
    drawn = draw(st.lists(documents(), min_size=1, max_size=25))
    return MemoryStore([each._replace(name=f"rows:{i}") for i, each in enumerate(drawn)])


def labels_of(store: MemoryStore, positions: str) -> list[tuple]:
    found = []
    for index in range(len(store)):
        each = store.document(index)
        for token, (k, length) in by_hand(each, positions).items():
            weight = 1.0 if each.weights is None else float(each.weights[token])
            found.append((each.name, token, int(each.tokens[token]), k, length, weight))
    return found


@unhurried
@given(stores(), st.sampled_from(POSITIONS), st.integers(12, 80), st.integers(1, 5), st.booleans())
def test_no_arrangement_changes_what_is_trained(store, positions, capacity, ranks, packed):
    ids = np.random.default_rng(len(store)).permutation(len(store))
    layout = layout_step(ids, store.lengths[ids], capacity=capacity, ranks=ranks, packed=packed)
    batches = [
        build(store, micro.rows, positions=positions) for rank in range(ranks) for micro in layout.micro_batches(rank)
    ]
    found = [entry for batch in batches for entry in read_back(batch)]
    assert sorted(found) == sorted(labels_of(store, positions))
    assert sum(batch.sequences for batch in batches) == len(store)
    assert sum(batch.tokens for batch in batches) == store.lengths.sum()
    assert sum(batch.supervised_tokens for batch in batches) == len(found)


@unhurried
@given(stores(), st.integers(1, 4), st.sampled_from(POSITIONS))
def test_shape_types_and_borders(store, columns, positions):
    rows = [list(range(i, min(i + columns, len(store)))) for i in range(0, len(store), columns)]
    batch = build(store, rows, positions=positions)
    shape = (len(rows), max(int(store.lengths[row].sum()) for row in rows))
    for name, dtype in (
        ("input_ids", torch.int64),
        ("position_ids", torch.int64),
        ("labels", torch.int64),
        ("k", torch.int32),
        ("length", torch.int32),
    ):
        assert getattr(batch, name).shape == shape and getattr(batch, name).dtype == dtype
    borders = batch.cu_seqlens
    assert borders.dtype == torch.int32 and batch.sequence_offsets.dtype == torch.int64
    assert borders.tolist() == batch.sequence_offsets.tolist()
    assert borders[0] == 0 and borders[-1] == shape[0] * shape[1] and bool((borders.diff() > 0).all())
    assert batch.lengths == tuple(borders.diff().tolist())
    restarted = [place for length in batch.lengths for place in range(length)]
    assert batch.position_ids.flatten().tolist() == restarted
    assert batch.loss_rows.dtype == torch.int64 and batch.loss_rows.tolist() == scored(batch)


def scored(batch: Batch) -> list[int]:
    """Flat places with a label that the data does not weigh with 0."""
    labels = batch.labels.flatten().tolist()
    weights = [1.0] * len(labels) if batch.token_weight is None else batch.token_weight.flatten().tolist()
    return [i for i, (label, weight) in enumerate(zip(labels, weights, strict=True)) if label != NO_LABEL and weight]


def test_one_row_looks_like_this():
    store = MemoryStore(
        [
            document([11, 12, 13, 14], supervised=[1, 0, 1, 1], name="a"),
            document([21, 22, 23], supervised=[1, 1, 0], name="b"),
            document([31, 32], name="c"),
        ]
    )
    batch = build(store, [[0, 1], [2]])
    assert batch.input_ids.tolist() == [[11, 12, 13, 14, 21, 22, 23], [31, 32, 0, 0, 0, 0, 0]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 0, 1, 2], [0, 1, 0, 1, 2, 3, 4]]
    assert batch.labels.tolist() == [[-100, 13, 14, -100, 22, -100, -100], [32] + [-100] * 6]
    assert batch.k.tolist() == [[0, 1, 2, 0, 1, 0, 0], [1] + [0] * 6]
    assert batch.length.tolist() == [[0, 2, 2, 0, 1, 0, 0], [1] + [0] * 6]
    assert batch.cu_seqlens.tolist() == [0, 4, 7, 9, 14]
    assert batch.loss_rows.tolist() == [1, 2, 4, 7]
    assert (batch.sequences, batch.tokens, batch.supervised_tokens) == (3, 9, 4)
    assert batch.document_names == ("a", "b", "c")
    assert batch.token_weight is None
    sequence = build(store, [[0, 1], [2]], positions="sequence")
    assert sequence.k.tolist() == [[0, 2, 3, 0, 1, 0, 0], [1] + [0] * 6]
    assert sequence.length.tolist() == [[0, 3, 3, 0, 2, 0, 0], [1] + [0] * 6]


def test_turns_count_anew():
    flags = [0, 1, 0, 1, 1, 0, 1, 1, 1]
    store = MemoryStore([document(range(1, 10), supervised=flags, turn_starts=[3, 6])])
    batch = build(store, [[0]], positions="turn")
    assert batch.k.tolist() == [[1, 0, 1, 2, 0, 1, 2, 3, 0]]
    assert batch.length.tolist() == [[1, 0, 2, 2, 0, 3, 3, 3, 0]]


def test_weights_go_with_the_predicted_token():
    weighted = document([5, 6, 7], supervised=[1, 1, 0], weights=[0.25, 0.5, 2.0])
    batch = build(MemoryStore([weighted, document([8, 9])]), [[0, 1]])
    assert batch.token_weight is not None and batch.token_weight.dtype == torch.float32
    assert batch.token_weight.tolist() == [[0.5, 0.0, 0.0, 1.0, 0.0]]


def pieces_of(whole: Document, capacity: int) -> list[Document]:
    return [
        Document(
            whole.tokens[begin:end],
            whole.supervised[begin:end],
            whole.turn_start[begin:end],
            None,
            counted,
            f"{begin}",
        )
        for begin, end, counted in split_document(whole.supervised, whole.turn_start, capacity)
    ]


@unhurried
@given(documents(longest=30), st.integers(2, 9), st.sampled_from(POSITIONS))
def test_a_split_document_counts_on_as_if_it_were_whole(whole, capacity, positions):
    pieces = pieces_of(whole, capacity)
    # A whole document beside the pieces: its counts in the store are its own.
    total = int(whole.supervised[1:].sum())
    counted = Counted(total_supervised=total, total_sequence=len(whole.tokens) - 1)
    store = MemoryStore([*pieces, whole._replace(counted=counted, weights=None, name="whole")])
    batch = build(store, [[index] for index in range(len(store))], positions=positions)
    found = {"pieces": {}, "whole": {}}
    for name, token, _, k, length, _ in read_back(batch):
        if name == "whole":
            found["whole"][token] = (k, length)
        else:
            assert int(name) + token not in found["pieces"], "a token was predicted twice"
            found["pieces"][int(name) + token] = (k, length)
    assert found["pieces"] == found["whole"] == by_hand(whole, positions)


@unhurried
@given(documents(longest=30), st.integers(2, 9), st.sampled_from(POSITIONS))
def test_restart_makes_every_piece_a_document_of_its_own(whole, capacity, positions):
    pieces = pieces_of(whole, capacity)
    batch = build(MemoryStore(pieces), [list(range(len(pieces)))], positions=positions, on_split="restart")
    by_piece = {piece.name: by_hand(piece, positions) for piece in pieces}
    found: dict[str, dict] = {piece.name: {} for piece in pieces}
    for name, token, _, k, length, _ in read_back(batch):
        found[name][token] = (k, length)
    assert found == by_piece


def test_an_empty_micro_batch_is_padding_without_loss():
    batch = build_batch(MemoryStore([document([5, 6])]), [], positions="supervised", on_split="continue", pad_id=3)
    assert batch.input_ids.tolist() == [[3, 3]] and batch.labels.tolist() == [[NO_LABEL] * 2]
    assert batch.position_ids.tolist() == [[0, 1]] and batch.k.tolist() == batch.length.tolist() == [[0, 0]]
    assert batch.cu_seqlens.tolist() == [0, 2] and batch.lengths == (2,) and batch.loss_rows.tolist() == []
    assert (batch.sequences, batch.tokens, batch.supervised_tokens, batch.document_names) == (0, 0, 0, ())
    filled = build(MemoryStore([document([5, 6])]), [[0]])
    for name, value in vars(filled).items():
        if isinstance(value, torch.Tensor):
            assert getattr(batch, name).dtype == value.dtype


@unhurried
@given(st.lists(st.integers(1, 9), max_size=5), st.booleans(), st.integers(1, 4), st.sampled_from(POSITIONS))
def test_shards_put_together_are_the_whole_rows(lengths, packed, count, positions):
    store = MemoryStore([document(list(range(1, length + 2))) for length in lengths])
    ids = list(range(len(lengths)))
    options = {"positions": positions, "on_split": "continue", "pad_id": 0, "columns_multiple_of": count}
    whole = build_batch(store, ([ids] if packed else [[i] for i in ids]) if ids else [], **options)
    shards = [whole.shard(index, count) for index in range(count)]
    for name in ("input_ids", "position_ids", "labels", "k", "length"):
        assert torch.equal(torch.cat([getattr(shard, name) for shard in shards], dim=1), getattr(whole, name))
    for name in ("sequences", "tokens", "supervised_tokens"):
        assert sum(getattr(shard, name) for shard in shards) == getattr(whole, name)
    for shard in shards:
        assert shard.loss_rows.tolist() == scored(shard)
        assert shard.supervised_tokens == int((shard.labels != NO_LABEL).sum())
        assert torch.equal(shard.cu_seqlens, whole.cu_seqlens) and shard.lengths == whole.lengths


def test_columns_are_padded_to_a_multiple_and_the_padding_is_a_segment():
    store = MemoryStore([document([5, 6, 7]), document([8, 9])])
    options = {"positions": "supervised", "on_split": "continue", "pad_id": 0}
    padded = build_batch(store, [[0, 1]], **options, columns_multiple_of=4)
    assert padded.input_ids.tolist() == [[5, 6, 7, 8, 9, 0, 0, 0]] and padded.lengths == (3, 2, 3)
    assert padded.position_ids.tolist() == [[0, 1, 2, 0, 1, 0, 1, 2]]
    assert build_batch(store, [], **options, columns_multiple_of=4).input_ids.shape == (1, 4)


def test_moving_a_batch_keeps_every_type():
    batch = build(MemoryStore([document([5, 6, 7], weights=[1.0, 0.5, 2.0])]), [[0]])
    moved = batch.to("meta")
    for name, value in vars(batch).items():
        if isinstance(value, torch.Tensor):
            assert getattr(moved, name).device.type == "meta"
            assert getattr(moved, name).dtype == value.dtype and getattr(moved, name).shape == value.shape
        else:
            assert getattr(moved, name) == value


@pytest.mark.parametrize("wrong", [{"positions": "tokens"}, {"on_split": "stop"}])
def test_unknown_choices_are_refused(wrong):
    with pytest.raises(ConfigError, match=f"got {next(iter(wrong.values()))}"):
        build(MemoryStore([document([5, 6])]), [[0]], **wrong)
