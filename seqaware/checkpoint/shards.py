"""The trained parameters of a checkpoint, cut out of its files wherever they lie: any number of ranks, any ZeRO stage.

Every stage keeps the float32 weights and each of the optimizer's tensors as flat vectors, and a parameter's elements,
in row-major order, lie in pieces of them:

    ZeRO-0      each parameter whole, in the one file
    ZeRO-1, 2   a group's parameters one after the other, the row of all cut into R equal parts, one a rank
    ZeRO-3      each parameter cut into R parts of ceil(numel / R), and a rank's parts one after the other
    universal   each parameter whole, in a folder of its own (DeepSpeed's universal checkpoint)

Files are mapped, not read: only the pages that are asked for come into memory.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from seqaware.checkpoint.tensor_files import as_written, read_tensors
from seqaware.errors import CheckpointError

FP32 = "fp32"
UNIVERSAL = "zero"
_MUON = "momentum_buffer"
_OPTIMIZER = re.compile(r"(?:bf16_)?zero_pp_rank_(\d+)_mp_rank_00_optim_states\.pt")
_MODEL = ("mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_model_states.pt")


@dataclass(frozen=True)
class _Piece:
    """Elements [start, stop) of a parameter, from `offset` on in each vector: FP32 and the optimizer's by its names."""

    start: int
    stop: int
    offset: int
    vectors: Mapping[str, Tensor]


@dataclass
class _Parameter:
    shape: torch.Size
    pieces: list[_Piece] = field(default_factory=list)
    scalars: dict[str, Any] = field(default_factory=dict)


class Shards:
    """Reads a checkpoint's trained parameters by name. Needs neither ranks nor an engine.

    Attributes:
        model: the content of the (first rank's) file of model states: counters, buffers, at ZeRO-0 to 2 the weights.
        loss_scaler: DeepSpeed's, or None where there is none. groups: the optimizer's groups of hyperparameters.

    Raises:
        CheckpointError: a file is missing, would run code, or is not what DeepSpeed writes.
    """

    def __init__(self, checkpoint: Path) -> None:
        self.checkpoint = checkpoint
        path = next((checkpoint / name for name in _MODEL if (checkpoint / name).exists()), None)
        if path is None:
            raise CheckpointError("the checkpoint has no file of model states", got=str(checkpoint))
        self.model = read_tensors(path)
        self.loss_scaler: Any = None
        self.groups: list[dict[str, Any]] = []
        self._parameters: dict[str, _Parameter] = {}
        self._uncut: str | None = None
        with as_written(checkpoint):
            self._open()
            self._check_pieces()

    @property
    def shapes(self) -> dict[str, torch.Size]:
        """Every trained parameter's shape, by the name that it has in DeepSpeed's engine."""
        return {name: parameter.shape for name, parameter in self._parameters.items()}

    def check(self, expected: Mapping[str, torch.Size]) -> None:
        """Refuse a checkpoint of another model.

        Args:
            expected: the shapes of the model's trained parameters, by the names that they have here.

        Raises:
            CheckpointError: which ones differ.
        """
        found = self.shapes
        odd = sorted(name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name))
        if odd:
            shown = [f"{name}: {_said(found.get(name))} there, {_said(expected.get(name))} here" for name in odd[:3]]
            raise CheckpointError(
                "the checkpoint's parameters are not those of this model",
                got=f"{self.checkpoint}: {len(odd)} differ: {'; '.join(shown)}",
                do="take the model and the run that it was saved with",
            )

    def keys(self, name: str) -> list[str]:
        """FP32 and the names of the optimizer's tensors for a parameter.

        Raises:
            CheckpointError: they cannot be cut for another topology. The weights can be read all the same.
        """
        if self._uncut is not None:
            raise CheckpointError(
                "this optimizer's state cannot be cut for another topology",
                got=f"{self.checkpoint}: {self._uncut}",
                do="export its weights (seqaware export), or resume on the ranks and the ZeRO stage that wrote it",
            )
        return list(self._parameters[name].pieces[0].vectors)

    def scalars(self, name: str) -> dict[str, Any]:
        """What the optimizer keeps beside its tensors for a parameter: the number of its steps, 0-d or a number."""
        return dict(self._parameters[name].scalars)

    def read(self, name: str, key: str, *, start: int = 0, stop: int | None = None) -> Tensor:
        """Elements [start, stop) of a parameter's float32 weight (FP32) or of one of the optimizer's tensors: flat.

        Raises:
            CheckpointError: the files do not hold all of them.
        """
        parameter = self._parameters[name]
        stop = parameter.shape.numel() if stop is None else stop
        if start == stop:
            return torch.empty(0)
        parts = [(max(start, piece.start), min(stop, piece.stop), piece) for piece in parameter.pieces]
        parts = [(low, high, piece) for low, high, piece in parts if low < high]
        missing = stop - start - sum(high - low for low, high, _ in parts)
        if missing:
            raise CheckpointError(
                "the checkpoint does not hold the whole of a parameter",
                got=f"{self.checkpoint}: {name} ({key}) lacks {missing:,} of {stop - start:,} elements",
            )
        with as_written(self.checkpoint):
            values = parts[0][2].vectors[key].new_empty(stop - start)
            for low, high, piece in parts:
                at = piece.offset - piece.start
                values[low - start : high - start].copy_(piece.vectors[key][at + low : at + high])
        return values

    def buffers(self) -> dict[str, Tensor]:
        """The model's buffers that are kept in checkpoints."""
        with as_written(self.checkpoint):
            module = self.model["module"]
            return {name: module[name] for name in self.model.get("buffer_names") or () if name in module}

    def _open(self) -> None:
        if (self.checkpoint / UNIVERSAL).is_dir():
            self._open_universal()
        elif files := _optimizer_files(self.checkpoint):
            self._open_partitions(files)
        else:
            self._open_whole()

    def _check_pieces(self) -> None:
        """Every parameter has pieces, which lie in their vectors of one dimension: nothing is read from beside them.

        Raises:
            ValueError: one does not.
        """
        for name, parameter in self._parameters.items():
            if not parameter.pieces:
                raise ValueError(f"no file holds a piece of {name}")
            if any(isinstance(value, dict | list | tuple | str) for value in parameter.scalars.values()):
                raise ValueError(f"the optimizer's state of {name} holds more than numbers")
            for piece in parameter.pieces:
                end = piece.offset + piece.stop - piece.start
                sizes = {vector.numel() for vector in piece.vectors.values()}
                fits = len(sizes) == 1 and end <= min(sizes) and all(v.dim() == 1 for v in piece.vectors.values())
                if piece.offset < 0 or not 0 <= piece.start <= piece.stop or not fits:
                    raise ValueError(f"a piece of {name} does not lie in its vector")

    def _open_partitions(self, files: list[Path]) -> None:
        contents = [read_tensors(path)["optimizer_state_dict"] for path in files]
        self.loss_scaler = contents[0].get("loss_scaler")
        self.groups = contents[0].get("base_optimizer_state", contents[0].get("optimizer_state_dict"))["param_groups"]
        shapes = self.model["param_shapes"]
        for group in shapes:
            self._parameters |= {name: _Parameter(torch.Size(shape)) for name, shape in group.items()}
        ranks = contents[0]["partition_count"]
        expected = ranks if isinstance(ranks, int) else max(ranks)
        if len(files) != expected:
            raise CheckpointError(
                "the checkpoint lacks files of ranks", got=f"{self.checkpoint}: {len(files)} of {expected}"
            )
        for rank, content in enumerate(contents):
            if "fp32_flat_groups" in content:
                self._add_parts_of_each(content, [list(group) for group in shapes], rank=rank, ranks=expected)
            else:
                self._add_parts_of_row(content)

    def _add_parts_of_row(self, content: Mapping[str, Any]) -> None:
        """ZeRO-1 and 2: a parameter goes on in the next rank's part where this one ends."""
        groups = content["single_partition_of_fp32_groups"]
        for index, (flat, mapping) in enumerate(zip(groups, content["param_slice_mappings"], strict=True)):
            padding = content["group_paddings"][index]
            vectors, scalars = self._split(flat, content["base_optimizer_state"], index, padding=padding)
            for name, address in mapping.items():
                parameter = self._parameters[name]
                start = parameter.pieces[-1].stop if parameter.pieces else 0
                parameter.pieces.append(_Piece(start, start + address.numel, address.start, vectors))
                parameter.scalars |= scalars

    def _add_parts_of_each(self, content: Mapping[str, Any], groups: list[list[str]], *, rank: int, ranks: int) -> None:
        """ZeRO-3: parts of equal size, the last ones filled up."""
        for index, (flat, names) in enumerate(zip(content["fp32_flat_groups"], groups, strict=True)):
            vectors, scalars = self._split(flat, content["optimizer_state_dict"], index)
            offset = 0
            for name in names:
                parameter = self._parameters[name]
                numel = parameter.shape.numel()
                part = math.ceil(numel / ranks)
                start = min(rank * part, numel)
                parameter.pieces.append(_Piece(start, min(start + part, numel), offset, vectors))
                parameter.scalars |= scalars
                offset += part

    def _open_whole(self) -> None:
        optimizer = self.model["optimizer"]
        self.groups = optimizer["param_groups"]
        weights = dict(_own_weights(self.model))
        # Groups come in the order of `parameter_groups`: matrices first, then what has one dimension.
        names = [name for name, w in weights.items() if w.dim() >= 2] + [n for n, w in weights.items() if w.dim() < 2]
        indices = [index for group in optimizer["param_groups"] for index in group["params"]]
        if len(names) != len(indices):
            raise CheckpointError(
                "the checkpoint's optimizer and model have different parameters",
                got=f"{self.checkpoint}: {len(indices)} and {len(names)}",
            )
        for name, index in zip(names, indices, strict=True):
            flat = weights[name].reshape(-1)
            vectors, scalars = self._split(flat, optimizer, index)
            self._parameters[name] = _Parameter(weights[name].shape, [_Piece(0, flat.numel(), 0, vectors)], scalars)

    def _split(
        self, flat: Tensor, optimizer: Mapping[str, Any], index: int, *, padding: int = 0
    ) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The vectors beside `flat` in an optimizer's state, and its scalars.

        Args:
            padding: elements at the end of this rank's part that belong to no parameter. At ZeRO-1 and 2 DeepSpeed cuts
                them off the weights but not off the optimizer's vectors; a rank may own nothing else.
        """
        vectors, scalars = {FP32: flat}, {}
        for key, value in optimizer["state"].get(index, {}).items():
            if key == _MUON:
                self._uncut = "of Muon's momentum each rank keeps whole matrices, in an order of its own"
            elif not isinstance(value, Tensor) or value.dim() == 0:
                scalars[key] = value
            elif value.numel() in (flat.numel(), flat.numel() + padding):
                vectors[key] = value.reshape(-1)[: flat.numel()]
            else:
                self._uncut = f"{key} has {value.numel():,} elements beside {flat.numel():,} weights"
        groups = optimizer["param_groups"]
        if "step" in groups[0]:  # some optimizers count for all
            scalars.setdefault("step", groups[0]["step"])
        return vectors, scalars

    def _open_universal(self) -> None:
        common = read_tensors(self.checkpoint / UNIVERSAL / "optimizer_state.pt")
        self.loss_scaler, self.groups = common["loss_scaler"], common["param_groups"]
        scalars = common["optimizer_state_dict"]["state"][0]
        for folder in sorted(path for path in (self.checkpoint / UNIVERSAL).iterdir() if path.is_dir()):
            files = [path for path in folder.glob("*.pt") if path.stem != "step"]
            whole = {path.stem: read_tensors(path)["param"] for path in files}
            vectors = {key: tensor.reshape(-1) for key, tensor in whole.items()}
            shape = whole[FP32].shape
            self._parameters[folder.name] = _Parameter(shape, [_Piece(0, shape.numel(), 0, vectors)], dict(scalars))


def _optimizer_files(checkpoint: Path) -> list[Path]:
    """The ranks' files of optimizer states, by rank."""
    found = {int(match[1]): path for path in checkpoint.iterdir() if (match := _OPTIMIZER.fullmatch(path.name))}
    return [found[rank] for rank in sorted(found)]


def _said(shape: torch.Size | None) -> str:
    return "nothing" if shape is None else "×".join(map(str, shape))


def _own_weights(model: Mapping[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """Weights in the order of the model; one that two modules share comes once, under its first name."""
    buffers, seen = set(model.get("buffer_names") or ()), set()
    for name, weight in model["module"].items():
        place = (weight.untyped_storage().data_ptr(), weight.storage_offset(), weight.numel())
        if name not in buffers and place not in seen:
            seen.add(place)
            yield name, weight
