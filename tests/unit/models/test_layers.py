"""Recomputed, offloaded, in tiles or compiled: a layer's outputs and gradients stay what they were."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers import PreTrainedModel

from seqaware.config.model_config import ModelConfig
from seqaware.errors import ConfigError
from seqaware.models.attention import Documents, standard_attention
from seqaware.models.layers import arrange_layers, check_layers
from tests.unit.models.tiny_models import FAMILIES, VOCABULARY, tiny

LENGTHS = (9, 14, 7)


def config(**changes: Any) -> ModelConfig:
    return ModelConfig.model_validate({"base_name": "gpt2", **changes})


def loss_and_gradients(
    model: PreTrainedModel, lengths: tuple[int, ...] = LENGTHS
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    ids = torch.randint(0, VOCABULARY, (1, sum(lengths)), generator=torch.Generator().manual_seed(1))
    positions = torch.cat([torch.arange(n) for n in lengths]).unsqueeze(0)
    borders = torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32)
    documents = Documents(borders, lengths, "sdpa_per_document")
    model.train()
    loss = model(input_ids=ids, position_ids=positions, documents=documents, use_cache=False).logits.square().sum()
    loss.backward()
    gradients = [parameter.grad for parameter in model.parameters()]
    return loss.detach(), [gradient for gradient in gradients if gradient is not None]


ARRANGEMENTS = [
    {"activation_checkpointing": "full"},
    {"activation_checkpointing": "selective"},
    {"activation_checkpointing": "offload"},
    {"mlp_tile_tokens": 7},
    {"mlp_tile_tokens": 1000},
    {"mlp_tile_tokens": 8, "activation_checkpointing": "full"},
]


@pytest.mark.parametrize("changes", ARRANGEMENTS, ids=str)
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_an_arrangement_changes_no_number(family: str, changes: dict[str, Any]) -> None:
    plain, arranged = (tiny(family, dtype=torch.float64) for _ in range(2))
    with torch.device("meta"):
        check_layers(tiny(family), config(**changes))
    arrange_layers(arranged, config(**changes), sharded=False)
    expected, got = loss_and_gradients(plain), loss_and_gradients(arranged)
    # float64; a tile's matrix products may sum in another order, and norms compute in float32: a few of its roundings.
    torch.testing.assert_close(got[0], expected[0], rtol=1e-6, atol=0)
    for mine, theirs in zip(got[1], expected[1], strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-6 * float(theirs.abs().max()))


def test_a_compiled_layer_computes_the_same_whatever_the_documents() -> None:
    """One set of graphs for both layers and all batches; generation runs uncompiled."""
    from torch._dynamo.utils import counters

    plain, arranged = (tiny("llama", dtype=torch.float64) for _ in range(2))
    arrange_layers(arranged, config(compile=True), sharded=False)
    graphs = set()
    for lengths in ((9, 1, 14, 6), (5, 3), (40,), (20, 2, 7, 7)):
        expected, got = (loss_and_gradients(model, lengths) for model in (plain, arranged))
        # Fused, a norm's float32 is rounded at other places.
        torch.testing.assert_close(got[0], expected[0], rtol=1e-6, atol=0)
        for mine, theirs in zip(got[1], expected[1], strict=True):
            torch.testing.assert_close(mine, theirs, rtol=0, atol=5e-6 * float(theirs.abs().max()))
        graphs.add(counters["stats"]["unique_graphs"])
        plain.zero_grad(), arranged.zero_grad()
    with standard_attention(arranged):
        prompt = torch.tensor([[5, 6, 7]])
        arranged.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=6, do_sample=False)
    graphs.add(counters["stats"]["unique_graphs"])
    assert len(graphs) == 1 and 0 < graphs.pop() < 8


def test_compiled_mlps_of_zero3_multiply_by_torchs_linear_and_all_else_by_deepspeeds(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """DeepSpeed's would be compiled anew for every weight; without it uncompiled layers would keep gathered weights."""
    monkeypatch.setattr("deepspeed.utils.set_z3_leaf_modules", lambda model, kinds: None)
    plain, arranged = (tiny("llama", dtype=torch.float64) for _ in range(2))
    arrange_layers(arranged, config(compile=True), sharded=True)
    calls = 0

    def counted(*inputs: torch.Tensor | None) -> torch.Tensor:
        nonlocal calls
        calls += 1
        return torch._C._nn.linear(*inputs)

    expected = loss_and_gradients(plain)
    monkeypatch.setattr(F, "linear", counted)
    got = loss_and_gradients(arranged)
    # Query, key, value and output of each of both layers, and the head.
    assert F.linear is counted and calls == 2 * 4 + 1
    for mine, theirs in zip(got[1], expected[1], strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=5e-6 * float(theirs.abs().max()))


def test_tiles_keep_only_a_tile_of_the_widest_tensor() -> None:
    """What autograd keeps of an MLP shrinks to its inputs: nothing as wide as the intermediate size is left."""
    widths: dict[int | None, set[int]] = {}
    for tile in (None, 5):
        model = tiny("llama")
        arrange_layers(model, config(mlp_tile_tokens=tile), sharded=False)
        mlp = model.get_submodule("model.layers.0.mlp")
        mlp.requires_grad_(False)
        kept: set[int] = set()

        def keep(tensor: torch.Tensor, kept: set[int] = kept) -> torch.Tensor:
            kept.add(tensor.shape[-1])
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            mlp(torch.randn(1, 20, 32, requires_grad=True))
        widths[tile] = kept
    assert 48 in widths[None]
    assert 48 not in widths[5]


def test_a_model_without_such_layers_is_refused() -> None:
    class Bare(torch.nn.Module):
        supports_gradient_checkpointing = False

    with pytest.raises(ConfigError, match="cannot recompute its layers; got Bare"):
        check_layers(Bare(), config(activation_checkpointing="full"))
    for key in ({"mlp_tile_tokens": 8}, {"compile": True}):
        with pytest.raises(ConfigError, match=f"model.{next(iter(key))}: no decoder layer of this model has an MLP"):
            check_layers(Bare(), config(**key))
    check_layers(Bare(), config())


def test_mlps_that_do_more_than_map_hidden_states_get_no_tiles() -> None:
    class WantsMore(torch.nn.Module):
        def forward(self, hidden: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
            return hidden + residual

    class GivesMore(torch.nn.Module):
        def forward(self, hidden: torch.Tensor) -> tuple[torch.Tensor, None]:
            return hidden, None

    for mlp in (WantsMore(), GivesMore()):
        with torch.device("meta"):
            model = tiny("llama")
        model.get_submodule("model.layers.1").mlp = mlp
        with pytest.raises(ConfigError, match="does more than to map hidden states to hidden states; got Llama"):
            check_layers(model, config(mlp_tile_tokens=8))


def test_true_and_false_mean_full_and_none() -> None:
    assert config(activation_checkpointing=True).activation_checkpointing == "full"
    assert config(activation_checkpointing=False).activation_checkpointing == "none"
