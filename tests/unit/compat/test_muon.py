"""DeepSpeed's Muon: compiled at its first call, and over the matrices that we mark."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from deepspeed.accelerator import get_accelerator

from seqaware.compat.muon import import_muon, marking, orthogonalize_for, orthogonalizing_dtype
from seqaware.engine.optimizer import mark_for_muon
from tests.unit.models.tiny_models import tiny

NAME = "deepspeed.runtime.zero.muon.original_muon"


def test_functions_are_compiled_at_their_first_call(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[str] = []

    def record(function: Callable[..., Any]) -> Callable[..., Any]:
        compiled.append(function.__name__)
        return function

    compiler = importlib.import_module("deepspeed.runtime.compiler")
    monkeypatch.setattr(compiler, "compile", lambda: record)
    monkeypatch.delitem(sys.modules, NAME, raising=False)
    import_muon()
    muon = sys.modules.pop(NAME)
    assert compiled == []
    assert compiler.compile() is record
    turned = [muon.zeropower_via_newtonschulz5(torch.eye(3), 5) for _ in range(2)]
    assert compiled == ["zeropower_via_newtonschulz5"]
    # An orthogonal matrix times a factor: the iteration's singular values lie between about 0.5 and 1.5.
    product = turned[0].float() @ turned[0].float().T
    torch.testing.assert_close(product, product.diagonal().mean() * torch.eye(3), atol=0.02, rtol=0)
    assert 0.2 < float(product[0, 0]) < 2.5
    assert torch.equal(*turned)


def test_a_float32_run_is_orthogonalized_in_float32_on_a_device_with_half_precision(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import_muon()
    original_muon = importlib.import_module(NAME)
    monkeypatch.setattr(type(get_accelerator()), "is_fp16_supported", lambda self: True)
    orthogonalize_for(torch.bfloat16)
    assert orthogonalizing_dtype() == torch.float16
    matrix = torch.randn(3, 5, generator=torch.Generator().manual_seed(0))
    # The product runs through torch.compile, which must notice that the dtype has changed.
    assert original_muon.zeropower_via_gram_newtonschulz(matrix, 5).dtype == torch.float16
    orthogonalize_for(torch.float32)
    assert orthogonalizing_dtype() == torch.float32
    update = original_muon.zeropower_via_gram_newtonschulz(matrix, 5)
    assert update.dtype == torch.float32
    x = matrix.double() / matrix.double().norm()
    for _ in range(5):
        a = x @ x.T
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    # See UPDATE_TOLERANCE of tests/e2e/test_same_training.py.
    assert float((update.double() - x).norm() / x.norm()) < 1e-4


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_hidden_matrices_are_orthogonalized_and_no_others(family: str) -> None:
    """GPT-2's tables of embeddings are called wte and wpe, and its head is one of them."""
    model = tiny(family)
    with marking(lambda: mark_for_muon(model)):
        import deepspeed

        # As deepspeed.initialize calls it.
        deepspeed.set_optimizer_flags(None, model)
    found = {name: parameter.use_muon for name, parameter in model.named_parameters()}  # type: ignore[attr-defined]
    hidden = {
        name: p.ndim == 2 and not any(w in name for w in ("embed", "wte", "wpe", "lm_head"))
        for name, p in model.named_parameters()
    }
    assert found == hidden and any(hidden.values())
    assert deepspeed.set_optimizer_flags.__module__ == "deepspeed"
