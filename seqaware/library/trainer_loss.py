"""The objective for Hugging Face's Trainer and what is built on it: a `compute_loss_func` that is exact, or refuses.

The Trainer counts the labels of a whole optimizer step, of all its micro-batches on all ranks, hands the count to the
loss, and multiplies by the number of ranks, which the average over ranks divides by again. So

    loss = Σ w·l / num_items_in_batch

summed over micro-batches and ranks is the objective with `normalize_by: tokens`. Σ w and the number of sequences of the
step it does not know: the other two normalisers cannot be exact there, and are not offered.
"""

from __future__ import annotations

import importlib.metadata
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from seqaware.errors import ConfigError
from seqaware.library.targets import NO_LABEL, Positions, Targets, targets_of
from seqaware.objective.cross_entropy import cross_entropy_from_logits
from seqaware.objective.weighting import Weighting

if TYPE_CHECKING:
    from transformers import PreTrainedModel, TrainingArguments

# Whether the first column's labels are in the Trainer's count was looked up, and tested, from this release on.
_COUNTS_SHIFTED = (5, 23)
# Where documents of a flattened row begin, as some collators tell attention alone.
_BORDERS = ("cu_seq_lens_q", "cu_seqlens", "seq_idx")


class TrainerLoss:
    """`Trainer(model, args, …, compute_loss_func=TrainerLoss(model, args, weighting=Weighting(gamma=0.98)))`.

    A `compute_loss_func` sees logits and labels, not where documents begin. So this one looks at what the model is
    called with, by a hook on its forward.

    Args:
        model: the one the Trainer gets. args: the Trainer's.
        positions: what k counts: supervised tokens, or every predicted token. Turns cannot be told from labels.

    Raises:
        ConfigError: settings under which the loss of a step would depend on the number of ranks, or not be this one.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        args: TrainingArguments,
        *,
        weighting: Weighting,
        positions: Positions = "supervised",
    ) -> None:
        if positions not in ("supervised", "sequence"):
            raise ConfigError(
                "TrainerLoss counts positions: supervised or sequence; where a turn begins, labels do not say",
                got=positions,
            )
        _check_arguments(args)
        _check_loss_type(model)
        self._model_config = model.config
        self._weighting, self._positions = weighting, positions
        self._call: dict[str, Any] | None = None
        model.register_forward_pre_hook(self._look, with_kwargs=True)

    def __call__(self, outputs: Any, labels: Tensor | None, num_items_in_batch: Tensor | int | None = None) -> Tensor:
        """Σ w·l of a micro-batch over the labels of the whole step: 0-d, float32 or float64.

        Raises:
            ConfigError, DataError: what was passed does not allow an exact loss.
        """
        call, self._call = self._call, None
        if labels is None or num_items_in_batch is None:
            raise ConfigError("TrainerLoss needs labels, and the Trainer's count of them", got="no labels in the batch")
        if call is None:
            raise ConfigError(
                "the model that TrainerLoss was made for was not called", do="pass it the Trainer's model"
            )
        if call.get("position_ids") is None and any(key in call for key in _BORDERS):
            raise ConfigError(
                "documents of one row are told apart by position_ids, and there are none",
                do="let the collator return them (DataCollatorWithFlattening(return_position_ids=True))",
            )
        targets = targets_of(
            labels,
            position_ids=call.get("position_ids"),
            attention_mask=call.get("attention_mask"),
            positions=self._positions,
        )
        self._check_rows(call, targets, labels)
        logits = _logits(outputs, labels)
        weights = self._weighting.weights(targets.k, targets.length, targets.sequence_offsets)
        loss_sum, _ = cross_entropy_from_logits(logits.flatten(0, 1), targets.labels.flatten(), weights.flatten())
        return loss_sum / num_items_in_batch

    def _look(self, _model: Any, _args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._call = kwargs

    def _check_rows(self, call: dict[str, Any], targets: Targets, labels: Tensor) -> None:
        if _version() < _COUNTS_SHIFTED and bool((labels[:, 0] != NO_LABEL).any()):
            raise ConfigError(
                "the first column has labels, which this release of transformers may count",
                got=f"transformers {importlib.metadata.version('transformers')}",
                do="write -100 there, or install 5.23 or newer",
            )
        if not targets.packed:
            return
        # Several documents in a row. They must not see each other, and transformers sees to it only so.
        text = self._model_config.get_text_config()
        flash = "flash" in str(getattr(self._model_config, "_attn_implementation", ""))
        if call.get("attention_mask") is not None:
            raise ConfigError(
                "documents of a packed row see each other where there is an attention_mask", do="pass none"
            )
        if not flash and call.get("use_cache", getattr(text, "use_cache", False)):
            raise ConfigError(
                "documents of a packed row see each other while the model makes a cache",
                do="set model.config.use_cache = False",
            )
        if flash and len(labels) > 1:
            raise ConfigError(
                "FlashAttention tells the documents of one packed row apart, not of several",
                got=f"{len(labels)} rows",
                do="flatten them into one, as DataCollatorWithFlattening does",
            )


def _logits(outputs: Any, labels: Tensor) -> Tensor:
    logits = outputs["logits"] if isinstance(outputs, dict) else getattr(outputs, "logits", None)
    if not isinstance(logits, torch.Tensor) or logits.shape[:2] != labels.shape:
        found = tuple(logits.shape) if isinstance(logits, torch.Tensor) else "none"
        raise ConfigError(
            "TrainerLoss needs the logits of every token",
            got=f"logits {found}, labels {tuple(labels.shape)}",
            do="no fused loss kernel, no logits_to_keep, no prompt of virtual tokens, no nn.DataParallel",
        )
    return logits


def _check_arguments(args: TrainingArguments) -> None:
    if args.n_gpu > 1:
        raise ConfigError(
            "nn.DataParallel hides the batch from the loss", got=f"{args.n_gpu} GPUs in one process", do="use torchrun"
        )
    if args.world_size > 1 and not args.average_tokens_across_devices:
        raise ConfigError(
            "each rank would divide by its own labels, so that the loss depends on the ranks",
            do="leave TrainingArguments.average_tokens_across_devices at True",
        )
    if args.label_smoothing_factor:
        raise ConfigError("label smoothing is not part of this loss", got=args.label_smoothing_factor, do="set it to 0")
    if args.use_liger_kernel:
        raise ConfigError("Liger's fused loss leaves no logits", do="set TrainingArguments.use_liger_kernel = False")


def _check_loss_type(model: PreTrainedModel) -> None:
    """The Trainer counts shifted labels, as the loss has them, for causal language models alone."""
    from transformers.loss.loss_utils import LOSS_MAPPING, ForCausalLMLoss

    unwrap: Any = getattr(model, "get_base_model", None)  # of an adapter's model
    inner: Any = unwrap() if unwrap else model
    if LOSS_MAPPING.get(inner.loss_type) is not ForCausalLMLoss or inner.config.is_encoder_decoder:
        raise ConfigError("TrainerLoss is for causal language models", got=type(inner).__name__)


def _version() -> tuple[int, int]:
    major, minor = importlib.metadata.version("transformers").split(".")[:2]
    return int(major), int(minor)
