"""A store made in parts is the store that one process makes, byte for byte, or it is not made at all."""

from __future__ import annotations

import csv
import gzip
import json
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from seqaware.config.schema import Config
from seqaware.data import encode_pool
from seqaware.data.store import store_format, token_store
from seqaware.data.store.store_parts import PartNumber, merge_parts, parts_folder, prepare_part
from seqaware.data.store.token_store import TokenStore
from seqaware.data.tokenization import Job, load_tokenizer, prepare_store
from seqaware.errors import DataError
from tests.small_tokenizers import byte_level

Rows = list[dict[str, Any]]
COMMAND = "python launcher/prepare.py my.yaml"
LENGTH = 24
# Short and long, weighted and not, and such as nothing is left of.
ROW = st.one_of(
    st.builds(
        lambda words, tail: {"question": "12 " * words, "answer": "7 " * tail},
        st.integers(0, 12),
        st.integers(0, 40),
    ),
    st.builds(
        lambda tail, weight: {"question": "1", "answer": "2 " * tail, "weight": weight},
        st.integers(1, 30),
        st.sampled_from([0.0, 0.5, 1.0]),
    ),
)


def write_rows(path: Path, rows: Rows) -> Path:
    """Rows as the kind of file, or saved dataset, that the path says."""
    lines = "".join(json.dumps(row) + "\n" * (1 + index % 2) for index, row in enumerate(rows))  # blank lines too
    columns = {key: None for row in rows for key in row}
    full = [{key: row.get(key) for key in columns} for row in rows]
    match path.suffix:
        case ".jsonl":
            path.write_text(lines)
        case ".gz":
            path.write_bytes(gzip.compress(lines.encode()))
        case ".json":
            path.write_text(json.dumps(rows, indent=1))
        case ".csv":
            with path.open("w", newline="") as file:
                writer = csv.writer(file)
                writer.writerow(columns)
                for row in full:
                    # Lines inside a value, and blank ones between rows.
                    writer.writerow(
                        [1 if value is None else str(value).replace("12 7", "12\n7") for value in row.values()]
                    )
                    file.write("\r\n")
        case ".txt":
            path.write_text("".join(row["answer"] + "\r\n" for row in rows))
        case ".parquet":
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(full), path, row_group_size=3)
        case "":
            datasets.Dataset.from_list(full).save_to_disk(path)
    return path


def config(folder: Path, dataset: dict[str, Any], **form: Any) -> Config:
    return Config.model_validate(
        {
            "model": {"from_scratch": {"model_type": "llama"}, "tokenizer": str(folder / "tokenizer")},
            "dataset": {"workers": 1, **dataset},
            "format": form,
            "training": {"parameters": {"max_seq_length": LENGTH}},
        }
    )


def job(made: Config) -> Job:
    return Job.of(made.dataset, config=made, tokenizer=load_tokenizer(made.model), max_seq_length=LENGTH)


def whole(made: Config) -> Path:
    return prepare_store(made.dataset, config=made, tokenizer=load_tokenizer(made.model), max_seq_length=LENGTH)


def in_parts(made: Config, count: int, order: Sequence[int] | None = None) -> Path:
    wanted = job(made)
    for index in order or range(1, count + 1):
        prepare_part(wanted, PartNumber(index, count))
    return merge_parts(wanted, count, command=COMMAND)


def content(path: Path) -> dict[str, bytes]:
    """Every file, but for the note that somebody has verified them."""
    return {file.name: file.read_bytes() for file in path.iterdir() if file.stem != "verified"}


def result(make: Callable[[], Path]) -> tuple[str, dict[str, bytes]] | str:
    try:
        path = make()
    except DataError as error:
        return str(error)
    return path.name, content(path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tokenizer."""
    made = tmp_path_factory.mktemp("parts")
    byte_level().save_pretrained(made / "tokenizer")
    return made


def draw_source(draw: st.DataObject, name: Path) -> dict[str, Any]:
    """A source of several files or a saved dataset, perhaps sliced and limited."""
    files = draw.draw(st.integers(1, 3), label="files")
    rows = draw.draw(st.lists(ROW, min_size=files, max_size=25), label="rows")
    kind = draw.draw(st.sampled_from([".jsonl", ".jsonl.gz", ".json", ".csv", ".txt", ".parquet", ""]), label="kind")
    if kind:
        name.mkdir()
    for part in range(files if kind else 1):
        write_rows(name / f"train-{part}{kind}" if kind else name, rows[part::files] if kind else rows)
    source: dict[str, Any] = {"name": str(name)}
    if draw.draw(st.booleans(), label="sliced"):
        source["split"] = f"train[{draw.draw(st.integers(0, 9))}:]"
    if draw.draw(st.booleans(), label="limited"):
        source["max_examples"] = draw.draw(st.integers(1, 30))
    return source


@settings(max_examples=50, deadline=None)
@given(draw=st.data())
def test_parts_put_together_are_the_store_of_one_process(folder: Path, draw: st.DataObject) -> None:
    with tempfile.TemporaryDirectory(dir=folder) as scratch, pytest.MonkeyPatch.context() as patched:
        place = Path(scratch)
        sources = [draw_source(draw, place / f"source-{i}") for i in range(draw.draw(st.integers(1, 3)))]
        dataset = sources[0] if len(sources) == 1 else {"mixture": sources}
        form = {"on_overlong": draw.draw(st.sampled_from(["truncate", "drop", "split", "error"]))}
        count = draw.draw(st.integers(1, 7), label="parts")
        patched.setattr(encode_pool, "CHUNK_RECORDS", draw.draw(st.integers(1, 9), label="chunk"))
        patched.setattr(token_store, "_DOCUMENTS_AT_ONCE", draw.draw(st.integers(1, 9), label="block"))
        patched.setattr(store_format, "_NAMED_DROPPED", 3)
        one = config(folder, {**dataset, "store_dir": str(place / "one")}, **form)
        many = config(folder, {**dataset, "store_dir": str(place / "many")}, **form)
        expected = result(lambda: whole(one))
        got = result(lambda: in_parts(many, count, draw.draw(st.permutations(range(1, count + 1)))))
        if form["on_overlong"] == "error" and isinstance(expected, str):
            assert isinstance(got, str)  # perhaps about another row: the order of the parts was free
            return
        assert got == expected
        if not isinstance(expected, str):
            assert not parts_folder(job(many)).exists()
            assert result(lambda: whole(many)) == expected  # found, not made


ROWS: Rows = [{"question": f"{i} + 1", "answer": f"{i + 1}"} for i in range(30)]


@pytest.fixture
def wanted(folder: Path, tmp_path: Path) -> Job:
    """The job of thirty rows."""
    write_rows(tmp_path / "rows.jsonl", ROWS)
    return job(config(folder, {"name": str(tmp_path / "rows.jsonl"), "store_dir": str(tmp_path / "stores")}))


def _remove(part: Path) -> None:
    shutil.rmtree(part)


def _cut_tokens(part: Path) -> None:
    (part / "0" / "tokens.bin").write_bytes((part / "0" / "tokens.bin").read_bytes()[:-1])


def _flip_a_token(part: Path) -> None:
    content = bytearray((part / "0" / "tokens.bin").read_bytes())
    content[0] ^= 1
    (part / "0" / "tokens.bin").write_bytes(content)


def _cut_note(part: Path) -> None:
    (part / "part.json").write_text((part / "part.json").read_text()[:-9])


def _alter_note(part: Path) -> None:
    note = part / "part.json"
    note.write_text(note.read_text().replace('"records": 10', '"records": 11'))


def _lose_note(part: Path) -> None:
    (part / "part.json").unlink()


def _take_the_next(part: Path) -> None:
    shutil.rmtree(part)
    shutil.copytree(part.with_name("3-of-3"), part)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (_remove, "part 2/3 is missing"),
        (_cut_tokens, r"part 2/3 is torn \(.*tokens\.bin is not as it was written"),
        (_flip_a_token, r"part 2/3 is torn \(.*tokens\.bin is not what was written"),
        (_cut_note, r"part 2/3 is torn \(part\.json cannot be read"),
        (_alter_note, r"part 2/3 is torn \(part\.json was altered"),
        (_lose_note, r"part 2/3 is torn \(part\.json cannot be read"),
        (_take_the_next, r"part 2/3 is torn \(it is part 3/3"),
    ],
)
def test_a_part_that_is_not_whole_is_named_and_made_again(
    wanted: Job, damage: Callable[[Path], None], said: str
) -> None:
    for index in (1, 2, 3):
        prepare_part(wanted, PartNumber(index, 3))
    damage(parts_folder(wanted) / "2-of-3")
    with pytest.raises(DataError, match=rf"{said}.*; run: {COMMAND} --part 2/3$"):
        merge_parts(wanted, 3, command=COMMAND)
    assert wanted.found() is None
    rows: list[int] = []
    prepare_part(wanted, PartNumber(2, 3), progress=rows.append)
    assert rows == [10]
    assert len(TokenStore.open(merge_parts(wanted, 3, command=COMMAND))) == 30


def test_all_parts_that_miss_are_in_one_message(wanted: Job) -> None:
    prepare_part(wanted, PartNumber(2, 4))
    with pytest.raises(DataError, match=rf"part 1/4 is missing; part 3/4 .*: {COMMAND} --part 1/4, and .* 3/4, 4/4$"):
        merge_parts(wanted, 4, command=COMMAND)


def test_of_many_parts_that_miss_the_first_are_named(wanted: Job) -> None:
    with pytest.raises(DataError, match=r"part 20/400000 is missing; run.*, and perhaps others$"):
        merge_parts(wanted, 400_000, command=COMMAND)


def test_a_part_is_made_once(wanted: Job) -> None:
    rows: list[int] = []
    first = prepare_part(wanted, PartNumber(1, 3), progress=rows.append)
    stamp = (first / "part.json").stat().st_mtime_ns
    assert prepare_part(wanted, PartNumber(1, 3), progress=rows.append) == first
    assert rows == [10] and (first / "part.json").stat().st_mtime_ns == stamp


def test_parts_of_another_tokenizer_are_not_taken(wanted: Job) -> None:
    other = replace(wanted, identity={**wanted.identity, "tokenizer": "another"})
    prepare_part(other, PartNumber(1, 1))
    with pytest.raises(DataError, match="part 1/1 was made by another tokenizer"):
        merge_parts(wanted, 1, command=COMMAND)
    prepare_part(wanted, PartNumber(1, 1))
    assert len(TokenStore.open(merge_parts(wanted, 1, command=COMMAND))) == 30


def test_hosts_that_saw_different_data_are_found_out(wanted: Job) -> None:
    prepare_part(wanted, PartNumber(1, 2))
    (parts_folder(wanted) / "rows.json").write_text("[[20]]")  # as on a host whose copy is shorter
    prepare_part(wanted, PartNumber(2, 2))
    with pytest.raises(DataError, match=r"different data.*got 20 and 30 rows"):
        merge_parts(wanted, 2, command=COMMAND)


def test_a_part_that_fails_leaves_nothing_but_what_was_counted(wanted: Job, tmp_path: Path) -> None:
    with (tmp_path / "rows.jsonl").open("a") as file:
        file.write('{"question": "half')
    prepare_part(wanted, PartNumber(1, 2))
    with pytest.raises(DataError, match=r"rows\.jsonl, line 46: not JSON"):
        prepare_part(wanted, PartNumber(2, 2))
    assert {place.name for place in parts_folder(wanted).iterdir() if place.suffix != ".lock"} == {
        "1-of-2",
        "rows.json",
    }


def test_a_source_that_shrinks_while_it_is_read_is_told(wanted: Job, tmp_path: Path) -> None:
    prepare_part(wanted, PartNumber(1, 2))
    write_rows(tmp_path / "rows.jsonl", ROWS[:20])
    with pytest.raises(DataError, match=r"rows\.jsonl changed while it was read; got 5 rows where 15"):
        prepare_part(wanted, PartNumber(2, 2))


@pytest.mark.parametrize("text", ["3", "0/8", "9/8", "1/0", "-1/8", "a/b", "1/2/3", "", "½/2"])
def test_parts_that_do_not_exist(text: str) -> None:
    with pytest.raises(DataError, match="I/N"):
        PartNumber.parse(text)


def test_the_rows_of_all_parts_are_all_rows() -> None:
    assert PartNumber.parse("3/8") == PartNumber(3, 8)
    for total in range(40):
        for count in range(1, 12):
            runs = [PartNumber(index, count).rows_of(total) for index in range(1, count + 1)]
            assert [row for begin, end in runs for row in range(begin, end)] == list(range(total))
            assert max(end - begin for begin, end in runs) - min(end - begin for begin, end in runs) <= 1
