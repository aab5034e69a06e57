"""A checkpoint that lacks weights, or has others, is refused by name; a weight that is meant to be new is drawn."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from seqaware.config.model_config import LoraConfig, ModelConfig
from seqaware.errors import ConfigError
from seqaware.models.model import LoadOptions, check_model_folder, load_model
from seqaware.models.model_source import check_model_source
from seqaware.models.model_weights import draw_new_weights

_SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
Weights = dict[str, Tensor]
Change = Callable[[Weights], Weights]
HEAD, QUERY = "lm_head.weight", "model.layers.1.self_attn.q_proj.weight"
OPTIONS = LoadOptions(torch.float32, 0.0, None, False, {})


def _saved(folder: Path, kind: str = "llama", **fields: Any) -> Path:
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **{**_SIZES, "tie_word_embeddings": False, **fields})
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    return folder


def _change(folder: Path, change: Change, **config: Any) -> Path:
    weights = change(load_file(folder / "model.safetensors"))
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    written = json.loads((folder / "config.json").read_text()) | config
    (folder / "config.json").write_text(json.dumps(written))
    return folder


def _without(*names: str) -> Change:
    return lambda weights: {name: weight for name, weight in weights.items() if name not in names}


def _renamed(rename: Callable[[str], str]) -> Change:
    return lambda weights: {rename(name): weight for name, weight in weights.items()}


def _same(weights: Weights) -> Weights:
    return weights


def _with_a_head_of_its_own(weights: Weights) -> Weights:
    return weights | {HEAD: weights["model.embed_tokens.weight"] + 1}


_EXPERT = "model.layers.1.block_sparse_moe.experts.2.w1.weight"
_MOE = {"kind": "mixtral", "num_local_experts": 4}
REFUSED: dict[str, tuple[dict[str, Any], Change, dict[str, Any], str]] = {
    "two weights": ({}, _without(HEAD, QUERY), {}, f"2 missing: {HEAD}, {QUERY}; complete"),
    "fewer layers": ({}, _same, {"num_hidden_layers": 4}, "18 missing: model.layers.{2-3}.input_layernorm.weight, "),
    "more layers": ({}, _same, {"num_hidden_layers": 1}, "9 unexpected: model.layers.1.input_layernorm.weight, "),
    "another width": (
        {},
        _same,
        {"intermediate_size": 64},
        "6 of another shape: model.layers.{0-1}.mlp.down_proj.weight [32, 48] for [32, 64], ",
    ),
    "wrapped by DDP": ({}, _renamed(lambda name: f"module.{name}"), {}, "they have the prefix 'module.' (21 names)"),
    "a second base prefix": (
        {},
        _renamed(lambda name: f"model.{name}"),
        {},
        "they have the prefix 'model.' (21 names)",
    ),
    "of a PEFT model": (
        {},
        _renamed(lambda name: f"base_model.model.{name}"),
        {},
        "they have the prefix 'base_model.model.' (21 names)",
    ),
    "compiled layers": (
        {},
        _renamed(lambda name: name.replace("layers.1.", "layers.1._orig_mod.")),
        {},
        "they have _orig_mod inside, as in model.layers.1._orig_mod.",
    ),
    "tied, and neither is there": (
        {"tie_word_embeddings": True},
        _without("model.embed_tokens.weight"),
        {},
        f"2 missing: {HEAD}, model.embed_tokens.weight",
    ),
    "tied, and both differ": (
        {"tie_word_embeddings": True},
        _with_a_head_of_its_own,
        {},
        "the config ties two weights that differ in the checkpoint",
    ),
    "a matrix of an expert": (_MOE, _without(_EXPERT), {}, f"1 missing: {_EXPERT}"),
    "more experts": (_MOE, _same, {"num_local_experts": 8}, "mlp.experts.down_proj [4, 32, 48] for [8, 32, 48]"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_refused(what: str, tmp_path: Path) -> None:
    fields, change, config, says = REFUSED[what]
    folder = _change(_saved(tmp_path / "model", **fields), change, **config)
    with pytest.raises(ConfigError) as caught:
        load_model(str(folder), OPTIONS)
    assert says in str(caught.value) and str(folder) in str(caught.value), str(caught.value)


def test_a_lost_or_damaged_file_is_named(tmp_path: Path) -> None:
    folder = _saved(tmp_path / "model")
    AutoModelForCausalLM.from_pretrained(folder).save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
    lost = sorted((tmp_path / "sharded").glob("model-*"))[1]
    check_model_folder(tmp_path / "sharded")
    lost.unlink()
    with pytest.raises(ConfigError, match=f"names files that are not there.*{lost.name}"):
        check_model_folder(tmp_path / "sharded")
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[:-100])
    with pytest.raises(ConfigError, match="the model cannot be loaded"):
        check_model_folder(folder)


ACCEPTED: dict[str, tuple[dict[str, Any], Change]] = {
    "as transformers saves it": ({}, _same),
    "of the base model, without its prefix": ({}, _renamed(lambda name: name.removeprefix("model."))),
    "tied, without a head": ({"tie_word_embeddings": True}, _same),
    "tied, by the head's name": (
        {"tie_word_embeddings": True},
        _renamed(lambda name: HEAD if name == "model.embed_tokens.weight" else name),
    ),
    "experts, one by one": (_MOE, _same),
    "buffers of older versions": ({}, lambda weights: weights | {"model.rotary_emb.inv_freq": torch.ones(4)}),
}


@pytest.mark.parametrize("what", ACCEPTED)
def test_accepted(what: str, tmp_path: Path) -> None:
    fields, change = ACCEPTED[what]
    folder = _saved(tmp_path / "model", **fields)
    expected = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    found = load_model(str(_change(folder, change)), OPTIONS).state_dict()
    assert found.keys() == expected.keys() and all(found[name].equal(expected[name]) for name in expected)


def test_a_pickled_checkpoint_is_checked_too(tmp_path: Path) -> None:
    folder = _saved(tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(weights, folder / "pytorch_model.bin")
    check_model_folder(folder)
    torch.save(_without(QUERY)(weights), folder / "pytorch_model.bin")
    with pytest.raises(ConfigError, match=f"1 missing: {QUERY}"):
        check_model_folder(folder)


def test_what_the_loader_itself_leaves_out_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """ZeRO-3 and quantized checkpoints load in other ways than the check does."""
    folder = _change(_saved(tmp_path / "model"), _without(QUERY))
    monkeypatch.setattr("seqaware.models.model.check_weights", lambda *_, **__: ())
    with pytest.raises(ConfigError, match=f"1 missing: {QUERY}"):
        load_model(str(folder), OPTIONS)


def test_a_new_weight_comes_from_the_seed_and_its_name(tmp_path: Path) -> None:
    folder = _saved(tmp_path / "model")
    whole = load_file(folder / "model.safetensors")
    _change(folder, _without(HEAD, QUERY))
    lines: list[str] = []

    def loaded(seed: int, *allow: str, dtype: torch.dtype = torch.float32) -> Weights:
        torch.rand(3)  # whatever the global generator has done
        options = LoadOptions(dtype, 0.0, None, False, {}, allow_missing=allow, seed=seed)
        return load_model(str(folder), options, say=lines.append).state_dict()

    first = loaded(1, "lm_head", "model.layers.*.q_proj.weight")
    assert lines == [f"new weights {HEAD}, {QUERY} (model.allow_missing), drawn from the seed and their names"]
    assert all(first[name].equal(whole[name]) for name in whole if name not in (HEAD, QUERY))
    again, other = loaded(1, HEAD, QUERY), loaded(2, HEAD, QUERY)
    for name in (HEAD, QUERY):
        assert first[name].equal(again[name]) and not first[name].equal(other[name])
        # Llama's initializer_range; 1024 draws and more know a standard deviation to 1/√2048 of itself, times five.
        assert float(first[name].std()) == pytest.approx(0.02, rel=0.11)
        assert loaded(1, HEAD, QUERY, dtype=torch.bfloat16)[name].equal(first[name].bfloat16())
    assert not first[HEAD][:32].equal(first[QUERY])
    with pytest.raises(ConfigError, match=f"1 missing: {QUERY}"):
        loaded(1, "lm_head")
    with pytest.raises(ConfigError, match=r"allow_missing matches no weight of this model; got lm_heads; .*lm_head"):
        loaded(1, "lm_heads")


def test_a_new_weight_without_an_initial_value_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    empty = load_model(str(_saved(tmp_path / "model")), OPTIONS).to("meta")
    monkeypatch.setattr(type(empty), "_init_weights", lambda self, module: None)
    with pytest.raises(ConfigError, match=f"no initial value for this weight; got {HEAD}"):
        draw_new_weights(empty, [HEAD], like=empty, seed=1)


def test_adapters_do_not_train_beside_a_random_frozen_weight(tmp_path: Path) -> None:
    folder = _change(_saved(tmp_path / "model"), _without(HEAD))

    def load(**lora: Any) -> None:
        options = LoadOptions(torch.float32, 0.0, None, False, {}, LoraConfig(**lora), allow_missing=("lm_head",))
        load_model(str(folder), options)

    load(modules_to_save=["lm_head"])
    with pytest.raises(ConfigError, match=r"random and never trained; got lm_head.weight; .*modules_to_save"):
        load()


def test_an_adapter_and_a_gguf_file_are_no_base_model(tmp_path: Path) -> None:
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "someone/base"}))
    (adapter / "adapter_model.safetensors").write_bytes(b"")
    for refuse in (
        lambda: check_model_source(ModelConfig(base_name=str(adapter))),
        lambda: load_model(str(adapter), OPTIONS),
    ):
        with pytest.raises(ConfigError, match=r"is a LoRA adapter.*seqaware export .* FOLDER; .*someone/base"):
            refuse()
    # transformers would put it on the model that lies beside it.
    whole = _saved(tmp_path / "model")
    shutil.copy(adapter / "adapter_config.json", whole)
    with pytest.raises(ConfigError, match=r"a model and an adapter.*remove adapter_config.json"):
        load_model(str(whole), OPTIONS)
    only = tmp_path / "gguf"
    only.mkdir()
    (only / "model.Q4_K_M.gguf").write_bytes(b"GGUF")
    for name in (only, only / "model.Q4_K_M.gguf"):
        with pytest.raises(ConfigError, match="GGUF"):
            check_model_source(ModelConfig(base_name=str(name)))


def test_a_model_from_scratch_lacks_nothing() -> None:
    with pytest.raises(ValueError, match="from_scratch draws every weight"):
        ModelConfig(from_scratch={"model_type": "llama"}, tokenizer="t", allow_missing=("lm_head",))
