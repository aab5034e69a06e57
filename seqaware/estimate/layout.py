"""What decides the memory and the speed of a step: the model's shape, the ranks, ZeRO's settings, the micro-batch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from seqaware.config.model_config import LoraConfig
from seqaware.estimate.decoder import Decoder, decoder_of
from seqaware.estimate.zero3_gathering import Gathering, GatherSettings, gathering
from seqaware.plan.plan import Plan
from seqaware.plan.specs import World

# MLPs widen up to 8 times (Gemma); LoRA's second factor a hundred times and more.
_THIN = 16
BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
_FROZEN_BYTES = {"nf4": 0.5, "int8": 1.0}
_LINEAR_NAMES = {
    "gated": ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
    "gpt2": ("c_attn", "c_proj", "c_fc", "c_proj"),
}


@dataclass(frozen=True)
class ZeroSettings:
    """ZeRO as DeepSpeed 0.19 will have it, defaults filled in. Buckets are counted in weights, not in bytes."""

    stage: int
    overlap: bool
    contiguous: bool
    reduce_bucket: int
    sub_group: int
    gather: GatherSettings
    offload_optimizer: str | None
    offload_parameters: str | None
    parameter_buffers: int
    secondary_partition: int

    @classmethod
    def of(cls, zero: Mapping[str, Any]) -> ZeroSettings:
        """From the section zero_optimization of a DeepSpeed JSON."""
        stage = int(zero.get("stage", 0))

        def figure(name: str, default: float) -> int:
            return int(zero.get(name, zero.get(f"stage3_{name}", default)))

        def device(name: str) -> str | None:
            block = zero.get(name) or {}
            return None if block.get("device", "none") == "none" else str(block["device"])

        block = zero.get("offload_param") or {}
        overlap = zero.get("overlap_comm")
        return cls(
            stage=stage,
            overlap=stage == 3 if overlap is None else bool(overlap),
            contiguous=bool(zero.get("contiguous_gradients", True)),
            reduce_bucket=figure("reduce_bucket_size", 5e8),
            sub_group=figure("sub_group_size", 1e9),
            gather=GatherSettings(
                prefetch=figure("prefetch_bucket_size", 5e7),
                max_live=figure("max_live_parameters", 1e9),
                reuse=figure("max_reuse_distance", 1e9),
                persistence=figure("param_persistence_threshold", 1e5),
            ),
            offload_optimizer=device("offload_optimizer"),
            offload_parameters=device("offload_param"),
            parameter_buffers=int(block.get("buffer_count", 5)) * int(block.get("buffer_size", 1e8)),
            secondary_partition=figure("zero_hpz_partition_size", 1),
        )


@dataclass(frozen=True)
class Layout:
    """A model on ranks.

    Attributes:
        dtype: float32, bfloat16 or float16.
        micro_batch_tokens: what the ranks of one sequence group hold at once.
        longest: tokens of the longest document in them, of which attention is made.
        checkpointing: none, selective, full or offload. mlp_tile_tokens: None for all at once.
        adapters: weights of LoRA's factors, 0 where the whole model is trained; whole_modules: of modules beside them
            that are trained whole; trains_head: the head is among what is trained; frozen_bytes: of one frozen weight;
            adapter_width: of what selective checkpointing keeps of one layer's adapters, entries of a token.
        passes: micro-batches of a step are more than one, so that gradients wait from one to the next.
        compiled: norms and MLPs, or whole layers, run compiled.
    """

    decoder: Decoder
    world: World
    dtype: str
    zero: ZeroSettings
    optimizer: str
    micro_batch_tokens: int
    longest: int
    checkpointing: str = "none"
    mlp_tile_tokens: int | None = None
    loss_kernel: str = "fused"
    adapters: int = 0
    trains_head: bool = True
    whole_modules: int = 0
    frozen_bytes: float | None = None
    adapter_width: int = 0
    passes: bool = True
    compiled: bool = False

    @property
    def itemsize(self) -> int:
        """Bytes of a weight while computing."""
        return BYTES[self.dtype]

    @property
    def narrow(self) -> bool:
        return self.itemsize < 4

    @property
    def tokens(self) -> int:
        """Tokens of a micro-batch on one rank."""
        return -(-self.micro_batch_tokens // self.world.sequence)

    @property
    def recomputed(self) -> bool:
        """Each layer's forward runs again in the backward, if not all of it."""
        return self.checkpointing != "none"

    @property
    def products_again(self) -> bool:
        """The layers' products and their attention are computed twice, too."""
        return self.checkpointing in ("full", "offload")

    @property
    def trained(self) -> int:
        return self.adapters + self.whole_modules if self.adapters else self.decoder.parameters

    @property
    def reduce_bucket(self) -> int:
        """Weights of DeepSpeed's gradient bucket; the engine asks for no larger one than the trained weights need."""
        return min(self.zero.reduce_bucket, self.trained)

    @property
    def frozen(self) -> int:
        return self.decoder.parameters - self.whole_modules if self.adapters else 0


def gathered(layout: Layout) -> Gathering:
    """What ZeRO-3 gathers in a micro-batch of this layout."""
    tiled = layout.mlp_tile_tokens is not None
    return gathering(layout.decoder, layout.zero.gather, recomputed=layout.recomputed, whole_mlp=tiled)


def is_thin(inner: int, outer: int) -> bool:
    """Whether selective checkpointing computes a product [tokens, inner] x [inner, outer] again."""
    return _THIN * inner < outer


def layout_of(plan: Plan) -> Layout | None:
    """The layout of a plan; None while the model's sizes are not known."""
    decoder = decoder_of(plan.model)
    if decoder is None:
        return None
    config, batches = plan.config, plan.batches
    adapters = _WHOLE_MODEL if config.lora is None else _adapters(decoder, config.lora)
    frozen = None if config.lora is None else _FROZEN_BYTES.get(config.lora.quantize_base)
    return Layout(
        decoder=decoder,
        world=plan.world,
        dtype=plan.dtype,
        zero=ZeroSettings.of(plan.deepspeed["zero_optimization"]),
        optimizer=config.training.optimizer.type,
        micro_batch_tokens=batches.micro_batch_tokens,
        longest=min(batches.max_seq_length, batches.micro_batch_tokens),
        checkpointing=config.model.activation_checkpointing,
        mlp_tile_tokens=config.model.mlp_tile_tokens,
        loss_kernel=config.model.loss_kernel,
        adapters=adapters.weights,
        trains_head=adapters.trains_head,
        whole_modules=adapters.whole_modules,
        frozen_bytes=frozen,
        adapter_width=adapters.width,
        compiled=config.model.compile,
    )


@dataclass(frozen=True)
class _Adapters:
    """As the layout has them, under its names."""

    weights: int
    whole_modules: int
    trains_head: bool
    width: int


_WHOLE_MODEL = _Adapters(weights=0, whole_modules=0, trains_head=True, width=0)


def _adapters(decoder: Decoder, lora: LoraConfig) -> _Adapters:
    named = dict(zip(_LINEAR_NAMES[decoder.family], decoder.linear_widths, strict=False))
    targets = lora.target_modules
    # A regular expression is counted as if it named every linear layer: never too little.
    chosen = list(decoder.linear_widths) if isinstance(targets, str) else [named[n] for n in targets if n in named]
    magnitudes = sum(out for _, out in chosen) if lora.dora else 0
    weights = decoder.layers * (lora.rank * sum(inner + out for inner, out in chosen) + magnitudes)
    width = sum(lora.rank + (0 if is_thin(lora.rank, out) else out) for _, out in chosen)
    outer = decoder.vocabulary * decoder.hidden
    heads = [name for name in lora.modules_to_save if name in ("lm_head", "embed_tokens", "wte")]
    trains_head = "lm_head" in heads or (decoder.tied and bool(heads))
    return _Adapters(weights, outer * len(heads), trains_head, width)
