"""The start-up probes see what they are for: a leak between documents, and a head the fused loss does not know."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from seqaware.engine import attention, probe
from seqaware.engine.model import WeightedCausalLM
from seqaware.errors import ConfigError
from tests.unit.engine.models import FAMILIES, VOCABULARY, tiny
from tests.unit.engine.thread_ranks import ThreadGroup, on_ranks

CPU = torch.device("cpu")


def _settings(backend: str = "sdpa_per_document", *, packed: bool = True) -> probe.Probe:
    return probe.Probe(backend, VOCABULARY, CPU, packed=packed)


def _probe(model: WeightedCausalLM, backend: str = "sdpa_per_document") -> probe.ProbeReport:
    return probe.probe_isolation(model, _settings(backend))


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_documents_are_apart_in_every_family(family: str) -> None:
    report = _probe(WeightedCausalLM(tiny(family), loss_kernel="fused"))
    assert report.leak <= report.tolerance < report.response


@pytest.fixture
def leaking_backend() -> Iterator[str]:
    """Attention over the whole row, as if it were one document."""

    def whole_row(q, k, v, documents, call):  # type: ignore[no-untyped-def]
        one = attention.Documents(documents.cu_seqlens[[0, -1]], (sum(documents.lengths),), "eager")
        return attention.BACKENDS["eager"](q, k, v, one, call)

    attention.BACKENDS["leaking"] = whole_row
    yield "leaking"
    del attention.BACKENDS["leaking"]


def test_a_leak_is_found(leaking_backend: str) -> None:
    with pytest.raises(ConfigError, match="see each other"):
        _probe(WeightedCausalLM(tiny("llama"), loss_kernel="fused"), leaking_backend)


@pytest.mark.parametrize("mixes", [False, True])
@pytest.mark.parametrize("packed", [False, True])
def test_ranks_that_share_a_row_compute_the_whole_rows_model(packed: bool, mixes: bool) -> None:
    """A model that looks at the token before outside attention cannot see it across a cut."""

    def look_back(_module: object, _inputs: object, output: torch.Tensor) -> torch.Tensor:
        return output + 0.5 * torch.nn.functional.pad(output, (0, 0, 1, 0))[:, :-1]

    models = [tiny("llama") for _ in range(2)]
    for model in models:
        if mixes:
            model.get_submodule("model.layers.0.input_layernorm").register_forward_hook(look_back)

    def share(group: ThreadGroup) -> probe.ProbeReport:
        settings = probe.Probe("sdpa_per_document", VOCABULARY, CPU, packed, group)  # type: ignore[arg-type]
        return probe.measure_isolation(WeightedCausalLM(models[group.index], loss_kernel="fused"), settings)

    for report in on_ranks(2, share):
        assert (report.packed > report.packed_tolerance) == mixes


def test_rows_of_one_document_need_no_isolation(leaking_backend: str) -> None:
    model = WeightedCausalLM(tiny("llama"), loss_kernel="fused")
    report = probe.probe_isolation(model, _settings(leaking_backend, packed=False))
    assert report.leak <= report.tolerance < report.response


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_our_head_is_the_models(family: str) -> None:
    model = WeightedCausalLM(tiny(family), loss_kernel="fused")
    probe.probe_head(model, _settings())


def test_a_head_of_its_own_is_found() -> None:
    model = WeightedCausalLM(tiny("gemma2"), loss_kernel="fused")
    own = model.model.forward

    def doubled(*args, **kwargs):  # type: ignore[no-untyped-def]
        output = own(*args, **kwargs)
        output.logits = 2 * output.logits
        return output

    model.model.forward = doubled  # type: ignore[method-assign]
    with pytest.raises(ConfigError, match="loss_kernel: plain"):
        probe.probe_head(model, _settings())
