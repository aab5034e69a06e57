"""Hostile tokenizer folders: rows are tokenized, or one error names the tokenizer."""

from __future__ import annotations

import copy
import functools
import json
import operator
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import launcher.prepare
from seqaware.config.loading import REPOSITORY
from seqaware.config.schema import ModelConfig
from seqaware.data.chat import InferenceTokenizer
from seqaware.data.tokenization import load_tokenizer
from tests.fuzz import hostile
from tests.fuzz.bounds import corpus, ends_well, fuzzed, refuses_clearly
from tests.fuzz.test_deepspeed_json import PIECES
from tests.small_tokenizers import CHATML, byte_level, with_dummy_space

ARGUMENTS = [
    *("train_configs/demo.yaml", "--set=dataset.store_dir=stores", "--set=evaluation.dataset=null"),
    *("--set=evaluation.metric=none", "--set=dataset.name=token-rows.jsonl", "--set=format.prompt_template=null"),
    "--set=training.schedule={global_batch_size: 1, num_epochs: 1}",
]
TALK = [{"role": "user", "content": "a <|end|> é"}, {"role": "assistant", "content": "b"}]
LINES = [{"question": "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaa!", "answer": "#### 3\n\n é🙂"}, {"messages": TALK}]
CONFIG: dict[str, Any] = {
    **json.loads((REPOSITORY / "demo/tokenizer/tokenizer_config.json").read_text()),
    "chat_template": CHATML,
    "added_tokens_decoder": {"0": {"content": "<|pad|>", "special": True}},
    "special_tokens_map_file": None,
}
KEYS = [
    *(
        *CONFIG,
        "bos_token",
        "unk_token",
        "tokenizer_class",
        "auto_map",
        "extra_special_tokens",
        "additional_special_tokens",
    ),
    *(
        "tokenizer_file",
        "vocab_file",
        "processor_class",
        "clean_up_tokenization_spaces",
        "padding_side",
        "name_or_path",
    ),
    *(
        "added_tokens_decoder.1",
        "added_tokens_decoder.x",
        "added_tokens_decoder.-5.content",
        "eos_token.content",
        "eos_token",
    ),
    *("add_bos_token", "add_prefix_space", "legacy", "split_special_tokens", "truncation_side", "from_slow", "backend"),
]
_TOKEN = {
    "id": 0,
    "content": "a",
    "single_word": False,
    "lstrip": True,
    "rstrip": True,
    "normalized": True,
    "special": True,
}
# What the library reads at each place, and few expect there.
PARTS: dict[str, list[Any]] = {
    "normalizer": [
        *({"type": name} for name in ("NFC", "NFKD", "Lowercase", "Nmt", "Fuse", "BertNormalizer")),
        {"type": "Replace", "pattern": {"Regex": "(a+)+$"}, "content": "x" * 60},
        {"type": "Replace", "pattern": {"Regex": ""}, "content": "xx"},
        {"type": "Replace", "pattern": {"String": ""}, "content": "xx"},
        {"type": "Prepend", "prepend": "x" * 10**5},
        {"type": "Strip", "strip_left": True, "strip_right": True},
        {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "a"}] * 2000},
        {"type": "Sequence", "normalizers": [{"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}] * 40},
        {"type": "Precompiled", "precompiled_charsmap": "AAAA"},
    ],
    "pre_tokenizer": [
        *({"type": name} for name in ("BertPreTokenizer", "Whitespace", "WhitespaceSplit", "UnicodeScripts")),
        {"type": "Split", "pattern": {"Regex": "(a|aa)+$"}, "behavior": "Isolated", "invert": False},
        {"type": "Split", "pattern": {"Regex": "(?=a)|$"}, "behavior": "MergedWithNext", "invert": True},
        {"type": "Split", "pattern": {"Regex": "("}, "behavior": "Removed", "invert": True},
        {"type": "Split", "pattern": {"Regex": "."}, "behavior": "Removed", "invert": False},
        {
            "type": "Sequence",
            "pretokenizers": [{"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True}] * 9,
        },
        {"type": "FixedLength", "length": 0},
        {"type": "Metaspace", "replacement": "a", "prepend_scheme": "always", "split": False},
        {"type": "Digits", "individual_digits": True},
    ],
    "post_processor": [
        {
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "x", "type_id": 0}}],
            "pair": [],
            "special_tokens": {},
        },
        {
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "x", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 2**31}}],
            "pair": [],
            "special_tokens": {"x": {"id": "x", "ids": [2**32 - 1] * 9, "tokens": ["x"]}},
        },
        {"type": "BertProcessing", "sep": ["x", 10**6], "cls": ["y", 10**6]},
        {"type": "RobertaProcessing", "sep": ["", 0], "cls": ["", 0], "trim_offsets": True, "add_prefix_space": True},
        {"type": "Sequence", "processors": []},
    ],
    "decoder": [
        *({"type": name} for name in ("Fuse", "ByteFallback")),
        {"type": "Strip", "content": "a", "start": 2**40, "stop": 2**40},
        {"type": "CTC", "pad_token": "", "word_delimiter_token": "", "cleanup": True},
        {"type": "Replace", "pattern": {"Regex": "(a+)+$"}, "content": "x" * 60},
        {"type": "WordPiece", "prefix": "", "cleanup": True},
    ],
    "model": [
        {"type": "BPE", "vocab": {"a": 0, "b": 4294967295}, "merges": []},
        {"type": "BPE", "vocab": {"a": 0, "aa": 1}, "merges": [["a", "a"], ["aa", "aa"]]},
        {"type": "BPE", "vocab": {"a": 0, "aa": 1}, "merges": ["a a", "a a"], "unk_token": "x", "byte_fallback": True},
        {"type": "BPE", "vocab": {}, "merges": [], "dropout": 1.0},
        {"type": "Unigram", "vocab": [["a", -1e308], ["b", 1e308], ["", 0]], "unk_id": 0},
        {"type": "Unigram", "vocab": [["a", 0.0]], "unk_id": 7},
        {"type": "Unigram", "vocab": [["a", 0.0]], "unk_id": None, "byte_fallback": True},
        {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "x"},
        {
            "type": "WordPiece",
            "vocab": {"a": 0},
            "unk_token": "",
            "continuing_subword_prefix": "",
            "max_input_chars_per_word": 2**63,
        },
    ],
    "padding": [
        {
            "strategy": {"Fixed": 2**40},
            "direction": "Left",
            "pad_id": 0,
            "pad_type_id": 0,
            "pad_token": "x",
            "pad_to_multiple_of": 0,
        },
    ],
    "truncation": [
        {"max_length": length, "stride": 5, "strategy": "LongestFirst", "direction": "Right"}
        for length in (0, 1, 2**62)
    ],
    "added_tokens": [
        *([], [{**_TOKEN, "id": 2**32 - 1}], [{**_TOKEN, "content": ""}], [_TOKEN, {**_TOKEN, "id": 1}]),
        [{**_TOKEN, "id": number, "content": "a" * number} for number in range(1, 400)],
    ],
}
OTHERS = {
    "special_tokens_map.json": {"eos_token": "<|end|>", "additional_special_tokens": ["<x>"]},
    "added_tokens.json": {"<y>": 600},
    "config.json": {"model_type": "llama"},
    "chat_template.jinja": None,
    "vocab.json": {"a": 0},
}


def _places(value: Any, before: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every place in a JSON value, of long lists and mappings the first two."""
    if before:
        yield before
    pairs = value.items() if isinstance(value, Mapping) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in list(pairs)[: 2 if len(value) > 20 else None] if pairs else ():
        yield from _places(inner, (*before, key))


BASES = [json.loads((REPOSITORY / "demo/tokenizer/tokenizer.json").read_text())]
BASES += [json.loads(make().backend_tokenizer.to_str()) for make in (byte_level, with_dummy_space)]
PLACES = [list(_places(base)) for base in BASES]


@st.composite
def tokenizer_jsons(draw: st.DrawFn) -> bytes:
    """A small tokenizer with parts of other ones, with a hostile value at a place of any depth, or damaged as text."""
    number = draw(st.integers(0, len(BASES) - 1))
    made = copy.deepcopy(BASES[number])
    match draw(st.integers(0, 4)):
        case 0:
            *parents, last = draw(st.sampled_from(PLACES[number]))
            functools.reduce(operator.getitem, parents, made)[last] = draw(hostile.values)
        case 1:
            return draw(hostile.damaged(json.dumps(made), PIECES))
        case _:
            for key in draw(st.lists(st.sampled_from(sorted(PARTS)), max_size=2)):
                made[key] = draw(st.sampled_from(PARTS[key]))
    return json.dumps(made).encode()


@st.composite
def folders(draw: st.DrawFn) -> dict[str, bytes]:
    """The files of a tokenizer."""
    changes = draw(st.lists(st.tuples(st.sampled_from(KEYS), hostile.values), max_size=1))
    made = {"tokenizer_config.json": json.dumps(hostile.mutated(CONFIG, changes)).encode()}
    made["tokenizer.json"] = draw(tokenizer_jsons())
    for name in draw(st.lists(st.sampled_from(sorted(OTHERS)), max_size=1)):
        value = draw(st.one_of(st.just(OTHERS[name]), hostile.values, st.just(["<x>"] * 3000)))
        text = json.dumps(value)
        made[name] = draw(hostile.damaged(text, PIECES)) if draw(st.integers(0, 3)) == 0 else text.encode()
    if draw(st.integers(0, 15)) == 0:
        del made[draw(st.sampled_from(sorted(made)))]
    return made


def tokenize(place: Path, folder: Path) -> None:
    """Prepare rows with the tokenizer, and ask it what inference asks."""
    shutil.rmtree(place / "stores", ignore_errors=True)
    (place / "token-rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in LINES))
    ends_well(launcher.prepare.app, [*ARGUMENTS, f"--set=model.tokenizer=./{folder.name}"])

    def infer() -> None:
        inference = InferenceTokenizer.of(load_tokenizer(ModelConfig(base_name=str(folder))), None)
        inference.tokenizer.decode([0, 1, 2], skip_special_tokens=True)

    refuses_clearly(infer)


@fuzzed("tokenizers")
@given(files=folders())
def test_a_hostile_tokenizer_tokenizes_or_is_refused(place: Path, files: dict[str, bytes]) -> None:
    folder = place / "tokenizer"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for name, content in files.items():
        (folder / name).write_bytes(content)
    tokenize(place, folder)


@pytest.mark.parametrize("path", corpus("tokenizers"), ids=lambda path: path.stem)
def test_tokenizers_that_once_failed(place: Path, path: Path) -> None:
    """Each is one file beside the demo's others."""
    folder = place / path.stem
    shutil.copytree(REPOSITORY / "demo/tokenizer", folder)
    name = "tokenizer.json" if path.suffix == ".json" else path.suffix.removeprefix(".") + ".json"
    (folder / name).write_bytes(path.read_bytes())
    tokenize(place, folder)
