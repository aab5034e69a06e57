"""The start-up probes see what they are for: a leak between documents, and a head the fused loss does not know."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import accumulate

import pytest
import torch

from seqaware.errors import ConfigError
from seqaware.models import attention, isolation_check
from seqaware.models.model import WeightedCausalLM
from tests.unit.distributed.thread_ranks import ThreadGroup, on_ranks
from tests.unit.models.tiny_models import FAMILIES, VOCABULARY, tiny

CPU = torch.device("cpu")


LONGEST, CAPACITY = 90, 120


def _settings(backend: str = "sdpa_per_document", *, packed: bool = True) -> isolation_check.IsolationProbe:
    return isolation_check.IsolationProbe(backend, VOCABULARY, CPU, packed=packed, longest=LONGEST, capacity=CAPACITY)


def _probe(model: WeightedCausalLM, backend: str = "sdpa_per_document") -> isolation_check.IsolationReport:
    return isolation_check.probe_isolation(model, _settings(backend))


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
    with pytest.raises(ConfigError, match="attend to each other"):
        _probe(WeightedCausalLM(tiny("llama"), loss_kernel="fused"), leaking_backend)


def _of_long_rows(lengths: list[int]) -> list[int]:
    return [sum(lengths)] if sum(lengths) > 64 else lengths


def _after_a_long_document(lengths: list[int]) -> list[int]:
    return [lengths[0], sum(lengths[1:])] if lengths[0] < 64 < max(lengths) else lengths


def _into_a_long_document(lengths: list[int]) -> list[int]:
    return [sum(lengths[:2]), *lengths[2:]] if len(lengths) == 3 and lengths[1] > 64 else lengths


@pytest.mark.parametrize("joined", [_of_long_rows, _after_a_long_document, _into_a_long_document])
def test_a_leak_of_long_documents_alone_is_found(
    monkeypatch: pytest.MonkeyPatch, joined: Callable[[list[int]], list[int]]
) -> None:
    """It shows in no row of 24 tokens."""

    def leaking(q, k, v, documents, call):  # type: ignore[no-untyped-def]
        lengths = joined(list(documents.lengths))
        borders = documents.cu_seqlens.new_tensor([0, *accumulate(lengths)])
        return attention.BACKENDS["eager"](q, k, v, attention.Documents(borders, tuple(lengths), "eager"), call)

    monkeypatch.setitem(attention.BACKENDS, "leaking", leaking)
    model = WeightedCausalLM(tiny("llama"), loss_kernel="fused")
    with pytest.raises(ConfigError, match="packed documents attend to each other"):
        _probe(model, "leaking")
    short = replace(_settings("leaking"), longest=50)
    assert isolation_check.probe_isolation(model, short).leak == 0.0


@pytest.mark.parametrize(
    ("longest", "capacity", "packed", "row"),
    [
        (90, 120, True, (7, 90, 5)),
        (120, 120, True, (7, 108, 5)),
        (120, 120, False, (120,)),
        (100_000, 100_000, True, (7, 8180, 5)),
        (12, 120, True, ()),
    ],
)
def test_the_long_row_has_the_longest_document_that_fits(
    longest: int, capacity: int, packed: bool, row: tuple[int, ...]
) -> None:
    assert replace(_settings(packed=packed), longest=longest, capacity=capacity).long_row == row


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

    def share(group: ThreadGroup) -> isolation_check.IsolationReport:
        settings = replace(_settings(packed=packed), sequence=group)  # type: ignore[arg-type]
        return isolation_check.measure_isolation(WeightedCausalLM(models[group.index], loss_kernel="fused"), settings)

    for report in on_ranks(2, share):
        assert (report.packed > report.packed_tolerance) == mixes


def test_rows_of_one_document_need_no_isolation(leaking_backend: str) -> None:
    model = WeightedCausalLM(tiny("llama"), loss_kernel="fused")
    report = isolation_check.probe_isolation(model, _settings(leaking_backend, packed=False))
    assert report.leak <= report.tolerance < report.response


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_our_head_is_the_models(family: str) -> None:
    model = WeightedCausalLM(tiny(family), loss_kernel="fused")
    isolation_check.probe_head(model, _settings())


def test_a_head_of_its_own_is_found() -> None:
    model = WeightedCausalLM(tiny("gemma2"), loss_kernel="fused")
    own = model.model.forward

    def doubled(*args, **kwargs):  # type: ignore[no-untyped-def]
        output = own(*args, **kwargs)
        output.logits = 2 * output.logits
        return output

    model.model.forward = doubled  # type: ignore[method-assign]
    with pytest.raises(ConfigError, match="loss_kernel: plain"):
        isolation_check.probe_head(model, _settings())
