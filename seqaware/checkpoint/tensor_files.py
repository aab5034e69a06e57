"""Reading the files of a checkpoint: tensors, numbers and the few of DeepSpeed's classes that lie there, nothing else.

A pickle may name any function to be called while it is read. torch's restricted unpickler calls none but those listed
here, so that a checkpoint from elsewhere cannot do anything.
"""

from __future__ import annotations

import pickle
import struct
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from seqaware.errors import CheckpointError

# A tensor takes about 200 bytes of the pickle, and a few values of its table.
_PICKLE_BYTES = 64 * 2**20
_MOST_VALUES = 2_000_000
_MOST_LEVELS = 32
# What torch's and DeepSpeed's readers raise at a file that is not what they have written: they check little.
_UNEXPECTED = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    EOFError,
    LookupError,
    MemoryError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
    struct.error,
    zipfile.BadZipFile,
)


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
        _check_archive(path)
        with torch.serialization.safe_globals(allowed_classes()):
            content: Any = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            "a file of the checkpoint holds more than data", got=f"{path}: {_reason(error)}"
        ) from error
    except _UNEXPECTED as error:
        raise CheckpointError("a file of the checkpoint cannot be read", got=f"{path}: {_reason(error)}") from error
    if not isinstance(content, dict):
        raise CheckpointError("a file of the checkpoint holds no table", got=f"{path}: a {type(content).__name__}")
    if (problem := _too_much(content)) is not None:
        raise CheckpointError("a file of the checkpoint cannot be used", got=f"{path}: {problem}")
    return content


@contextmanager
def as_written(checkpoint: Path) -> Iterator[None]:
    """Inside, the contents of a checkpoint's files are used; what is not as DeepSpeed writes it is a user error.

    Raises:
        CheckpointError: a value is missing, or of another kind.
    """
    try:
        yield
    except CheckpointError:
        raise
    except _UNEXPECTED as error:
        got = f"{checkpoint}: {type(error).__name__}: {_reason(error)}"
        raise CheckpointError("the checkpoint's files are not what DeepSpeed writes", got=got) from error


def _check_archive(path: Path) -> None:
    """torch.save stores without compression. A compressed pickle of 6 MB may expand to 6 GB.

    Raises:
        OSError, ValueError, BadZipFile: the file is no such archive.
    """
    if not path.is_file():
        raise FileNotFoundError("no such file")
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
        raise ValueError("a compressed archive, which torch.save does not write")
    if sum(entry.file_size for entry in entries) > path.stat().st_size:
        raise ValueError("an archive whose entries overlap")
    if any(entry.file_size > _PICKLE_BYTES for entry in entries if entry.filename.endswith(".pkl")):
        raise ValueError(f"a table of more than {_PICKLE_BYTES // 2**20} MiB")


def _too_much(content: Any) -> str | None:
    """Why a table would take unbounded time or memory to use; None where it does not.

    Values that are shared are counted wherever they occur, as those who copy the table copy them.
    """
    level, values = [content], 0
    for _ in range(_MOST_LEVELS):
        inner: list[Any] = []
        for each in level:
            if isinstance(each, torch.Tensor) and (problem := _too_large(each)) is not None:
                return problem
            inner.extend(_inside(each))
            if (values := values + 1) + len(inner) > _MOST_VALUES:
                return f"more than {_MOST_VALUES:,} values"
        if not inner:
            return None
        level = inner
    return f"more than {_MOST_LEVELS} levels"


def _inside(value: Any) -> Any:
    if isinstance(value, dict):
        return [*value.keys(), *value.values()]
    return value if isinstance(value, list | tuple | set | frozenset) else ()


def _too_large(tensor: torch.Tensor) -> str | None:
    if tensor.layout is not torch.strided or tensor.is_quantized:
        return f"a tensor of another layout: {tensor.layout}"
    if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        return f"a tensor of {tensor.numel():,} elements over a storage of {tensor.untyped_storage().nbytes():,} bytes"
    return None


def _reason(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    named = [line for line in lines if "GLOBAL" in line]
    return (named or lines or [type(error).__name__])[0]
