"""The Hugging Face hub, as `datasets` and transformers see it, against a hub on loopback."""

from __future__ import annotations

import ast
import gzip
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from tests import patience
from tests.hub import Hub, hub
from tests.small_tokenizers import byte_level

ROWS = [{"question": f"{i} + 1 = ?", "answer": f"{i} + 1 = {i + 1}\n#### {i + 1}"} for i in range(40)]
SHARDS = 3

# A process of its own: the libraries read the hub's address when they are imported.
READ = """
import json, sys
from seqaware.config.dataset_config import DatasetConfig
from seqaware.data.sources import open_source
from seqaware.errors import DataError
try:
    records = list(open_source(DatasetConfig.model_validate_json(sys.argv[1])).records())
    print(json.dumps([[record.name, record.fields] for record in records]))
except DataError as error:
    print(json.dumps(str(error)))
"""
PREPARE = """
import sys
from seqaware.config.schema import Config
from seqaware.data.store.token_store import TokenStore
from seqaware.data.tokenization import load_tokenizer, prepare_store
config = Config.model_validate_json(sys.argv[1])
tokenizer = load_tokenizer(config.model)
store = TokenStore.open(prepare_store(config.dataset, config=config, tokenizer=tokenizer, max_seq_length=64))
print([len(store), store.name(2), tokenizer.decode(store.document(2).tokens.tolist())])
"""
# Whole, and in three parts: whether the files have the same names and bytes, or why there are none; for each dataset.
PARTS = """
import json, sys
from dataclasses import replace
from seqaware.config.schema import Config
from seqaware.data.store.store_parts import PartNumber, merge_parts, prepare_part
from seqaware.data.tokenization import Job, load_tokenizer, prepare_store
from seqaware.errors import DataError
written = json.loads(sys.argv[1])
told = []
for dataset in written.pop("datasets"):
    config = Config.model_validate({**written, "dataset": dataset})
    asked = {"config": config, "tokenizer": load_tokenizer(config.model), "max_seq_length": 64}
    whole = prepare_store(config.dataset, **asked)
    job = Job.of(config.dataset, **asked)
    job = replace(job, path=job.path.parent / "in-parts" / job.path.name)
    try:
        for index in (3, 1, 2):
            prepare_part(job, PartNumber(index, 3))
        merged = merge_parts(job, 3, command="")
    except DataError as error:
        told.append(error.what)
        continue
    files = [{file.name: file.read_bytes() for file in path.iterdir()} for path in (whole, merged)]
    told.append(files[0] == files[1] and merged.name == whole.name)
print(json.dumps(told))
"""


def card(subset: str, **splits: str) -> str:
    files = "".join(f"  - split: {split}\n    path: {path}\n" for split, path in splits.items())
    return f"---\nconfigs:\n- config_name: {subset}\n  data_files:\n{files}---\n"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    root = tmp_path_factory.mktemp("hub")
    gsm8k = root / "gsm8k"
    (gsm8k / "main").mkdir(parents=True)
    (gsm8k / "README.md").write_text(card("main", train="main/train-*", test="main/test-*"))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), gsm8k / "main" / "train-00000-of-00001.parquet")
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS[:7]), gsm8k / "main" / "test-00000-of-00001.parquet")
    c4 = root / "c4"
    (c4 / "en").mkdir(parents=True)
    (c4 / "README.md").write_text(card("en", train="en/c4-train.*.json.gz"))
    for shard in range(SHARDS):
        lines = "".join(json.dumps({"text": f"{shard}/{row}", "url": "x"}) + "\n" for row in range(50))
        (c4 / "en" / f"c4-train.{shard:05d}-of-{SHARDS:05d}.json.gz").write_bytes(gzip.compress(lines.encode()))
    byte_level().save_pretrained(root / "tokenizer")
    with hub({"openai/gsm8k": gsm8k, "allenai/c4": c4}, models={"someone/model": root / "tokenizer"}) as running:
        yield running


def run(code: str, argument: dict[str, Any], environment: dict[str, str]) -> str:
    done = patience.run([sys.executable, "-c", code, json.dumps(argument)], cwd=Path.cwd(), env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip().splitlines()[-1]


def test_a_dataset_is_downloaded_by_its_short_name(server: Hub, tmp_path: Path) -> None:
    read = json.loads(run(READ, {"name": "gsm8k"}, server.environment(tmp_path)))
    assert read == [[f"gsm8k/train:{i}", row] for i, row in enumerate(ROWS)]
    # What was downloaded is there without the hub, too.
    environment = {**server.environment(tmp_path), "HF_HUB_OFFLINE": "1"}
    assert len(json.loads(run(READ, {"name": "gsm8k", "split": "test"}, environment))) == 7


def test_a_few_rows_of_a_large_dataset_do_not_download_it(server: Hub, tmp_path: Path) -> None:
    before = len(server.requests)
    read = json.loads(run(READ, {"name": "c4", "max_examples": 20}, server.environment(tmp_path)))
    assert [fields["text"] for _, fields in read] == [f"0/{row}" for row in range(20)]
    asked = [request for request in server.requests[before:] if request.endswith(".json.gz")]
    assert asked
    assert all("c4-train.00000" in request for request in asked)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"name": "someone/nothing"}, "the hub has no dataset someone/nothing"),
        ({"name": "gsm8k", "split": "dev"}, "Should be one of ['train', 'test']"),
        ({"name": "gsm8k", "subset": "socratic"}, "Available: ['main']; write one of these as dataset.subset"),
        ({"name": "gsm8k", "revision": "v2"}, "Revision 'v2' doesn't exist"),
        ({"name": "c4", "split": "dev", "max_examples": 5}, "Available splits: ['train']"),
    ],
)
def test_what_the_hub_does_not_have(server: Hub, tmp_path: Path, settings: dict[str, Any], said: str) -> None:
    assert said in json.loads(run(READ, settings, server.environment(tmp_path)))


def test_without_a_network(server: Hub, tmp_path: Path) -> None:
    environment = {**server.environment(tmp_path), "HF_HUB_OFFLINE": "1"}
    told = json.loads(run(READ, {"name": "gsm8k"}, environment))
    assert "the dataset openai/gsm8k cannot be read from the hub" in told
    assert "copy the data here" in told


def test_a_store_from_the_hub_needs_it_once(server: Hub, tmp_path: Path) -> None:
    config = {
        "model": {"base_name": "someone/model"},
        "dataset": {"name": "gsm8k", "max_examples": 5, "store_dir": str(tmp_path / "stores"), "workers": 1},
    }
    prepared = ast.literal_eval(run(PREPARE, config, server.environment(tmp_path)))
    assert prepared == [5, "gsm8k/train:2", "Question: 2 + 1 = ?\nAnswer: 2 + 1 = 3\n#### 3<|end|>"]
    before = sum("gsm8k" in request for request in server.requests)
    assert before > 0
    assert ast.literal_eval(run(PREPARE, config, server.environment(tmp_path))) == prepared
    assert sum("gsm8k" in request for request in server.requests) == before


def test_parts_of_hub_data_make_the_store_of_one_process(server: Hub, tmp_path: Path) -> None:
    datasets = [
        {"name": "gsm8k"},
        {"name": "gsm8k", "split": "train[3:31]"},
        {"name": "c4", "max_examples": 67},  # streamed, over two of the files
        {"name": "c4", "max_examples": 170},  # more than there are
        {"mixture": [{"name": "c4", "max_examples": 7}, {"name": "gsm8k", "split": "test"}]},
        {"name": "c4", "streaming": True},
    ]
    config = {
        "model": {"base_name": "someone/model"},
        "datasets": [{**dataset, "store_dir": str(tmp_path / "stores"), "workers": 1} for dataset in datasets],
    }
    *same, refused = json.loads(run(PARTS, config, server.environment(tmp_path)))
    assert same == [True] * 5
    assert refused.startswith("how many rows c4 has is not known before all are read")
