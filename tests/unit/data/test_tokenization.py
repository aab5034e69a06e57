"""From a config to a store: made once, by one process, whatever happens meanwhile."""

from __future__ import annotations

import functools
import json
import multiprocessing
import os
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from seqaware.config.schema import Config
from seqaware.data import encode_pool
from seqaware.data.encode_pool import CHUNK_RECORDS
from seqaware.data.store import token_store as store_module
from seqaware.data.store.store_format import MANIFEST
from seqaware.data.store.store_index import CODE_VERSION, find_store
from seqaware.data.store.token_store import TokenStore
from seqaware.data.tokenization import load_tokenizer, prepare_store
from seqaware.errors import ConfigError, DataError
from tests.patience import LAUNCH_SECONDS, wait_for
from tests.small_tokenizers import CHATML, byte_level

ROWS = [{"question": f"{i} + 1", "answer": f"{i + 1}"} for i in range(30)]


def jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def tokenizer_folder(tmp_path: Path) -> Path:
    byte_level().save_pretrained(tmp_path / "tokenizer")
    return tmp_path / "tokenizer"


def config(folder: Path, *, dataset: dict[str, Any] | None = None, max_seq_length: int = 64, **form: Any) -> Config:
    written = {"name": str(folder / "rows.jsonl")} if dataset is None else dataset
    return Config.model_validate(
        {
            "model": {"from_scratch": {"model_type": "llama"}, "tokenizer": str(folder / "tokenizer")},
            "dataset": {"store_dir": str(folder / "stores"), "workers": 1, **written},
            "format": form,
            "training": {"parameters": {"max_seq_length": max_seq_length}},
        }
    )


def prepare(made: Config, progress: Any = None) -> Path:
    length = made.training.parameters.max_seq_length
    assert length is not None
    tokenizer = load_tokenizer(made.model)
    return prepare_store(made.dataset, config=made, tokenizer=tokenizer, max_seq_length=length, progress=progress)


def entries(folder: Path) -> set[str]:
    """What lies in the folder of stores, without locks."""
    return {place.name for place in (folder / "stores").glob("*") if place.suffix != ".lock"}


def test_a_store_is_made_once_and_found_again(tmp_path: Path, tokenizer_folder: Path) -> None:
    jsonl(tmp_path / "rows.jsonl", ROWS)
    made = config(tmp_path)
    assert find_store(made) is None
    seen: list[int] = []
    path = prepare(made, seen.append)
    assert seen == [30]
    store = TokenStore.open(path)
    assert len(store) == 30
    assert store.document(16).name == "rows.jsonl:17"
    text = byte_level().decode(store.document(16).tokens)
    assert text == "Question: 16 + 1\nAnswer: 17<|end|>"
    stamp = (path / MANIFEST).stat().st_mtime_ns
    assert prepare(made, seen.append) == path == find_store(made)
    assert (path / MANIFEST).stat().st_mtime_ns == stamp
    assert seen == [30]
    assert entries(tmp_path) == {path.name}
    store.verify()


def test_tokens_of_these_rows_stay_what_they_were(tmp_path: Path, tokenizer_folder: Path) -> None:
    """Other tokens or flags for the same data, tokenizer and format need a higher CODE_VERSION."""
    talk = [{"role": "user", "content": "1"}, {"role": "assistant", "content": "2"}]
    rows = [{"prompt": "1 ", "completion": "2"}, {"text": "3"}, {"messages": talk}]
    jsonl(tmp_path / "rows.jsonl", rows)
    store = TokenStore.open(prepare(config(tmp_path, chat_template=CHATML)))
    read = []
    for document in (store.document(i) for i in range(3)):
        tokens = byte_level().convert_ids_to_tokens(document.tokens.tolist())
        flags = zip(tokens, document.supervised, document.turn_start, strict=True)
        read.append("".join(f"{'_' * int(loss)}{'^' * int(starts)}{token}" for token, loss, starts in flags))
    assert CODE_VERSION == 1
    assert read == [
        "1Ġ_^2_<|end|>",
        "_3_<|end|>",
        "<|im_start|>userĊ1<|im_end|>Ċ<|im_start|>assistantĊ_^2_<|im_end|>Ċ",
    ]


def test_whatever_decides_the_tokens_makes_another_store(tmp_path: Path, tokenizer_folder: Path) -> None:
    jsonl(tmp_path / "rows.jsonl", ROWS)
    paths = {
        prepare(config(tmp_path)),
        prepare(config(tmp_path, max_seq_length=32)),
        prepare(config(tmp_path, answer_template="{answer}")),
        prepare(config(tmp_path, dataset={"name": str(tmp_path / "rows.jsonl"), "max_examples": 29})),
    }
    byte_level(adds_bos=True).save_pretrained(tokenizer_folder)
    paths.add(prepare(config(tmp_path)))
    jsonl(tmp_path / "rows.jsonl", [*ROWS[1:], ROWS[0]])
    paths.add(prepare(config(tmp_path)))
    assert len({TokenStore.open(path).fingerprint for path in paths}) == len(paths) == 6


def test_the_same_content_elsewhere_has_the_same_fingerprint(tmp_path: Path, tokenizer_folder: Path) -> None:
    jsonl(tmp_path / "rows.jsonl", ROWS)
    jsonl(tmp_path / "copy.jsonl", ROWS)
    first = prepare(config(tmp_path))
    second = prepare(config(tmp_path, dataset={"name": str(tmp_path / "copy.jsonl")}))
    assert first != second
    assert TokenStore.open(first).fingerprint == TokenStore.open(second).fingerprint


def test_several_processes_give_what_one_gives(
    tmp_path: Path, tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encode_pool, "_SECONDS_ALONE", 0.0)
    rows = [{"question": f"{i}", "answer": "12 " * (i % 9)} for i in range(9 * CHUNK_RECORDS + 1)]
    jsonl(tmp_path / "rows.jsonl", rows)
    settings = {"name": str(tmp_path / "rows.jsonl")}
    alone = TokenStore.open(prepare(config(tmp_path, dataset={**settings, "store_dir": str(tmp_path / "one")})))
    both = TokenStore.open(
        prepare(config(tmp_path, dataset={**settings, "store_dir": str(tmp_path / "two"), "workers": 2}))
    )
    assert both.fingerprint == alone.fingerprint
    assert [both.name(i) for i in (0, 700, len(both) - 1)] == [alone.name(i) for i in (0, 700, len(both) - 1)]


def test_an_error_in_another_process_is_told_as_in_one(
    tmp_path: Path, tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encode_pool, "_SECONDS_ALONE", 0.0)
    rows: list[dict[str, Any]] = [{"question": "1", "answer": "2"}] * (3 * CHUNK_RECORDS)
    jsonl(tmp_path / "rows.jsonl", [*rows, {"question": None, "answer": "2"}])
    with pytest.raises(DataError, match=rf"rows\.jsonl:{len(rows) + 1}: the field 'question'"):
        prepare(config(tmp_path, dataset={"name": str(tmp_path / "rows.jsonl"), "workers": 2}))
    assert entries(tmp_path) == set()


def test_mixtures_keep_their_parts_together(tmp_path: Path, tokenizer_folder: Path) -> None:
    a = jsonl(tmp_path / "a.jsonl", ROWS[:10])
    b = jsonl(tmp_path / "b.jsonl", [{"problem": "7", "answer": "8"}] * 5)
    mixture = [
        {"name": str(a), "proportion": 0.7, "max_examples": 4},
        {"name": str(b), "proportion": 0.3, "columns": {"question": "problem"}},
    ]
    store = TokenStore.open(prepare(config(tmp_path, dataset={"mixture": mixture})))
    assert store.facts().parts == ((str(a), 4, 0.7), (str(b), 5, 0.3))
    assert [store.name(i) for i in range(9)] == [
        *(f"a.jsonl:{i}" for i in range(1, 5)),
        *(f"b.jsonl:{i}" for i in range(1, 6)),
    ]


def test_what_was_left_out_is_counted_and_named(tmp_path: Path, tokenizer_folder: Path) -> None:
    long = {"question": "12 " * 100, "answer": "3"}
    jsonl(tmp_path / "rows.jsonl", [ROWS[0], long, {"question": "1", "answer": "7 " * 200}, ROWS[1]])
    path = prepare(config(tmp_path))
    facts = TokenStore.open(path).facts()
    assert (facts.records, facts.documents, facts.truncated) == (4, 3, 2)
    assert facts.dropped == {"no supervised token": 1}
    assert "rows.jsonl:2" in (path / "dropped.jsonl").read_text()
    split = TokenStore.open(prepare(config(tmp_path, on_overlong="split")))
    assert split.facts().split == 2
    assert "rows.jsonl:3#2" in [split.name(i) for i in range(len(split))]


def _prepare_together(folder: Path, ready: Any, out: Any) -> None:
    made = config(folder)
    tokenizer = load_tokenizer(made.model)
    ready.wait()
    out.put(str(prepare_store(made.dataset, config=made, tokenizer=tokenizer, max_seq_length=64)))


def test_two_processes_at_once_make_one_store(tmp_path: Path, tokenizer_folder: Path) -> None:
    jsonl(tmp_path / "rows.jsonl", ROWS * 100)
    context = multiprocessing.get_context("spawn")
    out: Any = context.Queue()
    ready = context.Barrier(2)
    both = [context.Process(target=_prepare_together, args=(tmp_path, ready, out)) for _ in range(2)]
    for process in both:
        process.start()
    found = {out.get(timeout=LAUNCH_SECONDS) for _ in both}
    for process in both:
        process.join()
    assert len(found) == 1
    assert entries(tmp_path) == {Path(found.pop()).name}


def _prepare_slowly(folder: Path) -> None:
    made = config(folder, dataset={"name": str(folder / "rows.jsonl"), "workers": 1})

    def stop_here(rows: int) -> None:
        (folder / "half-way").touch()
        time.sleep(600)

    prepare(made, stop_here)


def test_killed_on_the_way_it_leaves_nothing_that_passes_for_a_store(tmp_path: Path, tokenizer_folder: Path) -> None:
    jsonl(tmp_path / "rows.jsonl", ROWS * 100)
    process = multiprocessing.get_context("spawn").Process(target=_prepare_slowly, args=(tmp_path,))
    process.start()
    wait_for("the middle of the rows", (tmp_path / "half-way").exists)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert any("unfinished" in name for name in entries(tmp_path))
    assert find_store(config(tmp_path)) is None
    path = prepare(config(tmp_path))
    assert len(TokenStore.open(path)) == 3000
    # The next writer has cleared away what the killed one left.
    assert entries(tmp_path) == {path.name}


def test_a_damaged_store_is_refused_not_replaced(tmp_path: Path, tokenizer_folder: Path) -> None:
    jsonl(tmp_path / "rows.jsonl", ROWS)
    path = prepare(config(tmp_path))
    (path / "tokens.bin").write_bytes(b"")
    with pytest.raises(DataError, match=r"corrupt: tokens\.bin.*delete the folder and prepare"):
        prepare(config(tmp_path))


def test_a_store_that_was_altered_at_the_same_size_is_refused(tmp_path: Path, tokenizer_folder: Path) -> None:
    jsonl(tmp_path / "rows.jsonl", ROWS)
    path = prepare(config(tmp_path))
    named = config(tmp_path, dataset={"name": str(path)})
    prepare(config(tmp_path))
    written = (path / "tokens.bin").read_bytes()
    times = (path / "tokens.bin").stat()
    (path / "tokens.bin").write_bytes(bytes([written[0] ^ 1]) + written[1:])
    os.utime(path / "tokens.bin", ns=(times.st_atime_ns, times.st_mtime_ns))
    for made in (config(tmp_path), named, named):
        with pytest.raises(DataError, match=rf"{path.name} is corrupt: tokens\.bin is not what.*delete the folder and"):
            prepare(made)
    (path / "tokens.bin").write_bytes(written)
    assert prepare(config(tmp_path)) == prepare(named) == path


def test_a_store_is_verified_when_it_is_used_again_and_then_no_more(
    tmp_path: Path, tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    jsonl(tmp_path / "rows.jsonl", ROWS)
    read: list[Path] = []
    verify = TokenStore.verify

    def recorded(self: TokenStore) -> None:
        read.append(self.path)
        verify(self)

    monkeypatch.setattr(TokenStore, "verify", recorded)
    path = prepare(config(tmp_path))
    assert read == []  # it has just been written
    for _ in range(3):
        prepare(config(tmp_path))
    assert read == [path]
    (path / "rows.bin").touch()
    monkeypatch.setattr(store_module, "_VERIFIED_BYTES", 0)
    prepare(config(tmp_path))
    assert read == [path]  # too large to be read for this alone


def test_a_store_in_a_folder_that_may_only_be_read_is_verified(
    tmp_path: Path, tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    jsonl(tmp_path / "rows.jsonl", ROWS)
    path = prepare(config(tmp_path))
    before = sorted(path.iterdir())
    monkeypatch.setattr(os, "access", lambda place, mode: False)
    assert prepare(config(tmp_path)) == path
    assert sorted(path.iterdir()) == before
    written = (path / "tokens.bin").read_bytes()
    (path / "tokens.bin").write_bytes(bytes(len(written)))
    with pytest.raises(DataError, match=r"corrupt: tokens\.bin"):
        prepare(config(tmp_path))


@pytest.mark.parametrize(
    ("key", "value"),
    [("max_examples", 3), ("split", "test"), ("columns", {"question": "problem"}), ("subset", "en"), ("revision", "a")],
)
def test_rows_of_a_prepared_store_cannot_be_chosen_again(
    tmp_path: Path, tokenizer_folder: Path, key: str, value: Any
) -> None:
    jsonl(tmp_path / "rows.jsonl", ROWS)
    path = prepare(config(tmp_path))
    made = config(tmp_path, dataset={"name": str(path), key: value})
    for use in (prepare, find_store):
        with pytest.raises(DataError, match=rf"is a prepared store.*; got {key}: .*; leave these keys out, or name"):
            use(made)


def test_a_prepared_store_may_be_named_in_a_config_that_writes_every_key(
    tmp_path: Path, tokenizer_folder: Path
) -> None:
    jsonl(tmp_path / "rows.jsonl", ROWS)
    path = prepare(config(tmp_path))
    short = config(tmp_path, dataset={"name": str(path)})
    assert prepare(Config.model_validate(short.model_dump(mode="json"))) == path


def test_a_prepared_store_may_be_named_itself(tmp_path: Path, tokenizer_folder: Path) -> None:
    jsonl(tmp_path / "rows.jsonl", ROWS)
    path = prepare(config(tmp_path))
    named = config(tmp_path, dataset={"name": str(path)})
    assert prepare(named) == path == find_store(named)
    with pytest.raises(DataError, match="holds documents longer than a row"):
        prepare(config(tmp_path, dataset={"name": str(path)}, max_seq_length=4))
    with pytest.raises(DataError, match="cannot be part of a mixture"):
        prepare(config(tmp_path, dataset={"mixture": [{"name": str(path)}]}))
    tokenizer = byte_level()
    larger = load_tokenizer(named.model)
    larger.add_tokens(["<new>"])
    assert len(larger) == len(tokenizer) + 1
    with pytest.raises(DataError, match="made by another tokenizer"):
        prepare_store(named.dataset, config=named, tokenizer=larger, max_seq_length=64)


def test_stores_that_may_only_be_read_are_found(tmp_path: Path, tokenizer_folder: Path) -> None:
    jsonl(tmp_path / "rows.jsonl", ROWS)
    path = prepare(config(tmp_path))
    for lock in (tmp_path / "stores").glob("*.lock"):
        lock.unlink()
    (tmp_path / "stores").chmod(0o555)
    try:
        assert prepare(config(tmp_path)) == path
        assert not list((tmp_path / "stores").glob("*.lock"))
    finally:
        (tmp_path / "stores").chmod(0o755)


def test_a_folder_for_stores_that_is_a_file(tmp_path: Path, tokenizer_folder: Path) -> None:
    jsonl(tmp_path / "rows.jsonl", ROWS)
    (tmp_path / "stores").write_text("in the way")
    with pytest.raises(DataError, match=r"stores cannot be written.*dataset\.store_dir"):
        prepare(config(tmp_path))


@pytest.mark.parametrize(
    ("rows", "form", "said"),
    [
        ([], {}, r"the dataset .*rows\.jsonl is empty"),
        ([{"title": "x"}], {}, r"rows\.jsonl:1: no columns that make an example; got columns: title"),
        (ROWS, {"prompt_template": "{nothing}"}, r"\{nothing\} that is not there; fields: question, answer"),
        ([{"question": "12 " * 90, "answer": "3"}], {}, "dataset has no example with a supervised token; got 1 rows"),
        ([{"question": "12 " * 90, "answer": "3"}], {"on_overlong": "error"}, r"rows\.jsonl:1: longer than 64 tokens"),
    ],
)
def test_data_that_cannot_be_trained_on_leaves_nothing(
    tmp_path: Path, tokenizer_folder: Path, rows: list[dict[str, Any]], form: dict[str, Any], said: str
) -> None:
    jsonl(tmp_path / "rows.jsonl", rows)
    with pytest.raises(DataError, match=said):
        prepare(config(tmp_path, **form))
    assert entries(tmp_path) == set()


def test_a_line_that_is_broken_leaves_nothing(tmp_path: Path, tokenizer_folder: Path) -> None:
    jsonl(tmp_path / "rows.jsonl", ROWS)
    with (tmp_path / "rows.jsonl").open("a") as file:
        file.write('{"question": "half')
    with pytest.raises(DataError, match=r"rows\.jsonl, line 31: not JSON"):
        prepare(config(tmp_path))
    assert entries(tmp_path) == set()


def test_a_tokenizer_without_eos(tmp_path: Path, tokenizer_folder: Path) -> None:
    file = tokenizer_folder / "tokenizer_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "eos_token": None}))
    (tokenizer_folder / "special_tokens_map.json").unlink(missing_ok=True)
    with pytest.raises(ConfigError, match="has no end-of-sequence token; set eos_token"):
        load_tokenizer(config(tmp_path).model)


def test_tokenizers_that_cannot_be_read(tmp_path: Path, tokenizer_folder: Path) -> None:
    (tokenizer_folder / "tokenizer.json").write_text("{ half")
    with pytest.raises(ConfigError, match=r"is damaged: tokenizer\.json cannot be used"):
        load_tokenizer(config(tmp_path).model)
    for file in tokenizer_folder.iterdir():
        file.unlink()
    with pytest.raises(ConfigError, match=r"cannot be used; .*model\.tokenizer"):
        load_tokenizer(config(tmp_path).model)


DOUBLES = {"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}


def change(tokenizer_folder: Path, **parts: Any) -> None:
    file = tokenizer_folder / "tokenizer.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **parts}))


@pytest.mark.parametrize(
    ("parts", "said"),
    [
        ({"version": None}, "cannot be used; got invalid type: null"),
        ({"model": {"type": "Unigram", "vocab": [["x", 0.0]], "unk_id": None}}, "cannot be used; got .*unk_id"),
        ({"model": {"type": "BPE", "vocab": {"a": 7}, "merges": [["b", "c"]]}}, "cannot be used"),
        # A panic of the library's Rust code is no `Exception` of Python.
        ({"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}}, "cannot be used; got Precompiled"),
        (
            {"normalizer": {"type": "Sequence", "normalizers": [DOUBLES] * 40}},
            "its normalizer makes texts more",
        ),
        ({"decoder": {"type": "Replace", "pattern": {"String": "a"}, "content": "x" * 65}}, "its decoder makes texts"),
        ({"version": [[[[]]]] * 1_700_000}, "damaged: tokenizer.json cannot be used; got more than 5,000,000 values"),
        ({"version": "x" * 65 * 2**20}, "damaged: tokenizer.json cannot be used; got larger than 64 MiB"),
        ({"version": functools.reduce(lambda inner, _: [inner], range(70), [])}, "got nested more than 64 levels"),
    ],
    ids=["type", "unknown", "merge", "panic", "normalizer", "decoder", "values", "size", "depth"],
)
def test_a_hostile_tokenizer_is_refused(
    tmp_path: Path, tokenizer_folder: Path, parts: dict[str, Any], said: str
) -> None:
    change(tokenizer_folder, **parts)
    with pytest.raises(ConfigError, match=said):
        load_tokenizer(config(tmp_path).model)


@pytest.mark.parametrize("name", ["tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"])
@pytest.mark.parametrize("content", ["[" * 100_000, "{ half", "9" * 5000, '"\\ud800"'], ids=range(4))
def test_hostile_files_beside_a_tokenizer_are_refused(
    tmp_path: Path, tokenizer_folder: Path, name: str, content: str
) -> None:
    (tokenizer_folder / name).write_text(content)
    with pytest.raises(ConfigError, match=f"is damaged: {name} cannot be used"):
        load_tokenizer(config(tmp_path).model)


def test_a_tokenizer_with_ids_outside_its_vocabulary_is_refused(tmp_path: Path, tokenizer_folder: Path) -> None:
    written = json.loads((tokenizer_folder / "tokenizer.json").read_text())
    vocab = {token: number * 10 for token, number in written["model"]["vocab"].items()}
    change(tokenizer_folder, model={**written["model"], "vocab": vocab})
    jsonl(tmp_path / "rows.jsonl", [{"text": "12"}])
    with pytest.raises(DataError, match="the tokenizer gives ids outside its vocabulary of"):
        prepare(config(tmp_path))


def test_the_order_of_documents_is_that_of_the_rows(tmp_path: Path, tokenizer_folder: Path) -> None:
    jsonl(tmp_path / "rows.jsonl", [{"text": "12 " * (1 + i % 7)} for i in range(3 * CHUNK_RECORDS + 5)])
    store = TokenStore.open(prepare(config(tmp_path)))
    np.testing.assert_array_equal(
        store.lengths[: 2 * CHUNK_RECORDS : 7], np.full(len(range(0, 2 * CHUNK_RECORDS, 7)), store.lengths[0])
    )
    assert store.name(len(store) - 1) == f"rows.jsonl:{3 * CHUNK_RECORDS + 5}"
