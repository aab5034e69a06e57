"""The model, its adapters and how its sequences are shared among ranks: the sections model, lora and parallel."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from seqaware.config.values import Count, DType, Flag, LocalName, Positive, Section, ShareBelowOne, Text


def _policy(value: Any) -> Any:
    # As in most trainers' files: true and false.
    return {True: "full", False: "none"}[value] if isinstance(value, bool) else value


CheckpointingPolicy = Annotated[Literal["none", "selective", "full", "offload"], BeforeValidator(_policy)]


class ModelConfig(Section):
    """The model: pretrained (`base_name`) or with fresh weights drawn from the seed (`from_scratch`)."""

    base_name: LocalName | None = None
    """Hub id or folder of a pretrained causal LM; exactly one of base_name and from_scratch."""
    from_scratch: dict[str, Any] | None = None
    """A transformers configuration with its model_type; weights are drawn from training.control.seed."""
    tokenizer: LocalName | None = None
    """Hub id or folder of the tokenizer; default: base_name. Required with from_scratch."""
    output_name: LocalName = "seqaware-model"
    """Name of the trained model: in its model card, and of the run's folder if output.dir is not written."""
    dtype: DType = "auto"
    """Weights while computing: auto (bfloat16 on GPUs that have it, else float32), float32, bfloat16 or float16."""
    attention: Literal[
        "auto", "sdpa_per_document", "varlen", "flash_attention_2", "flash_attention_3", "flash_attention_4", "eager"
    ] = "auto"
    """How attention is computed; packed documents never see each other whichever it is. auto leaves version 4 alone."""
    loss_kernel: Literal["fused", "plain"] = "fused"
    """fused never holds the logits of all tokens at once; plain is the reference."""
    activation_checkpointing: CheckpointingPolicy = "none"
    """none; selective: recompute all of a layer but products and attention in the backward; full: keep each layer's
    input only; offload: keep that input on the CPU."""
    compile: Flag = False
    """Compile the decoder's layers, all but their attention, with torch.compile: the same mathematics."""
    mlp_tile_tokens: Count | None = None
    """Run each MLP over so many tokens at a time and recompute it in the backward: memory only. null: all at once."""
    dropout: ShareBelowOne | None = 0.0
    """Sets every dropout of the model's configuration; null keeps them. Above 0, masks depend on the ranks and rows."""
    revision: Text | None = None
    """Branch, tag or commit of base_name on the hub."""
    trust_remote_code: Flag = False
    """Run code that comes with the model."""
    allow_missing: tuple[Text, ...] = ()
    """Weights that the checkpoint may lack, such as lm_head: names of weights or modules, with *. They are drawn from
    the seed. Any other missing, unexpected or misshapen weight is an error."""

    @model_validator(mode="after")
    def _one_origin(self) -> Self:
        origins = self.written("base_name", "from_scratch")
        if len(origins) != 1:
            found = "both are written" if origins else "neither is written"
            raise ValueError(f"exactly one of base_name and from_scratch is needed; {found}")
        if self.from_scratch is None:
            return self
        if self.allow_missing:
            raise ValueError("allow_missing is for a checkpoint (base_name); from_scratch draws every weight")
        kind = self.from_scratch.get("model_type")
        if not isinstance(kind, str) or not kind:
            raise ValueError("from_scratch needs a model_type, such as llama or gpt2")
        if self.tokenizer is None:
            raise ValueError("from_scratch needs a tokenizer: write model.tokenizer (hub id or folder)")
        return self


class LoraConfig(Section):
    """Train low-rank adapters instead of the model's weights: W + (alpha / rank) · B·A."""

    rank: Count = 16
    """Rank of the update."""
    alpha: Positive = 32.0
    """Scale of the update: alpha / rank, or alpha / √rank with rslora."""
    dropout: ShareBelowOne = 0.0
    """Dropout before A. Above 0, masks depend on the ranks and rows."""
    target_modules: Text | Annotated[tuple[Text, ...], Field(min_length=1)] = "all-linear"
    """all-linear (every linear layer but the head), or names such as q_proj; a regular expression as one string."""
    modules_to_save: tuple[Text, ...] = ()
    """Modules that are trained whole and saved with the adapter, such as embed_tokens or lm_head."""
    rslora: Flag = False
    """Scale by alpha / √rank (Kalajdzievski 2023)."""
    dora: Flag = False
    """Train magnitude and direction apart (Liu et al. 2024)."""
    quantize_base: Literal["none", "nf4", "int8"] = "none"
    """Hold the frozen weights in 4 or 8 bits with bitsandbytes; nf4 is QLoRA (Dettmers et al. 2023)."""
    export: Literal["merged", "adapter"] = "merged"
    """What the run leaves in model/: the whole model with the update added in, or the adapter alone."""


class ParallelConfig(Section):
    """How the ranks share the work. The mathematics of the run does not depend on it."""

    sequence: Count = 1
    """Ranks that share each sequence (Ulysses): activations are split by tokens, attention by heads."""
