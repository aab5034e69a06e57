"""What a person writes: every key of the YAML, its type, its default and what it means.

A `Config` is exactly what was written plus the defaults. Whatever follows from it (steps, micro-batches, DeepSpeed's
settings) is the Plan's. The models are frozen and refuse unknown keys. Importing this module needs no torch.
"""

from __future__ import annotations

import math
import re
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, model_validator

from seqaware.config.dataset_config import DatasetConfig, EvaluationConfig, FormatConfig, MixturePart, Source
from seqaware.config.model_config import LoraConfig, ModelConfig, ParallelConfig
from seqaware.config.output_config import FaultsConfig, LoggingConfig, OutputConfig
from seqaware.config.profile_config import ProfileConfig
from seqaware.config.values import (
    Count,
    CountOrZero,
    Flag,
    FromOne,
    LocalName,
    NonNegative,
    Positive,
    PositiveShare,
    Section,
    Seed,
    SequenceLength,
    Share,
    ShareBelowOne,
    Text,
)

__all__ = [
    "Config",
    "ControlConfig",
    "DatasetConfig",
    "EvaluationConfig",
    "FaultsConfig",
    "FormatConfig",
    "LoggingConfig",
    "LoraConfig",
    "MixturePart",
    "ModelConfig",
    "OptimizerConfig",
    "OutputConfig",
    "PackingConfig",
    "ParallelConfig",
    "ParametersConfig",
    "ProfileConfig",
    "ScheduleConfig",
    "Section",
    "SftConfig",
    "Source",
    "TrainingConfig",
    "config_json_schema",
]

DEFAULT_GAMMA = 0.98
DEFAULT_BATCH_SIZE = 4
DEFAULT_ACCUMULATION_STEPS = 4
MOST_EPOCHS = 10**6
"""The steps of each epoch are counted one by one, up to max_steps."""
SCHEMES = ("log_suffix", "linear", "uniform")


def _nothing_is_default(value: Any) -> Any:
    # A section whose keys are all commented out reads as null: nothing was written, so the defaults hold.
    return {} if value is None else value


_OrDefaults = BeforeValidator(_nothing_is_default)


class ParametersConfig(Section):
    """Sizes of the training."""

    max_seq_length: SequenceLength | None = None
    """Tokens a document may have; null: the model's maximum, at most 2048."""


class OptimizerConfig(Section):
    """The optimizer. The learning rate follows training.schedule."""

    type: Literal["adamw", "adamw_fused", "cpu_adam", "fused_adam", "adamw_8bit", "lion", "muon"] = "adamw"
    """torch: adamw, adamw_fused; DeepSpeed: cpu_adam, fused_adam (GPU), lion, muon; bitsandbytes: adamw_8bit."""
    lr: Positive = 2e-5
    """The highest learning rate of the schedule."""
    weight_decay: NonNegative = 0.01
    """Decoupled weight decay of matrices; biases and norms are not decayed."""
    betas: tuple[ShareBelowOne, ShareBelowOne] = (0.9, 0.999)
    """Decay rates of the moments (AdamW, Lion, and Muon's AdamW half)."""
    eps: Positive = 1e-8
    """AdamW's ε."""
    momentum: ShareBelowOne = 0.95
    """Muon's momentum."""
    max_grad_norm: NonNegative = 1.0
    """Clip the global gradient to this L2 norm; 0: no clipping. Muon orthogonalizes the clipped gradient."""


class ScheduleConfig(Section):
    """How long, how large a step, and how the learning rate moves."""

    num_epochs: Positive | None = None
    """Passes over the data; fractions are allowed. null: as many as max_steps needs, or 1 without max_steps."""
    max_steps: Count | None = None
    """Optimizer steps of the run. With num_epochs, the smaller of the two ends it."""
    scheduler_type: Literal["constant", "linear", "cosine", "polynomial", "wsd"] = "cosine"
    """Course of the learning rate after the warm-up; wsd: stable, then a linear decay over the last decay_ratio."""
    warmup_steps: CountOrZero | None = None
    """Steps of linear warm-up; at most one of warmup_steps and warmup_ratio."""
    warmup_ratio: ShareBelowOne | None = None
    """Warm-up as a share of all steps."""
    min_lr_ratio: Share = 0.0
    """The last learning rate as a share of lr (not for constant)."""
    power: Positive = 1.0
    """Exponent of the polynomial schedule."""
    decay_ratio: PositiveShare = 0.1
    """Share of all steps that the wsd schedule decays over."""
    batch_size: Count | None = None
    """With grad_accumulation_steps: their product is the sequences of an optimizer step, on any number of ranks."""
    grad_accumulation_steps: Count | None = None
    """See batch_size. Both default to 4 when no other size of a step is written."""
    global_batch_size: Count | None = None
    """Sequences of an optimizer step, over all ranks."""
    global_batch_tokens: Count | None = None
    """Tokens an optimizer step holds at most, over all ranks."""
    micro_batch_tokens: Count | None = None
    """Tokens a rank (or the parallel.sequence ranks of a group) holds at once: memory and speed only.
    null: (batch_size, if written, ×) max_seq_length."""

    @model_validator(mode="after")
    def _one_spelling(self) -> Self:
        if len(self.written("warmup_steps", "warmup_ratio")) == 2:
            raise ValueError("warmup_steps and warmup_ratio are both written; keep one")
        if (self.num_epochs or 0.0) > MOST_EPOCHS and (self.max_steps or math.inf) > MOST_EPOCHS:
            raise ValueError(f"num_epochs must be at most {MOST_EPOCHS:,}; got {self.num_epochs:g}")
        product = self.written("batch_size", "grad_accumulation_steps")
        ways = [" × ".join(product)] if product else []
        ways += self.written("global_batch_size", "global_batch_tokens")
        if len(ways) > 1:
            raise ValueError(f"the size of a step is written in {len(ways)} ways ({', '.join(ways)}); keep one")
        return self

    @property
    def epoch_limit(self) -> float | None:
        """Passes over the data after which the run ends; None where max_steps alone ends it."""
        if self.num_epochs is None and self.max_steps is None:
            return 1.0
        return self.num_epochs


class SftConfig(Section):
    """The objective: Σ w_k · l_k with w_k = (1 − γ^k) / (1 − γ). γ as gamma, half_life or horizon, one of them."""

    gamma: Share | None = None
    """Discount γ in [0, 1]; 0 is plain cross-entropy. Default 0.98 when neither half_life nor horizon is written."""
    half_life: Positive | None = None
    """γ as the number of tokens after which the discount has halved: ln ½ / ln γ."""
    horizon: FromOne | None = None
    """γ as 1 / (1 − γ), in tokens."""
    positions: Literal["supervised", "sequence", "turn"] = "supervised"
    """What k counts: tokens with loss, every predicted token, or tokens since the assistant's turn began."""
    scale: Literal["raw", "horizon", "mean_one"] = "raw"
    """raw: the formula; horizon: × (1 − γ); mean_one: each sequence's weights average 1."""
    normalize_by: Literal["tokens", "weight", "sequences"] = "tokens"
    """What the step's Σ w·l is divided by: supervised tokens, Σ w, or sequences of the whole step."""
    weighting: Text = "log_suffix"
    """log_suffix, linear, uniform, or a function of your own as module:function."""
    on_split: Literal["continue", "restart"] = "continue"
    """Whether k goes on in the next piece of a document that on_overlong: split cut."""

    @model_validator(mode="before")
    @classmethod
    def _default_gamma(cls, values: Any) -> Any:
        if isinstance(values, dict) and all(values.get(key) is None for key in ("gamma", "half_life", "horizon")):
            return {**values, "gamma": DEFAULT_GAMMA}
        return values

    @model_validator(mode="after")
    def _checked(self) -> Self:
        spellings = self.written("gamma", "half_life", "horizon")
        if len(spellings) != 1:
            raise ValueError(
                f"the discount is written in {len(spellings)} ways ({', '.join(spellings)}); keep one "
                f"(an override replaces no other key: --set training.sft.{spellings[0]}=null removes it)"
            )
        if self.weighting not in SCHEMES and not re.fullmatch(r"[\w.]+:\w+", self.weighting):
            raise ValueError(f"weighting must be {', '.join(SCHEMES)} or module:function; got {self.weighting!r}")
        return self

    @property
    def discount(self) -> float:
        """γ, from whichever spelling was written."""
        if self.half_life is not None:
            return math.exp(-math.log(2.0) / self.half_life)
        if self.horizon is not None:
            return 1.0 - 1.0 / self.horizon
        assert self.gamma is not None
        return self.gamma


class ControlConfig(Section):
    """Seed and reports."""

    seed: Seed = 42
    """Decides the order of the data, fresh weights and dropout."""
    log_every: Count = 1
    """Optimizer steps between two lines of metrics.jsonl."""


class TrainingConfig(Section):
    """How the model is trained."""

    parameters: Annotated[ParametersConfig, _OrDefaults] = ParametersConfig()
    optimizer: Annotated[OptimizerConfig, _OrDefaults] = OptimizerConfig()
    schedule: Annotated[ScheduleConfig, _OrDefaults] = ScheduleConfig()
    sft: Annotated[SftConfig, _OrDefaults] = SftConfig(gamma=DEFAULT_GAMMA)
    control: Annotated[ControlConfig, _OrDefaults] = ControlConfig()


class PackingConfig(Section):
    """Several documents in one row."""

    enabled: Flag = True
    """Fill rows with several documents, which never see each other; changes speed and memory only."""


class Config(Section):
    """A run of seqaware."""

    model: ModelConfig
    dataset: DatasetConfig
    format: Annotated[FormatConfig, _OrDefaults] = FormatConfig()
    training: Annotated[TrainingConfig, _OrDefaults] = TrainingConfig()
    packing: Annotated[PackingConfig, _OrDefaults] = PackingConfig()
    parallel: Annotated[ParallelConfig, _OrDefaults] = ParallelConfig()
    lora: LoraConfig | None = None
    """Low-rank adapters instead of full fine-tuning; null: the whole model is trained."""
    evaluation: Annotated[EvaluationConfig, _OrDefaults] = EvaluationConfig()
    output: Annotated[OutputConfig, _OrDefaults] = OutputConfig()
    faults: Annotated[FaultsConfig, _OrDefaults] = FaultsConfig()
    logging: Annotated[LoggingConfig, _OrDefaults] = LoggingConfig()
    deepspeed: LocalName | None = None
    """DeepSpeed JSON with ZeRO and communication keys only; --deepspeed wins; null: ds_configs/zero2.json."""

    @property
    def output_dir(self) -> str:
        """The run's folder."""
        return self.output.dir or f"runs/{self.model.output_name}"


def config_json_schema() -> dict[str, Any]:
    """The JSON Schema of the YAML, for editors."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **Config.model_json_schema()}
