"""Models: checked before they load, initialised by the seed alone, loaded sharded where ZeRO-3 shards them.

`WeightedCausalLM` is what the engine wraps: tokens and weights in, the weighted loss sum and its statistics out.

Letters: R rows, T columns, N = R·T tokens, H hidden size, V vocabulary.
"""

from __future__ import annotations

import difflib
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from seqaware.config.schema import LoraConfig
from seqaware.errors import ConfigError
from seqaware.files import MalformedError, local_path, read_json
from seqaware.locks import held
from seqaware.models.attention import NAME as OUR_ATTENTION
from seqaware.models.attention import Documents
from seqaware.models.lora import Adapters, quantization
from seqaware.models.lora_targets import find_targets
from seqaware.models.model_source import refuse_adapter
from seqaware.models.model_weights import (
    WeightDifferences,
    check_weights,
    draw_new_weights,
    quiet_transformers,
    weights_read_from,
)
from seqaware.objective.cross_entropy import Head, cross_entropy_from_logits
from seqaware.objective.fused import fused_by_position, fused_cross_entropy

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# One bar a rank for reading and writing weights says nothing that our own lines do not.
transformers_logging.disable_progress_bar()


# What transformers raises where the values of a config have other types or contradict each other: its own error, and
# whatever its arithmetic on them comes to.
CONFIG_ERRORS = (StrictDataclassError, ValueError, TypeError, KeyError, AttributeError, ArithmeticError)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]


def local_or_hub(name: str) -> str:
    """A folder's path with ~ expanded, or a hub id as it is."""
    folder = local_path(name)
    return str(folder) if folder.is_dir() else name


def check_vocabulary(model_vocabulary: int, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse a tokenizer whose ids the embedding does not have."""
    if len(tokenizer) > model_vocabulary:
        raise ConfigError(
            "the tokenizer's vocabulary is larger than the model's embedding",
            got=f"{len(tokenizer)} tokens for {model_vocabulary} embedding rows",
            do="use the model's own tokenizer, or resize the embedding and save the model first",
        )


def build_initial_model(
    fields: Mapping[str, Any], *, seed: int, tokenizer: PreTrainedTokenizerBase, folder: Path
) -> Path:
    """Make the folder of a randomly initialised float32 model, once; every layout then loads the same weights.

    Built whole on the CPU and loaded like a pretrained model, because a model built inside `zero.Init` does not get the
    initial weights that the same seed gives it otherwise. Safe to call from every rank of a host.
    """
    with held(folder.with_name(folder.name + ".lock")):
        wanted = {"fields": dict(fields), "seed": seed, "vocabulary": len(tokenizer)}
        mark = folder / "seqaware_initial.json"
        with suppress(OSError, MalformedError):
            if read_json(mark) == wanted:
                return folder
        partial = folder.with_name(folder.name + ".partial")
        for stale in (partial, folder):
            shutil.rmtree(stale, ignore_errors=True)
        config = initial_config(fields, tokenizer)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        # Of connected ranks transformers lets rank 0 alone write, which need not be the one that holds the lock.
        model.should_save_on_this_rank = lambda is_main_process: True
        model.save_pretrained(partial)
        (partial / mark.name).write_text(json.dumps(wanted))
        partial.rename(folder)
    return folder


def initial_config(fields: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> Any:
    """A transformers config from `model.from_scratch`; vocabulary and special tokens come from the tokenizer.

    Raises:
        ConfigError: unknown model_type, or fields the model does not take.
    """
    rest = dict(fields)
    model_type = rest.pop("model_type")
    _check_fields(model_type, rest)
    rest.setdefault("vocab_size", len(tokenizer))
    rest.setdefault("bos_token_id", tokenizer.bos_token_id)
    rest.setdefault("eos_token_id", tokenizer.eos_token_id)
    try:
        return AutoConfig.for_model(model_type, **rest)
    except CONFIG_ERRORS as error:
        got = _one_line(error)
        raise ConfigError("model.from_scratch is not a config transformers can build", got=got) from error


def _check_fields(model_type: str, fields: Mapping[str, Any]) -> None:
    """transformers takes any key and keeps it without a word; a mistyped one would train a model of another size."""
    try:
        default = AutoConfig.for_model(model_type)
    except ValueError as error:
        raise ConfigError("model.from_scratch: transformers knows no such model_type", got=model_type) from error
    known = {*default.to_dict(), *default.attribute_map}
    for name in fields:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            raise ConfigError(
                f"model.from_scratch: a {model_type} has no such field",
                got=name,
                do=f"did you mean {near[0]}?" if near else "see the config class of the model in transformers",
            )


def empty_causal_lm(config: Any, *, trust_remote_code: bool = False) -> PreTrainedModel:
    """The model that a config describes, on the meta device: every module and shape, and no memory.

    Raises:
        ConfigError: it is no causal language model, contradicts itself, or does not take our attention.
    """
    if not getattr(config.get_text_config(), "num_attention_heads", None):
        raise ConfigError("a model without attention heads cannot be trained here", got=config.model_type)
    try:
        with torch.device("meta"):
            model: PreTrainedModel = AutoModelForCausalLM.from_config(
                config, attn_implementation=OUR_ATTENTION, trust_remote_code=trust_remote_code
            )
    except (*CONFIG_ERRORS, RuntimeError, AssertionError) as error:
        first_line = f"{config.model_type}: {type(error).__name__}: {_one_line(error)}"
        raise ConfigError(
            "this config makes no causal language model that can be trained here", got=first_line
        ) from error
    return model


@dataclass(frozen=True)
class LoadOptions:
    """How a model folder or hub id becomes a module.

    Attributes:
        dtype: of the module's parameters. dropout: overrides every dropout of the model's config; None keeps them.
        deepspeed: the complete DeepSpeed dict; with stage 3 the parameters are sharded while they load.
        lora: says in how many bits the frozen weights are held.
        allow_missing: patterns of weights that the checkpoint may lack; seed: they are drawn from it.
        attention: as transformers calls it.
    """

    dtype: torch.dtype
    dropout: float | None
    revision: str | None
    trust_remote_code: bool
    deepspeed: Mapping[str, Any]
    lora: LoraConfig | None = None
    allow_missing: tuple[str, ...] = ()
    seed: int = 0
    attention: str = OUR_ATTENTION


def load_model(source: str, options: LoadOptions, *, say: Callable[[str], None] | None = None) -> PreTrainedModel:
    """Load a causal LM without a cache, with every weight from the checkpoint but those that `options` allow to be new.

    Args:
        say: hears which weights are new.

    Raises:
        ConfigError: it cannot be found or read, lacks weights or has others, or does not follow transformers'
            attention interface.
    """
    sharded = options.deepspeed.get("zero_optimization", {}).get("stage", 0) == 3
    where: dict[str, Any] = {"revision": options.revision, "trust_remote_code": options.trust_remote_code}
    refuse_adapter(source, options.revision)
    config = _read_config(source, **where)
    if options.dropout is not None:
        set_dropout(config, options.dropout)
    config.use_cache = False
    empty = empty_causal_lm(config, trust_remote_code=options.trust_remote_code)
    new = check_weights(source, empty, revision=options.revision, allow_missing=options.allow_missing)
    if options.lora is not None:
        check_new_are_trained(new, options.lora, empty)
        if options.lora.quantize_base != "none":
            where["quantization_config"] = quantization(options.lora, empty, options.dtype)
    # Kept alive while the model loads: transformers looks for it to know that ZeRO-3 shards the parameters.
    sharding = _hf_deepspeed_config(options.deepspeed) if sharded else None
    with weights_read_from(source), quiet_transformers() if new else nullcontext():
        reported: Any = AutoModelForCausalLM.from_pretrained(
            source,
            config=config,
            dtype=options.dtype,
            attn_implementation=options.attention,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
            **where,
        )
    loaded: PreTrainedModel
    loaded, info = reported
    del sharding
    # Once more: of a quantized checkpoint it is the first report, and ZeRO-3 has a loading of its own.
    WeightDifferences.of(info).refuse(source, allow_missing=new)
    draw_new_weights(loaded, new, like=empty, seed=options.seed)
    if new and say is not None:
        say(f"new weights {', '.join(new)} (model.allow_missing), drawn from the seed and their names")
    return loaded


def check_model_folder(folder: Path, *, allow_missing: Sequence[str] = ()) -> None:
    """Refuse a local folder that does not hold the weights of its model.

    Raises:
        ConfigError: see `check_weights`; or its config cannot be read.
    """
    check_weights(str(folder), empty_causal_lm(_read_config(str(folder))), allow_missing=allow_missing)


def _read_config(source: str, **where: Any) -> Any:
    try:
        return AutoConfig.from_pretrained(source, **where)
    except (OSError, *CONFIG_ERRORS) as error:
        raise ConfigError("the model cannot be loaded", got=f"{source}: {_one_line(error)}") from error


def check_new_are_trained(new: Sequence[str], lora: LoraConfig, empty: PreTrainedModel) -> None:
    """Refuse weights that are drawn at random and then frozen.

    Raises:
        ConfigError: one of them is not in lora.modules_to_save.
    """
    saved = find_targets(lora, empty, loss_kernel="plain").saved
    frozen = [name for name in new if not name.startswith(tuple(f"{module}." for module in saved))]
    if frozen:
        raise ConfigError(
            "lora: a new weight would be random and never trained",
            got=", ".join(frozen),
            do="name its module in lora.modules_to_save",
        )


def _hf_deepspeed_config(deepspeed: Mapping[str, Any]) -> Any:
    from transformers.integrations.deepspeed import HfDeepSpeedConfig

    return HfDeepSpeedConfig(dict(deepspeed))


def set_dropout(config: Any, probability: float) -> None:
    """Set every dropout of a transformers config, whatever its spelling (attention_dropout, resid_pdrop, …)."""
    for name, value in config.to_dict().items():
        if ("dropout" in name or name.endswith("pdrop")) and isinstance(value, (int, float)):
            setattr(config, name, probability)


def output_head(model: PreTrainedModel) -> Head:
    """The model's map from hidden states to logits, as the fused loss computes it.

    Covers the conventions of transformers: weight and bias of the output embedding, `final_logit_softcapping`
    (Gemma 2), `logit_scale` (Cohere) and `logits_scaling` (Granite). What a model does beyond these is found by the
    start-up probe, which compares this head's logits with the model's own.
    """
    module = model.get_output_embeddings()
    assert module is not None and not hasattr(module, "base_layer"), "an adapted head is not one matrix"
    scale = float(getattr(model.config, "logit_scale", None) or 1.0)
    scale /= float(getattr(model.config, "logits_scaling", None) or 1.0)
    softcap = getattr(model.config, "final_logit_softcapping", None)
    return Head(weight=module.weight, bias=getattr(module, "bias", None), scale=scale, softcap=softcap)


class HeadLoss(nn.Module):
    """The fused loss over the model's output head, as a module of its own.

    It owns no parameter. Under ZeRO-3 it reads the head's weight inside its own forward, so DeepSpeed gathers that
    weight for this module's forward and backward only, not for as long as the whole model runs.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self._model = (model,)  # in a tuple, so that the model is not registered a second time

    def forward(self, hidden_NH: Tensor, targets: LossTargets) -> tuple[Tensor, Tensor]:
        head = output_head(self._model[0])
        labels_N, weights_N = targets.labels.flatten(), targets.weights.flatten()
        if targets.k is not None:
            return fused_by_position(
                hidden_NH,
                head=head,
                labels_N=labels_N,
                weights_N=weights_N,
                k_N=targets.k.flatten(),
                rows=targets.loss_rows,
            )
        return fused_cross_entropy(
            hidden_NH,
            head=head,
            labels_N=labels_N,
            weights_N=weights_N,
            rows=targets.loss_rows,
            weights_are_positive=targets.weights_are_positive,
        )


@dataclass(frozen=True)
class ModelInput:
    """What the model sees of a micro-batch. input_ids, position_ids: int64 [R, T]."""

    input_ids: Tensor
    position_ids: Tensor
    documents: Documents


@dataclass(frozen=True)
class LossTargets:
    """What the loss needs of a micro-batch.

    Attributes:
        labels: int64 [R, T], shifted; weights: float32 [R, T].
        loss_rows: int64 [M], flat places with a label: all whose weight is not 0. weights_are_positive: no other ones.
        k: integer [R, T], the positions, where the sums by position are asked for: in evaluation, without gradients.
    """

    labels: Tensor
    weights: Tensor
    loss_rows: Tensor
    weights_are_positive: bool
    k: Tensor | None = None


class WeightedCausalLM(nn.Module):
    """A causal LM that returns Σ w·l over a micro-batch instead of logits.

    Args:
        model: a transformers causal LM.
        loss_kernel: "fused" never builds the [N, V] logits; "plain" takes the model's own logits (the reference).
        adapters: those inside `model`, where only they are trained.
    """

    def __init__(self, model: PreTrainedModel, *, loss_kernel: str, adapters: Adapters | None = None) -> None:
        super().__init__()
        self.model = model
        self.adapters = adapters
        self.loss_kernel = loss_kernel
        self.head_loss = HeadLoss(model)

    def forward(self, inputs: ModelInput, targets: LossTargets) -> tuple[Tensor, Tensor]:
        """Returns Σ w·l (float32, differentiable) and the statistics vector of `objective.sums`."""
        if self.loss_kernel == "plain":
            logits_NV = self.logits(inputs).flatten(0, 1)
            k_N = None if targets.k is None else targets.k.flatten()
            return cross_entropy_from_logits(logits_NV, targets.labels.flatten(), targets.weights.flatten(), k_N=k_N)
        loss: tuple[Tensor, Tensor] = self.head_loss(self.hidden(inputs).flatten(0, 1), targets)
        return loss

    def hidden(self, inputs: ModelInput) -> Tensor:
        """The last hidden states [R, T, H], after the final norm."""
        body: Any = self.model.base_model
        output: Tensor = body(
            input_ids=inputs.input_ids,
            position_ids=inputs.position_ids,
            documents=inputs.documents,
            use_cache=False,
        )[0]
        return output

    def logits(self, inputs: ModelInput) -> Tensor:
        """The model's own logits [R, T, V]."""
        model: Any = self.model
        output: Tensor = model(
            input_ids=inputs.input_ids,
            position_ids=inputs.position_ids,
            documents=inputs.documents,
            use_cache=False,
        ).logits
        return output
