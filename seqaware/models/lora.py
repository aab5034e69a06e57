"""Low-rank adapters through peft: checked before the model loads, drawn from the seed, trained, and written out.

An adapted linear layer computes with W + s·B·A, where W [out, in] stays as it was, A [rank, in] is drawn and
B [out, rank] starts at zero; s = alpha / rank, or alpha / √rank with rslora. DoRA computes with m · V / ‖V‖ where
V = W + s·B·A, the norm runs over the inputs of each output, and m [out] starts at ‖W‖.

Adapters have the run's dtype, like every other trained weight: DeepSpeed keeps one dtype, and its own float32 copies.

peft is imported where it is used: it brings bitsandbytes and torch's compiler, and most runs have no adapters.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import BitsAndBytesConfig, PreTrainedModel
from transformers.integrations.deepspeed import HfDeepSpeedConfig
from transformers.pytorch_utils import Conv1D

from seqaware.config.model_config import LoraConfig
from seqaware.models.lora_targets import find_targets

if TYPE_CHECKING:
    from peft import PeftModel

_ADAPTER = "default"
_SAVED = f".modules_to_save.{_ADAPTER}"


def quantization(lora: LoraConfig, model: PreTrainedModel, dtype: torch.dtype) -> BitsAndBytesConfig | None:
    """How transformers holds the frozen linear layers of `model`; head and modules_to_save stay as they are."""
    if lora.quantize_base == "none":
        return None
    targets = find_targets(lora, model, loss_kernel="plain")
    head = next(name for name, module in model.named_modules() if module is model.get_output_embeddings())
    skip = [head, *targets.saved]
    if lora.quantize_base == "int8":
        # With a threshold, which columns are kept exact would depend on what else is in the micro-batch.
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=0.0, llm_int8_skip_modules=skip)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=skip,
    )


def initial_weight(name: str, shape: torch.Size, seed: int) -> Tensor:
    """A of the layer called `name`: uniform in ±1/√in, float32 [rank, in], from the seed and the name alone."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
    bound = shape[1] ** -0.5
    return torch.empty(shape, dtype=torch.float32).uniform_(-bound, bound, generator=generator)


class Adapters:
    """Adapters inside a loaded model, which stays a transformers model; only they are trained from now on.

    Args:
        model: as it was loaded; ZeRO-3 may have sharded it.
        revision: of the base model on the hub, for the adapter's own config.
        deepspeed: the complete DeepSpeed dict.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        lora: LoraConfig,
        *,
        seed: int,
        revision: str | None,
        deepspeed: Mapping[str, Any],
    ) -> None:
        from peft import LoraConfig as PeftLoraConfig
        from peft import get_peft_model

        # The head has been seen to by `find_targets` before anything was loaded.
        targets = find_targets(lora, model, loss_kernel="plain")
        asked = lora.target_modules
        settings = PeftLoraConfig(
            task_type="CAUSAL_LM",
            r=lora.rank,
            lora_alpha=lora.alpha,  # type: ignore[arg-type]  # any number serves
            lora_dropout=lora.dropout,
            target_modules=asked if isinstance(asked, str) else list(asked),
            # Whole names: peft would take `norm` for every name that ends so.
            modules_to_save=list(targets.saved) or None,
            use_rslora=lora.rslora,
            use_dora=lora.dora,
            fan_in_fan_out=isinstance(model.get_submodule(targets.linear[0]), Conv1D),
        )
        self.model = model
        self.targets = targets
        self.dtype = model.dtype
        # Kept alive meanwhile: DoRA measures the weights, and peft asks transformers whether they must be gathered.
        sharding = HfDeepSpeedConfig(dict(deepspeed)) if _is_sharded(model.parameters()) else None
        # peft draws weights of its own; ours replace them, and the run's random state must not move.
        with torch.random.fork_rng(devices=[]):
            self.peft_model: PeftModel = get_peft_model(
                model, settings, autocast_adapter_dtype=False, revision=revision
            )
        del sharding
        if settings.base_model_name_or_path and Path(settings.base_model_name_or_path).is_dir():
            # A relative path would name another folder for whoever loads the adapter from elsewhere.
            settings.base_model_name_or_path = str(Path(settings.base_model_name_or_path).absolute())
        for module in model.modules():
            if hasattr(module, "support_avx512bf16_for_cpu"):
                # bitsandbytes would re-pack the weights in the first evaluation on a CPU that has bfloat16 arithmetic,
                # and multiply in bfloat16 from then on, whatever the run's dtype.
                module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]
        layers = dict(self._layers())
        assert sorted(layers) == sorted(targets.linear), "peft adapted other layers than those that were found"
        for name, layer in layers.items():
            weight = layer.lora_A[_ADAPTER].weight
            weight.data.copy_(initial_weight(name, weight.shape, seed))
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.to(self.dtype)
        if lora.dora and _is_sharded(model.parameters()):
            for layer in layers.values():
                _let_dora_gather(layer)

    def _layers(self) -> Iterator[tuple[str, Any]]:
        from peft.tuners.lora import LoraLayer

        for name, module in self.model.named_modules():
            if isinstance(module, LoraLayer):
                yield name, module

    def write_merged(self, folder: Path, weights: dict[str, Tensor]) -> None:
        """A plain Hugging Face folder of the whole model."""
        config = self.model.config.__class__.from_dict(
            {key: value for key, value in self.model.config.to_dict().items() if key != "quantization_config"}
        )
        config.use_cache = True
        with torch.device("meta"):
            plain: Any = type(self.model)(config)
        plain.to(self.dtype)
        buffers = {name.replace(".base_layer", "").replace(_SAVED, ""): b for name, b in self.model.named_buffers()}
        weights |= {name: buffers[name].detach().cpu() for name in plain.state_dict() if name in buffers}
        plain.generation_config = self.model.generation_config
        plain.save_pretrained(folder, state_dict=weights)

    def write_adapter(self, folder: Path, weights: dict[str, Tensor]) -> None:
        """adapter_model.safetensors and adapter_config.json, as `PeftModel.from_pretrained` reads them."""
        named = {f"base_model.model.{name}": weight for name, weight in weights.items()}
        self.peft_model.save_pretrained(str(folder), state_dict=named, save_embedding_layers=False)

    def adapter_weights(self, *, keep: bool) -> dict[str, Tensor]:
        """Every trained weight by its name, on the CPU. Collective under ZeRO-3; empty where `keep` is False."""
        weights = {}
        trained = [(name, parameter) for name, parameter in self.model.named_parameters() if parameter.requires_grad]
        for name, parameter in trained:
            with _gathered([parameter]):
                if keep:
                    weights[name] = parameter.detach().cpu().clone()
        return weights

    def merged_weights(self, *, keep: bool) -> dict[str, Tensor]:
        """Every weight of the plain model, the update added in, in the run's dtype on the CPU.

        Collective under ZeRO-3, a layer at a time; empty where `keep` is False.
        """
        weights: dict[str, Tensor] = {}
        layers = dict(self._layers())
        seen: set[int] = set()
        for name, module in self.model.named_modules():
            if name.endswith(".original_module") or ".original_module." in name:
                continue  # its trained copy stands in for it
            layer_name = name.removesuffix(".base_layer")
            layer = layers.get(layer_name)
            if name in layers or _is_inside(name, layers):
                continue  # the adapter itself: it goes into the weight of its base layer
            own = [(leaf, p) for leaf, p in module.named_parameters(recurse=False) if id(p) not in seen]
            seen.update(id(parameter) for _, parameter in own)
            with _gathered(list((layer or module).parameters(recurse=layer is not None))):
                for leaf, parameter in own if keep else ():
                    value = _plain_weight(module, leaf, parameter, layer)
                    weights[f"{layer_name.replace(_SAVED, '')}.{leaf}"] = value.to(self.dtype).contiguous()
        return weights


def _is_inside(name: str, layers: Mapping[str, Any]) -> bool:
    """Whether a module is part of an adapter, other than the base layer itself."""
    return any(name.startswith(f"{layer}.") for layer in layers) and not name.endswith(".base_layer")


def _plain_weight(module: nn.Module, leaf: str, parameter: nn.Parameter, layer: Any) -> Tensor:
    if leaf == "weight" and layer is not None:
        return merged_weight(layer)
    weight: Tensor = _dequantised(module) if leaf == "weight" else parameter
    return weight.detach().cpu().clone()


@torch.no_grad()
def merged_weight(layer: Any) -> Tensor:
    """The one matrix that does what base layer and adapter do together: float32, on the CPU, in the base's layout."""

    def whole(weight: Tensor) -> Tensor:
        return weight.detach().float().cpu()

    base = whole(_dequantised(layer.get_base_layer()))
    turned = bool(getattr(layer, "fan_in_fan_out", False))
    update = whole(layer.lora_B[_ADAPTER].weight) @ whole(layer.lora_A[_ADAPTER].weight)
    merged: Tensor = (base.T if turned else base) + layer.scaling[_ADAPTER] * update
    if _ADAPTER in layer.lora_magnitude_vector:
        magnitude = whole(layer.lora_magnitude_vector[_ADAPTER].weight)
        merged *= (magnitude / torch.linalg.norm(merged, dim=1)).unsqueeze(1)
    return merged.T.contiguous() if turned else merged


def _dequantised(module: nn.Module) -> Tensor:
    """The module's weight as it multiplies, whatever it is held in."""
    from peft.utils.integrations import dequantize_module_weight

    weight: Tensor = dequantize_module_weight(module)
    return weight


def _gathered(parameters: list[nn.Parameter]) -> Any:
    """A context in which the parameters are whole, also under ZeRO-3."""
    import deepspeed

    return deepspeed.zero.GatheredParameters(parameters, enabled=_is_sharded(parameters))


def _let_dora_gather(layer: Any) -> None:
    """Tell ZeRO-3 whose weights DoRA's part of a layer reads besides its own: it is a module without them."""
    import deepspeed

    reader = layer.lora_magnitude_vector[_ADAPTER]
    for owner in (layer.get_base_layer(), layer.lora_A[_ADAPTER], layer.lora_B[_ADAPTER]):
        for parameter in owner.parameters():
            deepspeed.zero.register_external_parameter(reader, parameter)


def _is_sharded(parameters: Iterable[nn.Parameter]) -> bool:
    return any(hasattr(parameter, "ds_id") for parameter in parameters)
