"""How fast a token store is read at random, and how fast it is made, beside the tokenizer library's own batch encode.

    python -m benchmarks.data_store [--out FILE]

Both sides tokenise the same prompts and completions with the same tokenizer in one run, in turn.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from benchmarks.machine import machine
from seqaware.config.schema import Config
from seqaware.data.encode import ExampleEncoder
from seqaware.data.encode_pool import CHUNK_RECORDS
from seqaware.data.sources import Record
from seqaware.data.store.store_writer import Block
from seqaware.data.store.token_store import StoreWriter, TokenStore
from seqaware.data.tokenization import prepare_store, recipe_of

DOCUMENTS = 300_000
MEAN_TOKENS = 188  # GSM8K's mean with GPT-2's tokenizer
READS = 100_000
READS_AT_ONCE = 256
ROWS = 12_000
REPEATS = 3


def best(function: Callable[[], object]) -> dict[str, float]:
    """The fastest of REPEATS runs: seconds on the wall, and of this process's processor time."""
    wall, cpu = [], []
    for _ in range(REPEATS):
        wall_start, cpu_start = time.perf_counter(), time.process_time()
        function()
        wall.append(time.perf_counter() - wall_start)
        cpu.append(time.process_time() - cpu_start)
    return {"seconds": round(min(wall), 4), "cpu_seconds": round(min(cpu), 4)}


def rate(count: int, measured: dict[str, float]) -> dict[str, float]:
    """With the rate, and the rate by processor time: what it would be if this process had a core to itself."""
    rates = {"per_second": round(count / measured["seconds"])}
    if "cpu_seconds" in measured:
        rates["per_cpu_second"] = round(count / measured["cpu_seconds"])
    return {**measured, **rates}


def write_store(folder: Path) -> TokenStore:
    """A store of GSM8K-like lengths."""
    draw = np.random.default_rng(0)
    with StoreWriter(folder / "store", vocab_size=50_257, eos_id=0) as writer:
        for first in range(0, DOCUMENTS, 10_000):
            lengths = np.clip(draw.lognormal(np.log(MEAN_TOKENS) - 0.1, 0.45, 10_000), 2, 2048).astype(np.int64)
            tokens = int(lengths.sum())
            block = Block(
                tokens=draw.integers(0, 50_257, tokens, dtype=np.uint32),
                supervised=draw.random(tokens) < 0.5,
                turn_start=np.zeros(tokens, dtype=np.bool_),
                weights=None,
                lengths=lengths,
                rows=np.arange(first, first + 10_000),
                counted=None,
                prefix="rows",
            )
            writer.append_block(block)
        return TokenStore.open(writer.finish())


def measure_reads(store: TokenStore) -> dict[str, Any]:
    """Documents in a random order: several at once (the hot path), and one by one with name and counts."""
    ids = np.random.default_rng(1).permutation(len(store))[:READS]
    one_by_one = ids.tolist()

    def at_once() -> None:
        for first in range(0, READS, READS_AT_ONCE):
            store.documents(ids[first : first + READS_AT_ONCE])

    def singly() -> None:
        for index in one_by_one:
            store.document(index)

    return {
        "documents_in_store": len(store),
        "mean_tokens": round(store.facts().tokens / len(store), 1),
        f"documents({READS_AT_ONCE})": rate(READS, best(at_once)),
        "document(i)": rate(READS, best(singly)),
        "open": best(lambda: TokenStore.open(store.path)),
    }


def rows() -> list[dict[str, Any]]:
    """Questions and worked answers of words that do not all repeat, so that the tokenizer has work to do."""
    choose = random.Random(0)
    words = ["".join(choose.choices("abcdefghijklmnopqrstuvwxyz", k=choose.randint(2, 9))) for _ in range(20_000)]

    def text(count: int) -> str:
        return " ".join(choose.choices(words, k=count))

    return [
        {"question": text(40) + "?", "answer": f"{text(50)} {i}+1=<<{i}+1={i + 1}>>{i + 1}\n#### {i + 1}"}
        for i in range(ROWS)
    ]


def train_tokenizer(data: list[dict[str, Any]]) -> PreTrainedTokenizerFast:
    tokenizer: Any = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=8192, special_tokens=["<eos>"], initial_alphabet=alphabet)
    tokenizer.train_from_iterator((row["question"] + row["answer"] for row in data[:4000]), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>")


def measure_tokenising(folder: Path) -> dict[str, Any]:
    data = rows()
    tokenizer = train_tokenizer(data)
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in data))
    config = Config.model_validate(
        {"model": {"base_name": "none"}, "dataset": {"name": str(path), "store_dir": str(folder / "stores")}}
    )
    recipe = recipe_of(config.dataset, config=config, tokenizer=tokenizer, max_seq_length=2048)
    encoder = ExampleEncoder(recipe)
    records = [Record(row, "rows", i) for i, row in enumerate(data)]
    texts = [text for row in data for text in (f"Question: {row['question']}\nAnswer:", " " + row["answer"])]
    backend: Any = Tokenizer.from_str(recipe.tokenizer_json)

    def ours() -> None:
        for first in range(0, ROWS, CHUNK_RECORDS):
            encoder.encode(records[first : first + CHUNK_RECORDS])

    def library() -> None:
        for first in range(0, len(texts), 2 * CHUNK_RECORDS):
            chunk = texts[first : first + 2 * CHUNK_RECORDS]
            [encoding.ids for encoding in backend.encode_batch(chunk, add_special_tokens=False)]

    def transformers_call() -> None:
        for first in range(0, len(texts), 2 * CHUNK_RECORDS):
            tokenizer(texts[first : first + 2 * CHUNK_RECORDS], add_special_tokens=False)

    start = time.perf_counter()
    store = TokenStore.open(prepare_store(config.dataset, config=config, tokenizer=tokenizer, max_seq_length=2048))
    whole = {"seconds": round(time.perf_counter() - start, 3)}
    measured = {
        "tokenizers.encode_batch": rate(ROWS, best(library)),
        "transformers tokenizer(...)": rate(ROWS, best(transformers_call)),
        "ours: template, both parts, flags": rate(ROWS, best(ours)),
        "ours: prepare_store, file to finished store": rate(ROWS, whole),
    }
    fastest_peer = min(measured[name]["seconds"] for name in list(measured)[:2])
    ratio = measured["ours: template, both parts, flags"]["seconds"] / fastest_peer
    return {
        "rows": ROWS,
        "tokens": store.facts().tokens,
        "rates_in": "rows",
        **measured,
        "ours_over_fastest_peer": round(ratio, 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "data_store.json")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        result = {
            "machine": machine(),
            "load_before": [round(each, 2) for each in os.getloadavg()],
            "reads": measure_reads(write_store(folder)),
            "tokenising": measure_tokenising(folder),
        }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
