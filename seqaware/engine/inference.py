"""A model that answers: the one a running engine trains, or one that is loaded for this alone.

Under ZeRO-3 every forward is collective, so the ranks take part in the same forwards. Otherwise each holds the whole
model, and what one does is nothing to the others.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from transformers import PreTrainedModel

from seqaware.distributed.process_group import Ranks
from seqaware.engine.engine import Engine
from seqaware.errors import ConfigError
from seqaware.models.model import LoadOptions, load_model

_OUT_OF_MEMORY = ("can't allocate memory", "not enough memory")
# DeepSpeed's keys that matter to a model that is not trained.
_INFERENCE_KEYS = ("stage", "offload_param", "stage3_param_persistence_threshold", "stage3_max_live_parameters")

T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True)
class AnsweringModel:
    """A causal LM in evaluation mode, and the ranks that share the work.

    Attributes:
        sharded: its weights are gathered from all ranks in every forward.
    """

    model: PreTrainedModel
    ranks: Ranks
    sharded: bool

    @classmethod
    def of(cls, engine: Engine) -> AnsweringModel:
        """The engine's own model, as it stands."""
        engine.deepspeed.eval()
        return cls(engine.wrapped.model, engine.ranks, sharded=engine.zero_stage == 3)

    @property
    def in_step(self) -> bool:
        """Whether no rank may do a forward that the others do not."""
        return self.sharded and self.ranks.size > 1


def load_answering_model(source: str, options: LoadOptions, *, ranks: Ranks) -> AnsweringModel:
    """Load a model for evaluation alone: sharded over the ranks where options.deepspeed says stage 3. Collective.

    Raises:
        ConfigError: it cannot be found or read.
    """
    zero = options.deepspeed.get("zero_optimization", {})
    sharded = zero.get("stage", 0) == 3
    model = load_model(source, options).eval()
    if not sharded:
        model.to(ranks.device)
        return AnsweringModel(model, ranks, sharded=False)
    import deepspeed

    settings = {key: value for key, value in options.deepspeed.items() if key in ("bf16", "fp16", "aio")}
    settings |= {
        "zero_optimization": {key: value for key, value in zero.items() if key in _INFERENCE_KEYS},
        "train_micro_batch_size_per_gpu": 1,
    }
    engine, *_ = deepspeed.initialize(model=model, config=settings)
    engine.eval()
    return AnsweringModel(model, ranks, sharded=True)


def in_halves(
    work: Callable[[Sequence[T]], list[R]],
    items: Sequence[T],
    *,
    model: AnsweringModel,
    halved: Callable[[], None],
) -> list[R]:
    """`work` over the items at once or, where memory runs out, over halves of them, down to one.

    Args:
        halved: called where it ran out.

    Raises:
        ConfigError: it runs out with one item, or in the middle of what all ranks do in step.
    """
    try:
        return work(items)
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        if not _is_out_of_memory(error):
            raise
        if model.in_step or len(items) == 1:
            raise ConfigError(
                "memory ran out while answering",
                got=f"{len(items)} at once on rank {model.ranks.rank}",
                do="write a smaller evaluation.batch_size or max_new_tokens",
            ) from error
    # Outside of the handler, which would keep the tensors of the failed try alive.
    if model.ranks.device.type == "cuda":
        torch.cuda.empty_cache()
    halved()
    parts = (items[: len(items) // 2], items[len(items) // 2 :])
    return [result for part in parts for result in in_halves(work, part, model=model, halved=halved)]


def _is_out_of_memory(error: BaseException) -> bool:
    named = isinstance(error, torch.OutOfMemoryError | MemoryError)
    return named or any(words in str(error) for words in _OUT_OF_MEMORY)


def free_bytes(device: torch.device, *, sharers: int) -> int:
    """Memory that this process may still take.

    Args:
        sharers: processes of this host that share its memory, where the device is the host.
    """
    if device.type == "cuda":
        free: int = torch.cuda.mem_get_info(device)[0]
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    with Path("/proc/meminfo").open() as lines:
        available = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    return available // sharers


def can_allocate(size: int, device: torch.device) -> bool:
    """Whether so many bytes can be had at once; they are given back."""
    try:
        torch.empty(size, dtype=torch.uint8, device=device)
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        if not _is_out_of_memory(error):
            raise
        return False
    return True


def bytes_per_row(model: PreTrainedModel, *, positions: int, new_tokens: int, logits: int = 1) -> int:
    """An estimate from above of what one row takes: cache, activations of the widest layer, logits, mask.

    Args:
        positions: of the prompt. new_tokens: that may follow. logits: positions whose logits are kept at once.
    """
    config: Any = model.config.get_text_config()
    itemsize = next(model.parameters()).element_size()
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    cached = 2 * config.num_hidden_layers * (getattr(config, "num_key_value_heads", None) or heads) * head_dim
    widest = 6 * config.hidden_size + 4 * (getattr(config, "intermediate_size", None) or 4 * config.hidden_size)
    total = positions + new_tokens
    # Logits in the model's dtype, in float32, and their softmax; the mask as booleans and as numbers.
    size: int = (
        itemsize * (cached * total + widest * positions)
        + logits * config.vocab_size * (itemsize + 3 * 4)
        + positions * total * (1 + itemsize)
    )
    return size
