"""Which attention a run uses, and why: the fastest exact one that this machine, dtype and model allow.

flash_attention_4   module flash_attn.cute, on Hopper GPUs and later; only where it is asked for, and then tried first
flash_attention_3   module flash_attn_interface, on Hopper GPUs
flash_attention_2   module flash_attn
varlen              torch.nn.attention.varlen, part of torch
sdpa_per_document   a loop over the documents, anywhere; on a CPU it beats every mask
eager               softmax written out: the reference
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from transformers import PreTrainedModel

from seqaware.config.packages import FLASH_MODULES, is_installed
from seqaware.errors import ConfigError
from seqaware.models.attention import BACKENDS, AttentionCall, difference, takes_grouped_heads
from seqaware.models.attention_trial import Trial

# All GPU backends are kernels of Dao's FlashAttention, with these limits.
_MOST_HEAD_DIM = 256
_HEAD_DIM_GRANULE = 8
_AMPERE, _HOPPER = (8, 0), (9, 0)
_FASTEST_FIRST = ("flash_attention_3", "flash_attention_2", "varlen")


@dataclass(frozen=True)
class AttentionChoice:
    """The backend of a run, why it was taken, and what kept faster ones from being taken."""

    backend: str
    reason: str


@dataclass(frozen=True)
class _Need:
    """What the kernels are to do: device type, dtype, head size, the GPU's compute capability if known, dropout."""

    device: str
    dtype: torch.dtype
    head_dim: int
    capability: tuple[int, int] | None
    dropout: float

    def obstacle(self, *, at_least: tuple[int, int], drops: bool = False) -> str | None:
        """What a FlashAttention kernel for GPUs of this capability would not take."""
        if self.device != "cuda":
            return "needs a GPU"
        if self.capability is not None and self.capability < at_least:
            return f"needs compute capability {_dotted(at_least)}, this GPU has {_dotted(self.capability)}"
        if self.dtype not in (torch.bfloat16, torch.float16):
            return f"needs bfloat16 or float16, not {str(self.dtype).removeprefix('torch.')}"
        if self.head_dim > _MOST_HEAD_DIM or self.head_dim % _HEAD_DIM_GRANULE:
            limits = f"up to {_MOST_HEAD_DIM}, in steps of {_HEAD_DIM_GRANULE}"
            return f"takes heads of {limits}; this model has {self.head_dim}"
        if self.dropout > 0 and not drops:
            return f"has no dropout; this model's attention has {self.dropout:g}"
        return None


def attention_of(model: PreTrainedModel, asked: str, *, device: torch.device, dtype: torch.dtype) -> AttentionChoice:
    """The attention that this model runs with: chosen for its heads and dropout, and tried.

    Args:
        asked: `model.attention`. dtype: of the weights.

    Raises:
        ConfigError: what was asked for cannot do it here; or flash_attention_4, which is young, fails or gives
            something else than the loop over the documents.
    """
    config = model.config.get_text_config()
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    # Everyone's spelling, GPT-2's, BERT's.
    spellings = ("attention_dropout", "attn_pdrop", "attention_probs_dropout_prob")
    dropout = max(getattr(config, spelling, None) or 0.0 for spelling in spellings)
    choice = choose_backend(asked, device=device.type, dtype=dtype, head_dim=head_dim, dropout=dropout)
    if choice.backend == "varlen":
        takes_grouped_heads(device, dtype)
    if choice.backend == "flash_attention_4":
        shape = (heads, getattr(config, "num_key_value_heads", None) or heads, head_dim)
        softcap = getattr(config, "attn_logit_softcapping", None)
        for window in {None, getattr(config, "sliding_window", None)}:
            call = AttentionCall(scale=head_dim**-0.5, dropout=0.0, window=window, softcap=softcap)
            _try_version_4(call, shape=shape, device=device, dtype=dtype)
    return choice


def _try_version_4(
    call: AttentionCall, *, shape: tuple[int, int, int], device: torch.device, dtype: torch.dtype
) -> None:
    # Longer than a kernel's block; of one token; in between; and longer than a window, if that is not too long.
    lengths = (250, 1, 5) if call.window is None else (250, 1, 5, min(call.window + 50, 2_000))
    known = BACKENDS["sdpa_per_document" if call.softcap is None else "eager"]
    trial = Trial(shape, lengths, device, dtype)
    wrong = difference(BACKENDS["flash_attention_4"], known, trial=trial, call=call)
    if wrong is not None:
        raise ConfigError("model.attention: flash_attention_4 does not work here", got=wrong, do="write auto")


def choose_backend(
    asked: str,
    *,
    device: str,
    dtype: torch.dtype,
    head_dim: int,
    capability: tuple[int, int] | None = None,
    dropout: float = 0.0,
) -> AttentionChoice:
    """Pick the fastest backend that is exact here, or check the one that was asked for.

    Args:
        asked: `auto` or a backend.
        device: cpu or cuda. capability: of the GPU; None asks the current one, if there is one.
        dropout: of the attention's probabilities.

    Raises:
        ConfigError: the backend that was asked for cannot run on this device, dtype or head size, or has no dropout.
    """
    if capability is None and device == "cuda" and torch.cuda.is_available():
        capability = torch.cuda.get_device_capability()
    need = _Need(device, dtype, head_dim, capability, dropout)
    if asked != "auto":
        obstacle = _OBSTACLES[asked](need) if asked in _OBSTACLES else None
        if obstacle is not None:
            raise ConfigError(f"model.attention: {asked} cannot run here: it {obstacle}", do="write auto")
        return AttentionChoice(asked, "asked for by model.attention")
    if device == "cpu":
        return AttentionChoice("sdpa_per_document", "on a CPU a loop over the documents beats any mask")
    passed_over: list[str] = []
    for backend in _FASTEST_FIRST:
        obstacle = _OBSTACLES[backend](need)
        if obstacle is None:
            return AttentionChoice(backend, "; ".join(["the fastest exact one here", *passed_over]))
        passed_over.append(f"{backend} {obstacle}")
    return AttentionChoice("sdpa_per_document", "; ".join(["runs anywhere", *passed_over]))


def _varlen_obstacle(need: _Need) -> str | None:
    if (obstacle := need.obstacle(at_least=_AMPERE)) is not None:
        return obstacle
    return _import_obstacle("torch.nn.attention.varlen", "varlen_attn")


def _flash_obstacle(need: _Need, *, version: str, at_least: tuple[int, int]) -> str | None:
    obstacle = need.obstacle(at_least=at_least, drops=version == "flash_attention_2")
    return obstacle or _import_obstacle(FLASH_MODULES[version], "flash_attn_varlen_func")


def _import_obstacle(module: str, function: str) -> str | None:
    """Not only whether it is there: a package that was built for another torch fails when it is imported."""
    if not is_installed(module):
        return f"needs the package {module}, which is not installed"
    try:
        found = hasattr(importlib.import_module(module), function)
    except Exception as error:  # noqa: BLE001 what the start of a foreign package may raise
        return f"is installed but cannot be imported: {str(error).partition(chr(10))[0]}"
    return None if found else f"has no {function} in the version that is installed"


def _dotted(capability: tuple[int, int]) -> str:
    return f"{capability[0]}.{capability[1]}"


_OBSTACLES: dict[str, Callable[[_Need], str | None]] = {
    "varlen": _varlen_obstacle,
    **{
        version: partial(_flash_obstacle, version=version, at_least=least)
        for version, least in zip(FLASH_MODULES, (_AMPERE, _HOPPER, _HOPPER), strict=True)
    },
}
