"""Values that a schema, a file format or an option was not written for, and texts damaged at a random place."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

from hypothesis import strategies as st

INTEGERS = [
    *(-(2**63), -1, 0, 1, 2, 3, 7, 64, 127, 128, 1024, 1025, 2**31, 2**32 - 1, 2**53, 2**63 - 1, 2**63, 2**64),
    *(10**n for n in (5, 6, 7, 9, 12, 13, 15, 30, 100, 307, 308, 309, 400)),
]
NUMBERS = [5e-324, 1e-300, 1e-16, 0.1, 0.5, 1 - 1e-16, 1.0, 1.5, 1e5, 1e9, 1e12, 1e18, 1e100, 1e300, 1.7e308]
ODD_NUMBERS = [-0.0, -1.5, float("nan"), float("inf"), float("-inf")]
TEXTS = [
    *("", " ", "a", "x" * 255, "x" * 256, "x" * 5000, "é漢字🙂", "\u202ex", "a\0b", "\x1b[31mred", "\x7f", "a\nb"),
    *(
        "~",
        "~root",
        "~nouser/x",
        "../../x",
        "/etc/passwd",
        "/dev/null",
        "/dev/zero",
        "/dev/stdin",
        "a b/c d",
        "x/" * 3000,
    ),
    *("{question}", "{question.__class__.__mro__}", "{0}", "{", "{question!r:>99999999}", "%s", "[", "\\", "(a+)+$"),
    *("(?P<answer>", "(?P<answer>x)", "(?P<answer>(a+)+)$", "(?P<answer>x){99999999999}", "(" * 3000, "**x", "*?["),
    *("1e5", "1e999", "nan", "0x10", "1_000", "1:30", "2024-01-01", "9" * 400, "null", "true", "none", "auto"),
    *("train[:10%]", "train[10%:5%]", "train[-1:]", "train[:", "train[:999999999999999999]"),
    *("demo/train.jsonl", "demo", "demo/tokenizer", "ds_configs/zero3.json", "gpt2", "gsm8k", "no/such", "a/b/c"),
    *("cosine", "wsd", "muon", "lion", "cpu_adam", "bfloat16", "full", "selective", "offload", "llama", "mixtral"),
    *("os:system", "os.path:join", "a.b.c:d", "hf_" + "a" * 20, "https://user:pw@host/x", "http://127.0.0.1:1/x"),
]
CONTAINERS: list[Any] = [
    *([], {}, [[]], [None], [1, 2], ["a"], ["a", "a"], {"a": 1}, {"": 1}, {"a": {"b": {"c": [1, {"d": None}]}}}),
    {"name": "demo/heldout.jsonl"},
    [{"name": "demo/train.jsonl"}],
    [{"name": "demo/train.jsonl", "proportion": 1e-300}, {"name": "demo/train.jsonl", "proportion": 1e12}],
    [0] * 2000,
]

numbers = st.one_of(st.sampled_from(INTEGERS), st.sampled_from(NUMBERS), st.integers(-100, 10**5))
scalars = st.one_of(
    st.none(), st.booleans(), numbers, st.sampled_from(ODD_NUMBERS), st.sampled_from(TEXTS), st.text(max_size=20)
)
values = st.one_of(
    scalars,
    scalars,
    st.sampled_from(CONTAINERS).map(copy.deepcopy),
    st.lists(scalars, max_size=3),
    st.dictionaries(st.sampled_from(["name", "type", "model_type", "from", "steps", "a", ""]), scalars, max_size=3),
)


ABSENT = object()


def mutated(base: Mapping[str, Any], changes: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """A copy with other values at dotted paths, or without them (ABSENT); what stands in the way is replaced."""
    result = copy.deepcopy(dict(base))
    for path, value in changes:
        inner = result
        *parents, last = path.split(".")
        for name in parents:
            if not isinstance(inner.get(name), dict):
                inner[name] = {}
            inner = inner[name]
        if value is ABSENT:
            inner.pop(last, None)
        else:
            inner[last] = value
    return result


@st.composite
def damaged(draw: st.DrawFn, text: str, pieces: Sequence[str]) -> bytes:
    """The text with a piece put in, a part cut out, a part repeated, or bytes changed."""
    begin = draw(st.integers(0, len(text)))
    end = min(len(text), begin + draw(st.integers(0, 60)))
    match draw(st.sampled_from(["insert", "replace", "cut", "repeat", "bytes"])):
        case "insert":
            text = text[:begin] + draw(st.sampled_from(pieces)) + text[begin:]
        case "replace":
            text = text[:begin] + draw(st.sampled_from(pieces)) + text[end:]
        case "cut":
            text = text[:begin] + text[end:]
        case "repeat":
            text = text + text[begin:end]
        case _:
            content = bytearray(text.encode("utf-8", "surrogatepass"))
            for at in draw(st.lists(st.integers(0, max(0, len(content) - 1)), min_size=1, max_size=4)):
                content[at : at + 1] = draw(st.binary(min_size=1, max_size=1))
            return bytes(content)
    return text.encode("utf-8", "surrogatepass")
