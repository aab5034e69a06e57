"""Reading the files of a checkpoint: tensors, numbers and the few of DeepSpeed's classes that lie there, nothing else.

A pickle may name any function to be called while it is read. torch's restricted unpickler calls none but those listed
here, so that a checkpoint from elsewhere cannot do anything.
"""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import torch

from seqaware.errors import CheckpointError


def allowed_classes() -> list[Any]:
    """DeepSpeed's classes that its own checkpoints hold: each is plain data."""
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    return [LossScaler, DynamicLossScaler, ZeroStageEnum, fragment_address]


def read_tensors(path: Path, *, mapped: bool = True) -> dict[str, Any]:
    """What a file that torch.save wrote holds, on the CPU.

    Args:
        mapped: tensors stay in the file until they are touched; False reads them all.

    Raises:
        CheckpointError: the file is missing or torn, or holds anything but data.
    """
    try:
        with torch.serialization.safe_globals(allowed_classes()):
            content: Any = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            "a file of the checkpoint holds more than data", got=f"{path}: {_reason(error)}"
        ) from error
    except (OSError, RuntimeError, EOFError, ValueError, KeyError) as error:
        raise CheckpointError("a file of the checkpoint cannot be read", got=f"{path}: {_reason(error)}") from error
    if not isinstance(content, dict):
        raise CheckpointError("a file of the checkpoint holds no table", got=f"{path}: a {type(content).__name__}")
    return content


def _reason(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    named = [line for line in lines if "GLOBAL" in line]
    return (named or lines or [type(error).__name__])[0]
