"""Token stores: what is written is what is read, and nothing that is damaged is read at all."""

from __future__ import annotations

import errno
import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from seqaware.data.store.store_format import MANIFEST
from seqaware.data.store.store_writer import disk_errors
from seqaware.data.store.token_store import Counted, Document, Part, StoreWriter, TokenStore
from seqaware.errors import DataError


def document(length: int, *, seed: int = 0, weighted: bool = False, counted: Counted | None = None) -> Document:
    draw = np.random.default_rng([length, seed])
    supervised = draw.random(length) < 0.5
    whole = Counted(total_supervised=int(supervised[1:].sum()), total_sequence=length - 1)
    return Document(
        tokens=draw.integers(0, 300, length).astype(np.int32),
        supervised=supervised,
        turn_start=draw.random(length) < 0.1,
        weights=draw.random(length).astype(np.float32) if weighted else None,
        counted=whole if counted is None else counted,
        name=f"rows.jsonl:{seed}",
    )


def write(path: Path, documents: list[Document], *, vocab_size: int = 300, max_seq_length: int = 8) -> Path:
    with StoreWriter(path, vocab_size=vocab_size, eos_id=1, max_seq_length=max_seq_length) as writer:
        for each in documents:
            writer.append(each)
        return writer.finish()


def assert_equal(read: Document, written: Document) -> None:
    np.testing.assert_array_equal(read.tokens, written.tokens)
    assert read.tokens.dtype == np.int32
    np.testing.assert_array_equal(read.supervised, written.supervised)
    np.testing.assert_array_equal(read.turn_start, written.turn_start)
    if written.weights is None:
        assert read.weights is None or (read.weights == 1).all()
    else:
        assert read.weights is not None
        np.testing.assert_array_equal(read.weights, written.weights)
    assert read.counted == written.counted


def test_documents_come_back_as_they_were_written(tmp_path: Path) -> None:
    documents = [document(1 + 7 * i % 50, seed=i) for i in range(100)]
    store = TokenStore.open(write(tmp_path / "store", documents))
    assert len(store) == 100
    np.testing.assert_array_equal(store.lengths, [len(each.tokens) for each in documents])
    for index, each in enumerate(documents):
        assert_equal(store.document(index), each)
        assert store.document(index).name == each.name
    with pytest.raises(IndexError):
        store.document(100)
    with pytest.raises(IndexError):
        store.document(-1)


@pytest.mark.parametrize(("vocab_size", "token"), [(65536, 65535), (65537, 65536), (151669, 151668)])
def test_the_vocabulary_decides_the_width_of_a_token(tmp_path: Path, vocab_size: int, token: int) -> None:
    one = Document(np.array([0, token], np.int32), np.array([False, True]), np.zeros(2, bool), None, Counted(), "a:1")
    path = write(tmp_path / "store", [one], vocab_size=vocab_size)
    assert (path / "tokens.bin").stat().st_size == (4 if vocab_size <= 65536 else 8)
    assert TokenStore.open(path).document(0).tokens.tolist() == [0, token]


def test_weights_and_counts_that_come_late_leave_the_earlier_documents_neutral(tmp_path: Path) -> None:
    split = Counted(3, 7, 2, 9, 20, 5, 6)
    documents = [
        document(5),
        document(6, seed=1),
        document(7, seed=2, weighted=True, counted=split),
        document(3, seed=3),
    ]
    store = TokenStore.open(write(tmp_path / "store", documents))
    for index, each in enumerate(documents):
        assert_equal(store.document(index), each)
    # 7 predicted tokens a piece of 8: what has 7 before it is the second.
    assert [store.name(i) for i in range(4)] == ["rows.jsonl:0", "rows.jsonl:1", "rows.jsonl:2#2", "rows.jsonl:3"]


def test_a_store_without_weights_and_pieces_has_no_files_for_them(tmp_path: Path) -> None:
    path = write(tmp_path / "store", [document(5)])
    assert not (path / "weights.bin").exists()
    assert not (path / "counted.bin").exists()


@given(
    lengths=st.lists(st.integers(1, 30), min_size=1, max_size=20),
    data=st.data(),
    weighted=st.booleans(),
    split=st.booleans(),
)
def test_many_documents_at_once_equal_each_by_itself(
    tmp_path_factory: pytest.TempPathFactory, lengths: list[int], data: st.DataObject, weighted: bool, split: bool
) -> None:
    documents = [document(length, seed=i, weighted=weighted) for i, length in enumerate(lengths)]
    if split:
        documents.append(document(4, seed=99, counted=Counted(1, 7, 1, 4, 20, 2, 3)))
    store = TokenStore.open(write(tmp_path_factory.mktemp("store") / "s", documents))
    ids = data.draw(st.lists(st.integers(0, len(store) - 1), max_size=30))
    many = store.documents(ids)
    assert many.offsets.tolist() == np.cumsum([0, *(len(documents[i].tokens) for i in ids)]).tolist()
    for place, index in enumerate(ids):
        one = store.document(index)
        own = slice(many.offsets[place], many.offsets[place + 1])
        np.testing.assert_array_equal(many.tokens[own], one.tokens)
        np.testing.assert_array_equal(many.supervised[own], one.supervised)
        np.testing.assert_array_equal(many.turn_start[own], one.turn_start)
        assert (many.weights is None) == (one.weights is None)
        if many.weights is not None:
            np.testing.assert_array_equal(many.weights[own], one.weights)
        if many.counted is not None:
            assert Counted(*many.counted[place].tolist()) == one.counted
    assert (many.counted is None) == (not split)


def test_facts_count_what_is_predicted(tmp_path: Path) -> None:
    with StoreWriter(tmp_path / "store", vocab_size=300, eos_id=7, max_seq_length=64) as writer:
        documents = [document(9, seed=i) for i in range(5)]
        for each in documents[:2]:
            writer.append(each)
        writer.end_part("first", 0.25)
        for each in documents[2:]:
            writer.append(each)
        writer.end_part("second", 0.75)
        writer.tally.drop("rows.jsonl:17", "too long")
        writer.tally.truncated = 3
        path = writer.finish()
    facts = TokenStore.open(path).facts()
    # The first token of a document is never predicted, so its flag does not count.
    assert facts.supervised_tokens == sum(int(each.supervised[1:].sum()) for each in documents)
    assert (facts.documents, facts.tokens, facts.longest, facts.truncated) == (5, 45, 9, 3)
    assert facts.parts == (Part("first", 2, 0.25), Part("second", 3, 0.75))
    assert facts.dropped == {"too long": 1}
    assert (facts.eos_id, facts.vocab_size, facts.max_seq_length) == (7, 300, 64)
    assert json.loads((path / "dropped.jsonl").read_text()) == {"name": "rows.jsonl:17", "reason": "too long"}


def test_the_fingerprint_is_that_of_the_content_and_what_made_it(tmp_path: Path) -> None:
    def fingerprint(name: str, documents: list[Document], identity: dict[str, object] | None = None) -> str:
        with StoreWriter(tmp_path / name, vocab_size=300, eos_id=1, identity=identity) as writer:
            for each in documents:
                writer.append(each)
            return TokenStore.open(writer.finish()).fingerprint

    documents = [document(5), document(6, seed=1)]
    first = fingerprint("a", documents)
    assert fingerprint("b", documents) == first
    assert fingerprint("c", [each._replace(name=f"elsewhere:{i}") for i, each in enumerate(documents)]) == first
    assert fingerprint("d", documents[::-1]) != first
    assert fingerprint("e", documents, {"tokenizer": "x"}) != first
    flipped = documents[0]._replace(supervised=~documents[0].supervised)
    assert fingerprint("f", [flipped, documents[1]]) != first


def _cut(name: str) -> Callable[[Path], None]:
    return lambda path: (path / name).write_bytes((path / name).read_bytes()[:-1])


def _remove(name: str) -> Callable[[Path], None]:
    return lambda path: (path / name).unlink()


def _alter_manifest(**changes: object) -> Callable[[Path], None]:
    def alter(path: Path) -> None:
        manifest = json.loads((path / MANIFEST).read_text())
        (path / MANIFEST).write_text(json.dumps({**manifest, **changes}))

    return alter


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (_cut("tokens.bin"), "tokens.bin is not as it was written"),
        (_cut("rows.bin"), "rows.bin is not as it was written"),
        (_remove("offsets.bin"), "no such file"),
        (_remove(MANIFEST), "is not a token store"),
        (_cut(MANIFEST), "store.json cannot be read"),
        (_alter_manifest(fingerprint="0" * 32), "store.json was altered"),
        (_alter_manifest(format="something"), "is something else's"),
        (_alter_manifest(version=99), "written by another version"),
    ],
)
def test_a_damaged_or_foreign_store_is_refused_by_name(
    tmp_path: Path, damage: Callable[[Path], None], said: str
) -> None:
    path = write(tmp_path / "store", [document(9, seed=i) for i in range(4)])
    damage(path)
    with pytest.raises(DataError, match=said) as refused:
        TokenStore.open(path)
    assert str(path) in str(refused.value)


def test_verify_finds_a_changed_byte(tmp_path: Path) -> None:
    path = write(tmp_path / "store", [document(9)])
    TokenStore.open(path).verify()
    content = bytearray((path / "tokens.bin").read_bytes())
    content[3] ^= 1
    (path / "tokens.bin").write_bytes(content)
    with pytest.raises(DataError, match=r"tokens\.bin is not what was written"):
        TokenStore.open(path).verify()


def test_leaving_without_finishing_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), StoreWriter(tmp_path / "store", vocab_size=300, eos_id=1) as writer:
        writer.append(document(5))
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []


def test_a_store_without_documents_is_none(tmp_path: Path) -> None:
    with (
        pytest.raises(DataError, match="no documents"),
        StoreWriter(tmp_path / "s", vocab_size=300, eos_id=1) as writer,
    ):
        writer.finish()
    assert list(tmp_path.iterdir()) == []


def test_the_second_of_two_equal_stores_gives_way(tmp_path: Path) -> None:
    first = write(tmp_path / "store", [document(5)])
    stamp = (first / MANIFEST).stat().st_mtime_ns
    assert write(tmp_path / "store", [document(5)]) == first
    assert (first / MANIFEST).stat().st_mtime_ns == stamp
    assert [place.name for place in tmp_path.iterdir()] == ["store"]


def test_what_is_in_the_way_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "mine.txt").write_text("precious")
    with pytest.raises(DataError, match="in the way"):
        write(tmp_path / "store", [document(5)])
    assert (tmp_path / "store" / "mine.txt").read_text() == "precious"
    assert [place.name for place in tmp_path.iterdir()] == ["store"]


@pytest.mark.parametrize(
    ("code", "said"),
    [(errno.ENOSPC, "no disk space left"), (errno.EACCES, "cannot be written"), (errno.EROFS, "written")],
)
def test_troubles_of_the_disk_are_told_to_people(tmp_path: Path, code: int, said: str) -> None:
    with pytest.raises(DataError, match=said), disk_errors(tmp_path):
        raise OSError(code, "of the system")


def test_a_full_disk_is_told_and_leaves_nothing(tmp_path: Path) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full on this system")
    writer = StoreWriter(tmp_path / "store", vocab_size=300, eos_id=1)
    writer._files["tokens.bin"]._file = Path("/dev/full").open("wb")  # noqa: SIM115 (the writer closes it)
    with pytest.raises(DataError, match="no disk space left"), writer:
        writer.append(document(5))
        writer.finish()
    assert list(tmp_path.iterdir()) == []


def test_a_store_goes_to_another_process_as_its_path(tmp_path: Path) -> None:
    store = TokenStore.open(write(tmp_path / "store", [document(5)]))
    assert len(pickle.dumps(store)) < 1000
    assert_equal(pickle.loads(pickle.dumps(store)).document(0), document(5))


def test_a_store_may_be_moved(tmp_path: Path) -> None:
    path = write(tmp_path / "store", [document(5)])
    shutil.move(path, tmp_path / "elsewhere")
    assert_equal(TokenStore.open(tmp_path / "elsewhere").document(0), document(5))
