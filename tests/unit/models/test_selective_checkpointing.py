"""Selective checkpointing keeps products and attention, computes neither twice, and nothing else stays."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel

from seqaware.config.model_config import ModelConfig
from seqaware.estimate.activations import activations
from seqaware.estimate.decoder import Decoder
from seqaware.estimate.layout import Layout, ZeroSettings
from seqaware.models.attention import Documents
from seqaware.models.layers import arrange_layers
from seqaware.models.selective_checkpointing import recompute_selected
from seqaware.plan.specs import World
from tests.unit.models.tiny_models import VOCABULARY, tiny

LENGTHS = (9, 14, 7)
DECODERS = {
    "llama": Decoder("gated", 32, 48, 2, 4, 2, 8, VOCABULARY, 128, tied=False),
    "gpt2": Decoder("gpt2", 32, 128, 2, 4, 4, 8, VOCABULARY, 128, tied=True),
}
POLICIES = ("none", "selective", "full")


class Watch(TorchDispatchMode):
    """Counts calls, and knows of every tensor that was made whether it is still there."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls: Counter[str] = Counter()
        self.made: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls[operation.name()] += 1
        result = operation(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                reference = StorageWeakRef(tensor.untyped_storage())
                self.made[reference.cdata] = (reference, tensor.untyped_storage().nbytes())
        return result

    def live_bytes(self) -> int:
        return sum(size for reference, size in self.made.values() if not reference.expired())


def step(model: PreTrainedModel) -> tuple[int, Counter[str]]:
    """(bytes that are there between forward and backward, calls in the backward)."""
    ids = torch.randint(0, VOCABULARY, (1, sum(LENGTHS)), generator=torch.Generator().manual_seed(1))
    positions = torch.cat([torch.arange(n) for n in LENGTHS]).unsqueeze(0)
    borders = torch.tensor([0, *torch.tensor(LENGTHS).cumsum(0)], dtype=torch.int32)
    documents = Documents(borders, LENGTHS, "sdpa_per_document")
    with Watch() as forward:
        loss = model(input_ids=ids, position_ids=positions, documents=documents, use_cache=False).logits.square().sum()
    live = forward.live_bytes()
    with Watch() as backward:
        loss.backward()  # type: ignore[no-untyped-call]
    return live, backward.calls


def of_policies(family: str) -> dict[str, tuple[int, Counter[str]]]:
    found = {}
    for policy in POLICIES:
        model = tiny(family).train()
        config = ModelConfig.model_validate({"base_name": family, "activation_checkpointing": policy})
        arrange_layers(model, config, sharded=False)
        found[policy] = step(model)
    return found


@pytest.mark.parametrize("family", sorted(DECODERS))
def test_no_product_and_no_attention_runs_twice(family: str) -> None:
    calls = {policy: calls for policy, (_, calls) in of_policies(family).items()}
    products = {
        policy: count["aten::mm"] + count["aten::addmm"] + count["aten::_scaled_dot_product_flash_attention_for_cpu"]
        for policy, count in calls.items()
    }
    assert products["selective"] == products["none"] < products["full"]
    cheap = {"llama": "aten::silu", "gpt2": "aten::tanh"}[family]
    assert calls["selective"][cheap] == calls["full"][cheap] > calls["none"][cheap]


@pytest.mark.parametrize("family", sorted(DECODERS))
def test_what_stays_is_what_the_plan_counts(family: str) -> None:
    """To the byte: the difference to a policy that keeps each layer's input alone."""
    live = {policy: live for policy, (live, _) in of_policies(family).items()}
    world = World(1, 1, 1, "cpu", bf16=False)
    zero = ZeroSettings.of({"stage": 0})
    planned = {
        policy: activations(
            Layout(DECODERS[family], world, "float32", zero, "adamw", sum(LENGTHS), max(LENGTHS), checkpointing=policy)
        ).kept
        for policy in POLICIES
    }
    assert live["selective"] - live["full"] == planned["selective"] - planned["full"]
    assert live["none"] > live["selective"] > live["full"]


def test_what_is_changed_in_place_afterwards_is_kept_as_it_was() -> None:
    """As ZeRO-3's linear layer adds its bias to the product."""
    generator = torch.Generator().manual_seed(0)
    inputs, first, second = (torch.randn(8, 8, generator=generator, dtype=torch.float64) for _ in range(3))

    def layer(given: Tensor) -> Tensor:
        product = given @ first
        product += 1.0
        return torch.sin(torch.exp(product) @ second).square()

    gradients = []
    for run in (layer, lambda given: recompute_selected(layer, given)):
        given = inputs.clone().requires_grad_()
        run(given).sum().backward()
        gradients.append(given.grad)
    assert torch.equal(*gradients)  # type: ignore[arg-type]


def test_a_factor_of_an_adapter_is_computed_again() -> None:
    """Its product is as wide as that of the whole layer, and costs next to nothing."""
    down, up = torch.randn(64, 2, requires_grad=True), torch.randn(2, 64, requires_grad=True)
    with Watch() as watch:
        output = recompute_selected(lambda given: torch.exp(given @ down @ up).sum(), torch.randn(50, 64))
        kept = watch.live_bytes()
    output.backward()
    # The input, the narrow product, and the sum.
    assert kept == 4 * (50 * 64 + 50 * 2 + 1)
