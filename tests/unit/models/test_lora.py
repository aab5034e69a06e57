"""Which layers a `lora` section means, what adapters start from, and the one matrix they come to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft.tuners.lora import LoraLayer
from transformers import AutoModelForCausalLM, PreTrainedModel

from seqaware.config.model_config import LoraConfig
from seqaware.errors import ConfigError
from seqaware.models.attention import Documents
from seqaware.models.lora import Adapters, initial_weight, merged_weight
from seqaware.models.lora_targets import find_targets
from seqaware.models.model import ModelInput, WeightedCausalLM, empty_causal_lm, output_head
from tests.unit.models.tiny_models import FAMILIES, tiny

SEVEN = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


def _targets(family: str, kernel: str = "fused", **lora: Any) -> Any:
    model = empty_causal_lm(tiny(family).config)
    return find_targets(LoraConfig(**lora), model, loss_kernel=kernel)


def _adapted(model: PreTrainedModel, seed: int = 1, **lora: Any) -> Adapters:
    return Adapters(model, LoraConfig(**lora), seed=seed, revision=None, deepspeed={})


def _disturb(model: PreTrainedModel) -> None:
    """Let every trained weight move, B away from zero among them."""
    generator = torch.Generator().manual_seed(7)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)


def _logits(model: PreTrainedModel) -> torch.Tensor:
    ids = torch.arange(3, 23).unsqueeze(0)
    documents = Documents(torch.tensor([0, 20], dtype=torch.int32), (20,), "eager")
    inputs = ModelInput(ids, torch.arange(20).unsqueeze(0), documents)
    return WeightedCausalLM(model, loss_kernel="plain").eval().logits(inputs).detach()


def test_all_linear_is_every_linear_layer_but_the_head() -> None:
    found = _targets("llama", rank=4)
    assert {name.rpartition(".")[2] for name in found.linear} == SEVEN
    assert len(found.linear) == 14 and found.saved == ()
    # q, o: 32→32; k, v: 32→16; gate, up: 32→48; down: 48→32; in each of two layers.
    assert found.trained == 2 * 4 * (2 * 64 + 2 * 48 + 3 * 80)


def test_names_patterns_and_whole_modules() -> None:
    named = _targets("llama", target_modules=["q_proj", "layers.1.mlp.up_proj"], modules_to_save=["norm"], rank=2)
    assert named.linear == tuple(
        sorted(["model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj", "model.layers.1.mlp.up_proj"])
    )
    # `norm` is the last norm, not everything whose name ends in those letters.
    assert named.saved == ("model.norm",)
    assert named.trained == 2 * (64 + 64 + 80) + 32
    pattern = _targets("llama", target_modules=r".*\.0\..*(q|v)_proj")
    assert [name.rpartition(".")[2] for name in pattern.linear] == ["q_proj", "v_proj"]
    beside = _targets("llama", modules_to_save=["mlp"])
    assert {name.rpartition(".")[2] for name in beside.linear} == {"q_proj", "k_proj", "v_proj", "o_proj"}


REFUSED: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "nothing": ({"target_modules": ["q_prj"]}, ("matches nothing", "q_prj", "did you mean q_proj?", "down_proj")),
    "one of two": ({"target_modules": ["q_proj", "c_attn"]}, ("matches nothing", "c_attn", "v_proj")),
    "a name as a pattern": ({"target_modules": "q_proj"}, ("regular expression", "write [q_proj]")),
    "a broken pattern": ({"target_modules": "*_proj"}, ("no regular expression",)),
    "no linear layer": ({"target_modules": ["embed_tokens"]}, ("no linear layer", "Embedding", "modules_to_save")),
    "a container": ({"target_modules": r".*self_attn.*"}, ("no linear layer", "Attention")),
    "saves nothing": ({"modules_to_save": ["embed_token"]}, ("modules_to_save", "did you mean embed_tokens?")),
    "saves its inside": ({"modules_to_save": ["mlp", "up_proj"]}, ("and its inside",)),
    "nothing left": ({"modules_to_save": ["self_attn", "mlp"]}, ("every linear layer", "inside modules_to_save")),
    "adapted and saved": (
        {"modules_to_save": ["lm_head"], "target_modules": ["q_proj", "lm_head"]},
        ("both in target_modules and in modules_to_save; got lm_head;",),
    ),
    "adapted inside what is saved": (
        {"modules_to_save": ["layers.0.mlp"], "target_modules": r".*\.(q|up)_proj"},
        ("both in target_modules and in modules_to_save; got model.layers.0.mlp.up_proj;",),
    ),
    "the head": ({"target_modules": ["lm_head"]}, ("output head", "loss_kernel: plain", "modules_to_save: [lm_head]")),
}


@pytest.mark.parametrize("what", REFUSED)
def test_refused(what: str) -> None:
    lora, says = REFUSED[what]
    with pytest.raises(ConfigError) as caught:
        _targets("llama", **lora)
    for fragment in says:
        assert fragment in str(caught.value), str(caught.value)


def test_the_head_may_be_adapted_where_the_model_computes_its_logits() -> None:
    assert "lm_head" in _targets("llama", kernel="plain", target_modules=["lm_head"]).linear


@pytest.mark.parametrize("lora", [{"modules_to_save": ["wte"]}, {"target_modules": ["lm_head"]}])
def test_a_shared_matrix_is_not_parted(lora: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="one matrix"):
        _targets("gpt2", kernel="plain", **lora)


def test_a_layer_starts_from_the_seed_and_its_name_alone() -> None:
    shape = torch.Size([64, 100])
    first = initial_weight("model.layers.0.mlp.up_proj", shape, 1)
    torch.rand(5)  # whatever the global generator has done
    assert first.equal(initial_weight("model.layers.0.mlp.up_proj", shape, 1))
    assert not first.equal(initial_weight("model.layers.0.mlp.up_proj", shape, 2))
    assert not first.equal(initial_weight("model.layers.1.mlp.up_proj", shape, 1))
    # Uniform in ±1/√100: the standard deviation is 0.1/√3, and 6400 draws know it to 1/√6400 of itself, times four.
    assert first.abs().max() <= 0.1
    assert float(first.std()) == pytest.approx(0.1 / 3**0.5, rel=0.05)


def test_adapters_change_nothing_at_first_and_leave_the_random_state() -> None:
    model = tiny("llama")
    before, state = _logits(model), torch.get_rng_state()
    adapters = _adapted(model, rank=3, dora=True)
    assert torch.get_rng_state().equal(state)
    # DoRA divides by the norm it multiplies with: two roundings in each of 14 products.
    assert float((_logits(model) - before).abs().max()) < 64 * 1.2e-7 * float(before.abs().max())
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, LoraLayer)}
    for name, layer in layers.items():
        a = layer.lora_A["default"].weight
        assert a.equal(initial_weight(name, a.shape, 1)) and not layer.lora_B["default"].weight.any()
        norm = layer.get_base_layer().weight.norm(dim=1)
        torch.testing.assert_close(layer.lora_magnitude_vector["default"].weight.data, norm.data)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert trained == _targets("llama", rank=3, dora=True).trained
    assert adapters.model is model


def test_adapters_have_the_runs_dtype() -> None:
    model = tiny("llama", dtype=torch.bfloat16)
    _adapted(model, rank=3, dora=True, modules_to_save=["lm_head"])
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize(
    ("lora", "scale"), [({"rank": 4, "alpha": 6}, 1.5), ({"rank": 4, "alpha": 6, "rslora": True}, 3.0)]
)
def test_scale(lora: dict[str, Any], scale: float) -> None:
    model = tiny("llama")
    _adapted(model, **lora)
    _disturb(model)
    layer = model.get_submodule("model.layers.1.mlp.down_proj")
    b, a = layer.lora_B["default"].weight.double(), layer.lora_A["default"].weight.double()
    expected = layer.get_base_layer().weight.double() + scale * b @ a
    torch.testing.assert_close(merged_weight(layer).double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_the_merged_model_is_the_adapted_one(family: str, dora: bool, tmp_path: Path) -> None:
    """Whatever the family calls its layers and however it lays out its weights (GPT-2 transposes them)."""
    model = tiny(family)
    before = _logits(model)
    adapters = _adapted(model, rank=4, dora=dora)
    _disturb(model)
    adapted = _logits(model)
    adapters.write_merged(tmp_path, adapters.merged_weights(keep=True))
    merged = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="seqaware")
    size = float(adapted.abs().max())
    assert float((adapted - before).abs().max()) > 0.01 * size
    # Products of 32 to 128 terms in two layers, in another order: ~√(depth · width) roundings, ten times over.
    assert float((_logits(merged) - adapted).abs().max()) < 2e-5 * size


def test_only_rank_0_keeps_what_is_gathered() -> None:
    adapters = _adapted(tiny("llama"), rank=2)
    assert adapters.merged_weights(keep=False) == {} == adapters.adapter_weights(keep=False)


def test_the_fused_loss_reads_the_trained_head_and_no_adapted_one() -> None:
    model = tiny("llama")
    _adapted(model, rank=2, modules_to_save=["lm_head"])
    assert output_head(model).weight is model.get_output_embeddings().modules_to_save["default"].weight
    other = tiny("llama")
    _adapted(other, rank=2, target_modules=["lm_head"])
    with pytest.raises(AssertionError, match="not one matrix"):
        output_head(other)
