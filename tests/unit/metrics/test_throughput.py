"""MFU, padding and waiting, against figures worked out by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from seqaware.config.loading import load_config
from seqaware.data.packing import StepWork
from seqaware.engine import device_metrics
from seqaware.estimate.hardware import peak_flops
from seqaware.metrics.throughput import Speedometer
from seqaware.plan.plan import make_plan
from seqaware.plan.specs import ModelFacts, World, facts_from_dict

HIDDEN, LAYERS, VOCABULARY = 8, 3, 50
SIZES = {"vocab_size": VOCABULARY, "hidden_size": HIDDEN, "intermediate_size": 16, "num_hidden_layers": LAYERS}
FACTS = facts_from_dict({"model_type": "llama", "num_attention_heads": 2, "max_position_embeddings": 64, **SIZES})
CPU = torch.device("cpu")


def _speedometer(monkeypatch: pytest.MonkeyPatch, *, known: bool = True, facts: ModelFacts = FACTS) -> Speedometer:
    monkeypatch.setattr(device_metrics, "_seconds", lambda matrix: 2 * matrix.shape[0] ** 3 / 1e6)
    plan = make_plan(
        load_config(None, ["model.dtype=float32"]), world=World(2, 2, 1, "cpu", True), model=facts if known else None
    )
    return Speedometer(plan, CPU)


def test_figures_of_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    work = StepWork(tokens=60, squares=2500, places=75), StepWork(tokens=40, squares=500, places=50)
    figures = _speedometer(monkeypatch).figures(work, seconds=2.0)
    matrices = LAYERS * (4 * HIDDEN * HIDDEN + 3 * HIDDEN * 16) + VOCABULARY * HIDDEN
    needed = 6 * matrices * 100 + 3 * 2 * LAYERS * HIDDEN * 3000
    # 2 ranks of 1e6 operations a second, for 2 seconds.
    assert figures["mfu"] == pytest.approx(needed / 4e6, abs=1e-5)
    assert [each.padding_share for each in work] == [0.2, 0.2]
    assert 0.01 < figures["peak_memory_gb"] < 1000


def test_a_model_of_unknown_sizes_has_no_mfu(monkeypatch: pytest.MonkeyPatch) -> None:
    figures = _speedometer(monkeypatch, known=False).figures([StepWork(1, 1, 1)], seconds=1.0)
    assert "mfu" not in figures
    guessed = replace(FACTS, model_type="gpt_neox")
    assert "mfu" not in _speedometer(monkeypatch, facts=guessed).figures([StepWork(1, 1, 1)], seconds=1.0)


def test_cards_are_known_by_what_torch_calls_them() -> None:
    assert peak_flops("NVIDIA H100 80GB HBM3", "bfloat16") == 989e12
    assert peak_flops("NVIDIA H100 PCIe", "bfloat16") == 756e12
    assert peak_flops("NVIDIA A100-SXM4-80GB", "float32") == 19.5e12
    assert peak_flops("some other card", "bfloat16") is None
