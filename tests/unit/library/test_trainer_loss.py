"""What TrainerLoss refuses; that it is exact, tests/e2e/test_library.py shows with a Trainer."""

from __future__ import annotations

import subprocess
import sys
from itertools import chain
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

import seqaware
from seqaware import ConfigError, TrainerLoss, Weighting
from tests.oracles import suffix_weights

SIZES = {"vocab_size": 11, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
IDS = torch.arange(1, 9).view(2, 4)
TWO_DOCUMENTS = torch.tensor([[0, 1, 0, 1], [0, 1, 2, 3]])


def arguments(**changes: Any) -> Any:
    usual = {"n_gpu": 1, "world_size": 2, "average_tokens_across_devices": True}
    return SimpleNamespace(**{**usual, "label_smoothing_factor": 0.0, "use_liger_kernel": False, **changes})


def tiny(kind: Any = AutoModelForCausalLM, **changes: Any) -> Any:
    return kind.from_config(AutoConfig.for_model("llama", **SIZES, use_cache=False, **changes))


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"n_gpu": 2}, "DataParallel"),
        ({"average_tokens_across_devices": False}, "average_tokens_across_devices"),
        ({"label_smoothing_factor": 0.1}, "smoothing"),
        ({"use_liger_kernel": True}, "Liger"),
    ],
)
def test_settings_that_cannot_be_exact_are_refused(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        TrainerLoss(tiny(), arguments(**changes), weighting=Weighting(gamma=0.9))


def test_turns_and_other_kinds_of_models_are_refused() -> None:
    with pytest.raises(ConfigError, match="turn"):
        TrainerLoss(tiny(), arguments(), weighting=Weighting(gamma=0.9), positions="turn")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="causal"):
        TrainerLoss(
            tiny(AutoModelForSequenceClassification, pad_token_id=0), arguments(), weighting=Weighting(gamma=0.9)
        )


@pytest.mark.parametrize(
    ("call", "named"),
    [
        ({"attention_mask": torch.ones_like(IDS)}, "attention_mask"),
        ({"use_cache": True}, "cache"),
    ],
)
def test_packed_documents_that_would_see_each_other_are_refused(call: dict[str, Any], named: str) -> None:
    model = tiny()
    loss = TrainerLoss(model, arguments(), weighting=Weighting(gamma=0.9))
    labels = torch.where(TWO_DOCUMENTS == 0, -100, IDS)
    outputs = model(input_ids=IDS, position_ids=TWO_DOCUMENTS, **call)
    with pytest.raises(ConfigError, match=named):
        loss(outputs, labels, num_items_in_batch=5)


def test_borders_that_it_cannot_read_are_refused() -> None:
    model = tiny()
    loss = TrainerLoss(model, arguments(), weighting=Weighting(gamma=0.9))
    outputs = model(input_ids=IDS[:1], cu_seq_lens_q=torch.tensor([0, 2, 4], dtype=torch.int32))
    with pytest.raises(ConfigError, match="position_ids"):
        loss(outputs, IDS[:1], num_items_in_batch=2)


def test_a_batch_that_it_cannot_see_is_refused() -> None:
    model = tiny()
    loss = TrainerLoss(model, arguments(), weighting=Weighting(gamma=0.9))
    outputs = model(input_ids=IDS)
    with pytest.raises(ConfigError, match="labels"):
        loss(outputs, None, num_items_in_batch=6)
    with pytest.raises(ConfigError, match="not called"):
        loss(outputs, IDS, num_items_in_batch=6)
    outputs = model(input_ids=IDS, logits_to_keep=2)
    with pytest.raises(ConfigError, match="logits of every token"):
        loss(outputs, IDS, num_items_in_batch=6)


DOCUMENTS = ([3, 1, 4, 1], [5, 9, 2, 6, 5, 3])
PROMPT = 2


@pytest.mark.parametrize("rows", ["padded", "padded on the left", "packed"])
@pytest.mark.parametrize(
    ("positions", "weighting"),
    [
        ("supervised", Weighting(gamma=0.8)),
        ("sequence", Weighting(gamma=0.8)),
        ("supervised", Weighting(gamma=0.8, scale="mean_one")),
        ("sequence", Weighting(gamma=0.8, scheme="linear")),
    ],
    ids=["supervised", "sequence", "mean one", "linear"],
)
def test_each_document_is_weighed_by_itself_however_it_lies(rows: str, positions: Any, weighting: Weighting) -> None:
    torch.manual_seed(0)
    model = tiny().double()
    model.config.use_cache = False
    loss = TrainerLoss(model, arguments(), weighting=weighting, positions=positions)
    inputs, labels = laid_out(rows)
    found = loss(model(**inputs), labels, num_items_in_batch=7)
    # The norms of transformers are float32, and w is: some roundings of 2⁻²⁴.
    assert float(found.detach()) == pytest.approx(
        sum(alone(model, each, positions, weighting) for each in DOCUMENTS) / 7, rel=1e-6
    )


def laid_out(rows: str) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    answers = [[-100] * PROMPT + tokens[PROMPT:] for tokens in DOCUMENTS]
    if rows == "packed":
        places = torch.tensor([[i for tokens in DOCUMENTS for i in range(len(tokens))]])
        inputs = {"input_ids": torch.tensor([[*chain(*DOCUMENTS)]]), "position_ids": places}
        return inputs, torch.tensor([[*chain(*answers)]])
    longest = max(map(len, DOCUMENTS))

    def padded(lists: Any, empty: int) -> torch.Tensor:
        padding = [[empty] * (longest - len(each)) for each in lists]
        left = rows == "padded on the left"
        return torch.tensor([pad + each if left else each + pad for each, pad in zip(lists, padding, strict=True)])

    mask = padded([[1] * len(tokens) for tokens in DOCUMENTS], 0)
    inputs = {"input_ids": padded(DOCUMENTS, 0), "attention_mask": mask}
    if rows == "padded on the left":  # as in generation, so that a document's first token has position 0
        inputs["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
    return inputs, padded(answers, -100)


def alone(model: Any, tokens: list[int], positions: str, weighting: Weighting) -> float:
    """Σ w·l of one document, a row of its own, written out."""
    with torch.no_grad():
        logs = torch.log_softmax(model(input_ids=torch.tensor([tokens]), use_cache=False).logits[0], -1)
    places = range(PROMPT, len(tokens))
    first = PROMPT if positions == "supervised" else 1
    counted = len(tokens) - first
    weights = {place: suffix_weights(counted, 0.8)[place - first] for place in places}
    if weighting.scheme == "linear":
        weights = {place: (place - first + 1) / counted for place in places}
    if weighting.scale == "mean_one":
        weights = {place: w * len(weights) / sum(weights.values()) for place, w in weights.items()}
    return -sum(w * float(logs[place - 1, tokens[place]]) for place, w in weights.items())


def test_gamma_zero_is_the_loss_of_transformers() -> None:
    model = tiny()
    loss = TrainerLoss(model, arguments(), weighting=Weighting(gamma=0.0))
    outputs = model(input_ids=IDS, labels=IDS)
    torch.testing.assert_close(loss(outputs, IDS, num_items_in_batch=6), outputs.loss)


def test_importing_the_package_brings_nothing_heavy() -> None:
    program = "import sys, seqaware\nprint([name for name in ('torch', 'numpy', 'pydantic') if name in sys.modules])"
    root = Path(__file__).resolve().parents[3]
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=root)
    assert done.stdout == "[]\n"


def test_every_name_is_there_when_it_is_asked_for() -> None:
    assert sorted(seqaware._HOME) == sorted(seqaware.__all__)
    assert {name for name in seqaware.__all__ if getattr(seqaware, name) is None} == set()
    assert set(seqaware.__all__) <= set(dir(seqaware))
    with pytest.raises(ImportError):
        from seqaware import nothing_of_that_name  # type: ignore[attr-defined]  # noqa: F401
