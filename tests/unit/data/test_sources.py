"""Names of datasets, and the rows behind them."""

from __future__ import annotations

import gzip
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from seqaware.config.dataset_config import DatasetConfig
from seqaware.data import readers
from seqaware.data.resolve_source import SHORT_NAMES, _files_matching, locate
from seqaware.data.sources import Record, open_source
from seqaware.errors import DataError

CORRUPT_GZ = bytes(
    byte ^ 0x5A if 20 <= place < 60 else byte
    for place, byte in enumerate(gzip.compress(b'{"question":"a","answer":"b"}\n' * 5000, mtime=0))
)
ROWS = [{"question": f"{i} + 1 = ?", "answer": f"{i + 1}"} for i in range(5)]


def spec(name: Path | str, **settings: Any) -> DatasetConfig:
    return DatasetConfig(name=str(name), **settings)


def records(name: Path | str, **settings: Any) -> list[Record]:
    return list(open_source(spec(name, **settings)).records())


def jsonl(path: Path, rows: Sequence[object] = ROWS) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def write_kind(folder: Path, kind: str) -> Path:
    path = folder / f"rows.{kind}"
    lines = "".join(json.dumps(row) + "\n" for row in ROWS)
    match kind:
        case "jsonl" | "ndjson":
            path.write_text(lines)
        case "jsonl.gz":
            path.write_bytes(gzip.compress(lines.encode()))
        case "json":
            path.write_text(json.dumps(ROWS, indent=2))
        case "csv":
            path.write_text("question,answer\n" + "".join(f'"{row["question"]}",{row["answer"]}\n' for row in ROWS))
        case "tsv":
            path.write_text("question\tanswer\n" + "".join(f"{row['question']}\t{row['answer']}\n" for row in ROWS))
        case "parquet":
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)
    return path


@pytest.mark.parametrize("kind", ["jsonl", "ndjson", "jsonl.gz", "json", "csv", "tsv", "parquet"])
def test_every_kind_of_file_gives_the_same_rows(tmp_path: Path, kind: str) -> None:
    path = write_kind(tmp_path, kind)
    read = records(path)
    assert [record.fields for record in read] == ROWS
    first = 2 if kind in ("csv", "tsv") else 1  # behind the header
    assert [record.name for record in read] == [f"{path.name}:{first + i}" for i in range(5)]


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "json", "csv", "tsv", "parquet", "saved"])
def test_rows_may_be_asked_for_by_their_number(tmp_path: Path, kind: str) -> None:
    if kind == "saved":
        datasets.Dataset.from_list(ROWS).save_to_disk(str(tmp_path / "data"))
    else:
        for name in ("a", "b", "c"):
            (tmp_path / "data" / name).mkdir(parents=True)
            write_kind(tmp_path / "data" / name, kind)
    for settings in ({}, {"split": "train[2:]"}, {"split": "train[1:4]", "max_examples": 2}, {"max_examples": 7}):
        source = open_source(spec(tmp_path / "data", **settings), streaming=False)
        everything = list(source.records())
        counts = source.counts()
        assert source.total(counts) == len(everything)
        for begin in range(len(everything) + 2):
            for end in (None, *range(begin, len(everything) + 2)):
                assert list(source.records(begin, end)) == everything[begin:end]
                assert list(source.records(begin, end, counts=counts)) == everything[begin:end]


def test_a_file_named_json_may_have_an_object_a_line(tmp_path: Path) -> None:
    assert [record.fields for record in records(jsonl(tmp_path / "rows.json"))] == ROWS


def test_a_line_of_text_is_a_row(tmp_path: Path) -> None:
    (tmp_path / "book.txt").write_text("It is a truth\n\nuniversally acknowledged", encoding="utf-8")
    assert [(record.fields["text"], record.name) for record in records(tmp_path / "book.txt")] == [
        ("It is a truth", "book.txt:1"),
        ("", "book.txt:2"),
        ("universally acknowledged", "book.txt:3"),
    ]


def test_rows_bear_the_number_of_their_line_whatever_lines_are_blank(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"text": "a"}\n\n  \n{"text": "b"}\n')
    assert [record.name for record in records(tmp_path / "rows.jsonl")] == ["rows.jsonl:1", "rows.jsonl:4"]


def test_max_examples_and_slices_take_the_first_rows(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "rows.jsonl")
    assert [record.fields for record in records(path, max_examples=2)] == ROWS[:2]
    assert [record.fields for record in records(path, split="train[1:3]")] == ROWS[1:3]
    assert [record.fields for record in records(path, split="train[3:]")] == ROWS[3:]
    assert [record.fields for record in records(path, split="train[:4]", max_examples=3)] == ROWS[:3]
    with pytest.raises(DataError, match=r"by number.*train\[:10%\]"):
        records(path, split="train[:10%]")


def test_a_glob_and_a_folder_are_read_in_the_order_of_names(tmp_path: Path) -> None:
    jsonl(tmp_path / "b.jsonl", ROWS[2:])
    jsonl(tmp_path / "a.jsonl", ROWS[:2])
    (tmp_path / "notes.md").write_text("not data")
    for name in (tmp_path, tmp_path / "*.jsonl"):
        assert [record.fields for record in records(name)] == ROWS
        assert [record.name for record in records(name)][2] == "b.jsonl:1"


@pytest.mark.parametrize("layout", ["{}.jsonl", "{}-00000-of-00001.jsonl", "{}/rows.jsonl", "data/{}_0.jsonl"])
def test_a_folder_has_the_splits_that_its_files_are_named_after(tmp_path: Path, layout: str) -> None:
    jsonl(tmp_path / layout.format("train"), ROWS[:3])
    jsonl(tmp_path / layout.format("test"), ROWS[3:])
    jsonl(tmp_path / layout.format("training_notes"), ROWS)
    assert [record.fields for record in records(tmp_path)] == ROWS[:3]
    assert [record.fields for record in records(tmp_path, split="test")] == ROWS[3:]
    with pytest.raises(DataError, match="no files of the split 'validation'"):
        records(tmp_path, split="validation")


def test_a_single_file_has_no_other_split(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "rows.jsonl")
    with pytest.raises(DataError, match="is one file and has no split 'test'"):
        records(path, split="test")
    assert len(records(jsonl(tmp_path / "test.jsonl"), split="test")) == 5


def test_what_datasets_saved_is_read(tmp_path: Path) -> None:
    data = datasets.Dataset.from_list(ROWS)
    data.save_to_disk(str(tmp_path / "one"))
    datasets.DatasetDict({"train": data.select([0]), "test": data}).save_to_disk(str(tmp_path / "several"))
    assert [record.fields for record in records(tmp_path / "one")] == ROWS
    assert [record.fields for record in records(tmp_path / "several", split="test")] == ROWS
    assert [record.name for record in records(tmp_path / "several", split="test")][4] == "test:4"
    with pytest.raises(DataError, match="no split 'dev'; splits: test, train"):
        records(tmp_path / "several", split="dev")
    (tmp_path / "one" / "state.json").write_text("{")
    with pytest.raises(DataError, match="not a readable dataset folder"):
        records(tmp_path / "one")


def test_what_lies_on_the_disk_goes_before_short_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert locate(spec("gsm8k")).hub == SHORT_NAMES["gsm8k"]
    jsonl(tmp_path / "gsm8k" / "train.jsonl")
    assert [record.fields for record in records("gsm8k")] == ROWS


def test_names_of_the_hub(tmp_path: Path) -> None:
    assert locate(spec("c4", subset="de", revision="abc")).hub.subset == "de"
    assert locate(spec("c4")).hub.subset == "en"
    assert locate(spec("someone/something")).hub.repository == "someone/something"
    assert set(SHORT_NAMES) == {"gsm8k", "squad", "openbookqa", "c4", "wikipedia", "bookcorpus", "openwebtext"}


def test_only_what_is_limited_on_the_hub_is_streamed() -> None:
    assert open_source(spec("c4", max_examples=5)).streaming
    assert not open_source(spec("c4")).streaming
    assert not open_source(spec("c4", max_examples=5, split="train[:1%]")).streaming
    assert open_source(spec("c4"), streaming=True).streaming


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("gsm8", "unknown dataset 'gsm8'.*did you mean gsm8k.*squad, openbookqa"),
        ("nothing-like-it", "unknown dataset.*short names: gsm8k"),
        ("./no/such.jsonl", "file not found: ./no/such.jsonl"),
        ("/no/such/folder", "file not found"),
        ("no/such.jsonl", "file not found"),
        ("rows.csv", "file not found"),
        ("no/*.jsonl", "no file matches"),
    ],
)
def test_names_that_mean_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, said: str) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=said):
        locate(spec(name))


def test_files_of_unknown_kind(tmp_path: Path) -> None:
    (tmp_path / "rows.xlsx").write_bytes(b"PK")
    with pytest.raises(DataError, match=r"rows\.xlsx is of no known kind"):
        locate(spec(tmp_path / "rows.xlsx"))
    with pytest.raises(DataError, match="holds no data files"):
        locate(spec(tmp_path))


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.jsonl", b'{"text": "x"}\n{"text": \n{"text": "y"}\n', r"a\.jsonl, line 2: not JSON"),
        ("a.jsonl", b'{"text": "x"}\n[1, 2]\n', r"a\.jsonl, line 2: a line must be an object"),
        ("a.jsonl", b'{"text": "\xff"}\n', r"a\.jsonl is not UTF-8"),
        ("a.json", b'[{"text": "x"}, 3]', r"a\.json, element 2"),
        ("a.json", b'[{"text": "x"', r"a\.json, element 1: not JSON"),
        ("a.json", b'[{"text": "x"}', r"a\.json, element 1: not JSON.*ends too early"),
        ("a.json", b'[{"text": "x"} {}]', r"a\.json, element 1: not JSON.*expected ']'"),
        ("a.json", b'[{"text": "x"}] {}', r"a\.json, element 1: not JSON.*after the array"),
        ("a.json", b"[" * 100_000, r"a\.json, element 1: not JSON.*too deeply"),
        ("a.json", b'[{"text": ' + b"[" * 65 + b"]" * 65 + b"}]", r"a\.json, element 1: not JSON.*64 levels"),
        ("a.json", b'[{"text": "\\ud800"}]', r"a\.json, element 1: not JSON.*lone surrogate"),
        ("a.json", b'[{"text": ' + b"9" * 5000 + b"}]", r"a\.json, element 1: not JSON.*4300 digits"),
        ("a.jsonl", b'{"text": ' + b"[" * 100_000, r"a\.jsonl, line 1: not JSON.*levels deep"),
        ("a.jsonl", b'{"text": "\\ud800"}\n', r"a\.jsonl, line 1: not JSON.*lone surrogate"),
        ("a.jsonl", b'{"text": ' + b"9" * 5000 + b"}", r"a\.jsonl, line 1: not JSON.*4300 digits"),
        ("a.jsonl", b"\n" * 200_000, r"a\.jsonl, line 100001: 100,000 blank lines"),
        ("a.jsonl.gz", CORRUPT_GZ, r"a\.jsonl\.gz is truncated or corrupted.*invalid"),
        ("a.csv", b"question,answer\n1,2\n3\n", r"a\.csv, line 3: a row must have the header's 2 columns"),
        ("a.csv", b"question,answer\n1,2,3\n", r"a\.csv, line 2"),
        ("a.csv", b'question,answer\n"1,2\n', r"a\.csv, line \d: not CSV"),
        ("a.parquet", b"PAR1 and nothing else", r"a\.parquet is not a readable parquet file"),
        (
            "a.jsonl.gz",
            gzip.compress(b'{"text": "x"}\n' * 1000, mtime=0)[:-20],
            r"a\.jsonl\.gz is truncated or corrupted",
        ),
        ("a.jsonl.gz", b"not gzip at all", r"a\.jsonl\.gz cannot be read"),
    ],
)
def test_broken_files_are_told_by_name_and_line(tmp_path: Path, name: str, content: bytes, said: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=said):
        records(tmp_path / name)


class Piecewise(io.StringIO):
    """A file of which nobody may ask for more than a row at once."""

    def readline(self, size: int = -1) -> str:  # type: ignore[override]
        assert 0 < size <= 1001
        return super().readline(size)

    def read(self, size: int = -1) -> str:  # type: ignore[override]
        assert 0 < size <= 2000
        return super().read(size)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.jsonl", "x" * 9000, r"line 1: a row is longer"),
        ("a.jsonl", '{"text": "x"}\n' + " " * 9000, r"line 2: a row is longer"),
        ("a.json", "x" * 9000, r"line 1: a row is longer"),
        ("a.json", " " * 9000, r"line 1: a row is longer"),
        ("a.json", '[{"text": "' + "x" * 9000, r"element 1: not JSON.*longer than"),
        ("a.json", '[{"text": "x"},' + " " * 9000 + "{}]", r"element 2: not JSON.*white space"),
        ("a.json", "[" + " " * 9000 + "]", r"a\.json: not JSON.*white space"),
        ("a.txt", "x" * 9000, r"line 1: a row is longer"),
        ("a.csv", "x" * 9000, r"line 1: a row is longer"),
        ("a.csv", 'a,b\n"' + "x\n" * 9000, r"a row is longer|field larger"),
        ("a.csv", "a,b\n" + '"x\n",' * 9000, r"a row is longer"),
    ],
)
def test_a_row_that_is_too_long_is_refused_before_it_is_read(
    monkeypatch: pytest.MonkeyPatch, name: str, content: str, said: str
) -> None:
    """A compressed file of 6 MB may hold a line of 6 GB."""
    monkeypatch.setattr(readers, "ROW_CHARACTERS", 1000)
    monkeypatch.setattr(readers, "_CHUNK", 100)
    monkeypatch.setattr(readers, "_open", lambda path: Piecewise(content))
    with pytest.raises(DataError, match=said):
        list(readers.read_file(Path(name)))
    with pytest.raises(DataError, match=said):
        readers.count_rows(Path(name))


def test_parquet_rows_are_read_few_at_a_time_and_long_ones_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file of 300 KB may hold 10 GB."""
    rows = [{"text": f"{number:03}" * 100} for number in range(20)]
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=7)
    monkeypatch.setattr(readers, "_PARQUET_BYTES_AT_ONCE", 1000)
    for begin, end in ((0, None), (5, 9), (8, 17), (20, None)):
        expected = list(enumerate(rows, 1))[begin:end]
        assert list(readers.read_file(path, begin=begin, end=end)) == [(row, number) for number, row in expected]
        with readers._parquet(path) as file:
            assert all(len(batch) <= 3 for batch in readers._batches_from(file, begin, path))
    monkeypatch.setattr(readers, "ROW_CHARACTERS", 100)
    with pytest.raises(DataError, match=r"a\.parquet: its rows are longer than .* bytes on average"):
        list(readers.read_file(path))


@pytest.mark.parametrize("chunk", [1, 2, 3, 7, 1000])
def test_an_array_is_read_in_pieces_of_any_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    monkeypatch.setattr(readers, "_CHUNK", chunk)
    rows = [{"text": "a, ]é"}, {"n": 12345, "deep": [[{"x": None}]]}, {}, {"text": ""}]
    for number, indent in enumerate((None, 3)):
        path = tmp_path / f"{number}.json"
        path.write_text(" \n" + json.dumps(rows, indent=indent, ensure_ascii=False) + "\n ", encoding="utf-8")
        assert list(readers.read_file(path)) == [(row, place) for place, row in enumerate(rows, 1)]
        assert list(readers.read_file(path, begin=1, end=3)) == [(rows[1], 2), (rows[2], 3)]
        assert readers.count_rows(path) == 4
    (tmp_path / "empty.json").write_text(" [ ] ")
    assert list(readers.read_file(tmp_path / "empty.json")) == [] and readers.count_rows(path) == 4


def test_a_folder_with_too_many_files_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("seqaware.data.resolve_source._MOST_ENTRIES", 3)
    for number in range(4):
        jsonl(tmp_path / f"{number}.jsonl")
    for name in (tmp_path, tmp_path / "*.jsonl"):
        with pytest.raises(DataError, match="holds more than 3 files"):
            locate(spec(name))


def test_a_glob_that_matches_nothing_does_not_visit_any_number_of_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("seqaware.data.resolve_source._MOST_ENTRIES", 30)
    for number in range(10):
        (tmp_path / "a" / str(number)).mkdir(parents=True)
        jsonl(tmp_path / "a" / str(number) / "rows.jsonl")
    assert len(locate(spec(tmp_path / "a" / "*" / "rows.jsonl")).files) == 10
    for pattern in ("**/*.csv", "**/**/x.csv", "**/[0-9]/**/*.csv"):
        with pytest.raises(DataError, match="holds more than 30 files"):
            locate(spec(tmp_path / pattern))


@pytest.mark.parametrize(
    "pattern",
    [
        *("*.jsonl", "**/*.jsonl", "a/*.jsonl", "a/*/x.jsonl", "*/../*.jsonl", "**/b/**/*.jsonl", "a/a/[xy].json?"),
        *("**/a/*.jsonl", "./**/x.jsonl", "l*/*.jsonl", "**/link/*", ".*/*.jsonl", "**/**/y.jsonl"),
    ],
)
def test_a_glob_finds_what_python_finds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pattern: str) -> None:
    for folder in ("", "a", "a/a", "a/b", "b", "b/a/c", ".hidden"):
        (tmp_path / folder).mkdir(parents=True, exist_ok=True)
        for name in ("x.jsonl", "y.jsonl", "z.jsonlx"):
            jsonl(tmp_path / folder / name)
    (tmp_path / "folder.jsonl").mkdir()
    (tmp_path / "b" / "loop.jsonl").symlink_to("loop.jsonl")
    (tmp_path / "link").symlink_to("a")
    monkeypatch.chdir(tmp_path)
    for root in (Path(), tmp_path):
        found = sorted({path for path in root.glob(pattern) if path.is_file()})
        assert _files_matching(root / pattern) == found and found


def test_a_folder_that_cannot_be_listed_is_refused() -> None:
    with pytest.raises(DataError, match=r"cannot be listed|holds no data files|holds more than"):
        locate(spec("/proc"))
    with pytest.raises(DataError, match="is not a pattern"):
        locate(spec("**x"))
