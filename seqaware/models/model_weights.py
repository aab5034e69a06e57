"""Check that a checkpoint holds the weights of its model; draw those that are meant to be new.

transformers draws a weight that a checkpoint lacks at random and logs a table. Under ZeRO-3 it reports neither
unexpected names nor other shapes (5.23: `_load_pretrained_model`). So transformers' own loading runs first on the meta
device, with the shapes in the files' headers: the verdict is the same on every topology, and precedes all reading.
"""

from __future__ import annotations

import copy
import difflib
import hashlib
import pickle
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_utils import load_state_dict
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, WEIGHTS_INDEX_NAME, WEIGHTS_NAME
from transformers.utils import logging as transformers_logging
from transformers.utils.hub import cached_file, get_checkpoint_shard_files

from seqaware.errors import ConfigError

_LISTED = 24
_WRAPPERS = {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


@dataclass(frozen=True)
class WeightDifferences:
    """What sets the weights of a checkpoint apart from those of a model.

    Attributes:
        missing, unexpected: names by the model and by the checkpoint. mismatched: name, its shapes in both.
    """

    missing: frozenset[str]
    unexpected: frozenset[str]
    mismatched: tuple[tuple[str, tuple[int, ...], tuple[int, ...]], ...] = ()

    @classmethod
    def of(cls, loading_info: Mapping[str, Any]) -> WeightDifferences:
        """From what `from_pretrained(output_loading_info=True)` reports."""
        shapes = sorted((name, tuple(own), tuple(model)) for name, own, model in loading_info["mismatched_keys"])
        missing, unexpected = loading_info["missing_keys"], loading_info["unexpected_keys"]
        return cls(frozenset(missing), frozenset(unexpected), tuple(shapes))

    def refuse(self, source: str, *, allow_missing: Sequence[str] = ()) -> tuple[str, ...]:
        """Raise unless all that is missing is allowed to be; returns the names of what is.

        Raises:
            ConfigError: a weight is missing, unexpected, or has another shape.
        """
        new = {name for name in self.missing if is_allowed(name, allow_missing)}
        missing = self.missing - new
        prefix = _differing_prefix(missing, self.unexpected)
        if prefix is not None:
            raise ConfigError(
                "the checkpoint's weights have other names than the model's, which differ only by a prefix",
                got=f"{source}: {prefix}",
                do="write the weights again under the model's names (safetensors.torch.load_file and save_file)",
            )
        found = [
            f"{len(names)} {kind}: {_shortened(names)}"
            for kind, names in (("missing", missing), ("unexpected", self.unexpected))
            if names
        ]
        if self.mismatched:
            shapes = [f"{name} {_shape(own)} for {_shape(model)}" for name, own, model in self.mismatched]
            found.append(f"{len(shapes)} of another shape: {_shortened(shapes)}")
        if found:
            do = "complete the checkpoint or correct its config.json"
            if missing:
                do += "; a weight that is meant to be new is allowed by model.allow_missing"
            raise ConfigError(
                "the checkpoint does not hold the weights of its model", got=f"{source}: {'; '.join(found)}", do=do
            )
        return tuple(sorted(new))


def check_weights(
    source: str, empty: PreTrainedModel, *, revision: str | None = None, allow_missing: Sequence[str] = ()
) -> tuple[str, ...]:
    """Refuse a checkpoint that does not hold the weights of its model; returns the names of those that will be new.

    A checkpoint that is already quantized is not checked here: its names are those of the quantized model, and
    transformers reports all differences when it loads that one.

    Args:
        source: a local folder or hub id. empty: its model on the meta device.
        allow_missing: patterns of weights that the checkpoint may lack.

    Raises:
        ConfigError: a weight is missing, unexpected or of another shape, or a file cannot be read.
    """
    if getattr(empty.config, "quantization_config", None) is not None:
        return ()
    names = empty.state_dict().keys()
    for pattern in allow_missing:
        if not any(is_allowed(name, [pattern]) for name in names):
            near = difflib.get_close_matches(pattern, names, n=1, cutoff=0.0)
            raise ConfigError(
                "model.allow_missing matches no weight of this model", got=pattern, do=f"the nearest is {near[0]}"
            )
    with weights_read_from(source):
        headers: dict[str, Tensor] = {}
        files: dict[str, str] = {}
        for file in _weight_files(source, empty, revision):
            header = load_state_dict(file, map_location="meta")
            headers |= header
            files |= dict.fromkeys(header, file)
        new = _differences(source, empty, headers).refuse(source, allow_missing=allow_missing)
        _check_tied(source, empty, files)
    return new


def is_allowed(name: str, patterns: Iterable[str]) -> bool:
    """Whether a pattern with * is the name of this weight or of a module that holds it."""
    return any(fnmatchcase(name, pattern) or fnmatchcase(name, f"{pattern}.*") for pattern in patterns)


@contextmanager
def weights_read_from(source: str) -> Iterator[None]:
    """Turn what libraries raise while they read a model's files into a ConfigError."""
    try:
        yield
    except pickle.UnpicklingError as error:
        raise ConfigError(
            "the model's weights are a pickle that asks for more than tensors, and was not opened",
            got=source,
            do="do not use this model unless you know who made it; name one with *.safetensors",
        ) from error
    except (OSError, ValueError, SafetensorError) as error:
        first_line = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise ConfigError("the model cannot be loaded", got=f"{source}: {first_line}") from error


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Keep transformers' warnings back, where our own error or line reports the same."""
    level = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)


@torch.no_grad()
def draw_new_weights(model: PreTrainedModel, names: Sequence[str], *, like: PreTrainedModel, seed: int) -> None:
    """Set weights to values that depend on the seed and their name alone. Collective where ZeRO-3 has sharded them.

    The distribution is the one that transformers gives such a module; its values are drawn in float32 on the CPU.

    Args:
        like: the same model on the meta device, with the whole shapes.

    Raises:
        ConfigError: transformers defines no initial value for one of them.
    """
    if not names:
        return
    import deepspeed

    done: set[int] = set()
    for name in names:
        parameter = model.get_parameter(name)
        if id(parameter) in done:
            continue  # tied to one that has its value
        done.add(id(parameter))
        value = _drawn(like, name, seed)
        with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0, enabled=hasattr(parameter, "ds_id")):
            parameter.data.copy_(value)


def _drawn(like: PreTrainedModel, name: str, seed: int) -> Tensor:
    owner, _, leaf = name.rpartition(".")
    module: nn.Module = copy.deepcopy(like.get_submodule(owner)).float().to_empty(device="cpu")
    value: Tensor = getattr(module, leaf)
    value.fill_(torch.nan)
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int.from_bytes(digest[:8], "big") >> 1)
        like._init_weights(module)
    if value.isnan().any():
        raise ConfigError(
            "model.allow_missing: transformers defines no initial value for this weight",
            got=name,
            do="write it into the checkpoint",
        )
    return value


def _differences(source: str, empty: PreTrainedModel, headers: Mapping[str, Tensor]) -> WeightDifferences:
    """What transformers finds when it loads tensors of these names and shapes, on the meta device."""
    kind: Any = type(empty)
    with quiet_transformers():
        try:
            _, info = kind.from_pretrained(
                None,
                config=empty.config,
                state_dict=dict(headers),
                device_map="meta",
                attn_implementation=empty.config._attn_implementation,
                ignore_mismatched_sizes=True,
                output_loading_info=True,
                local_files_only=True,
            )
        except RuntimeError as error:  # weights that are stored apart, such as experts, make no whole one
            gaps = frozenset(_gaps(headers))
            if not gaps:
                first_line = str(error).strip().splitlines()[0]
                raise ConfigError(
                    "the checkpoint does not hold the weights of its model", got=f"{source}: {first_line}"
                ) from error
            return WeightDifferences(gaps, frozenset())
    # transformers removes a second base prefix (model.model.…) by itself, but not under ZeRO-3.
    doubled = _with_doubled_prefix(headers, empty)
    found = WeightDifferences.of(info)
    return WeightDifferences(found.missing | set(doubled), found.unexpected | set(doubled.values()), found.mismatched)


def _with_doubled_prefix(headers: Iterable[str], empty: PreTrainedModel) -> dict[str, str]:
    names, prefix = empty.state_dict().keys(), f"{empty.base_model_prefix}."
    found = {name.removeprefix(prefix): name for name in headers if name not in names and name.startswith(prefix)}
    return {bare: name for bare, name in found.items() if bare in names}


def _weight_files(source: str, empty: PreTrainedModel, revision: str | None) -> list[str]:
    """The files that transformers loads, in its own order of preference; fetched from the hub if they are not here."""
    explicit = getattr(empty.config, "transformers_weights", None)
    usual = (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME, WEIGHTS_NAME, WEIGHTS_INDEX_NAME)
    for name in [explicit] if explicit else usual:
        found = cached_file(source, name, revision=revision, _raise_exceptions_for_missing_entries=False)
        if found is None:
            continue
        if not name.endswith(".index.json"):
            return [found]
        files: list[str] = sorted(set(get_checkpoint_shard_files(source, found, revision=revision)[0]))
        lost = [Path(file).name for file in files if not Path(file).is_file()]
        if lost:
            raise ConfigError(
                f"the model's {name} names files that are not there", got=f"{source}: {', '.join(lost)}", do="copy them"
            )
        return files
    raise ConfigError("the model has no weights that transformers reads", got=f"{source}, without {', '.join(usual)}")


def _check_tied(source: str, empty: PreTrainedModel, files: Mapping[str, str]) -> None:
    """Refuse two weights that the config ties and the checkpoint holds apart: only ZeRO-3 would tie them."""
    for pair in empty.all_tied_weights_keys.items():
        stored = [name if name in files else name.removeprefix(f"{empty.base_model_prefix}.") for name in pair]
        if all(name in files for name in stored):
            first, second = (load_state_dict(files[name])[name] for name in stored)
            if not torch.equal(first, second):
                raise ConfigError(
                    "the config ties two weights that differ in the checkpoint",
                    got=f"{source}: {stored[0]} and {stored[1]}",
                    do="write tie_word_embeddings: false into its config.json, or remove the one that is wrong",
                )


def _gaps(names: Iterable[str]) -> Iterator[str]:
    """Names that are not there although their neighbors are, such as one matrix of one expert."""
    numbers: dict[str, set[tuple[str, ...]]] = defaultdict(set)
    for name in names:
        numbers[_NUMBER.sub("*", name)].add(tuple(_NUMBER.findall(name)))
    siblings: dict[str, set[tuple[str, ...]]] = defaultdict(set)
    for pattern, own in numbers.items():
        siblings[pattern.rpartition("*")[0]] |= own
    for pattern, own in numbers.items():
        for indices in siblings[pattern.rpartition("*")[0]] - own:
            yield pattern.replace("*", "{}").format(*indices)


def _differing_prefix(missing: Iterable[str], unexpected: Iterable[str]) -> str | None:
    """How the names differ, if most of what is missing is there under another name."""
    missing = set(missing)
    endings: dict[str, str] = {}
    for name in unexpected:
        segments = [each for each in name.split(".") if each not in _WRAPPERS]
        endings |= {".".join(segments[begin:]): name for begin in range(len(segments))}
    found: Counter[str] = Counter()
    for name in missing:
        theirs = endings.get(name)
        if theirs is None:
            tail = next((tail for tail in _tails(name) if endings.get(tail) == tail), None)
            if tail is not None:
                found[f"they lack the model's prefix {name.removesuffix(tail)!r}"] += 1
        elif theirs.endswith(f".{name}"):
            found[f"they have the prefix {theirs.removesuffix(name)!r}"] += 1
        else:
            wrappers = ", ".join(sorted(_WRAPPERS & set(theirs.split("."))))
            found[f"they have {wrappers} inside, as in {theirs}"] += 1
    if not found or 2 * found.total() <= len(missing):
        return None
    (told, count), *_ = found.most_common(1)
    return f"{told} ({count} names)"


def _tails(name: str) -> Iterator[str]:
    while "." in name:
        name = name.partition(".")[2]
        if "." in name:  # `weight` alone is no name
            yield name


def _shape(sizes: tuple[int, ...]) -> str:
    return f"[{', '.join(map(str, sizes))}]"


def _shortened(names: Iterable[str]) -> str:
    """The names, those of several layers in one: layers.{2-31}.mlp.up_proj.weight."""
    layers: dict[tuple[str, str], list[int]] = {}
    for name in sorted(names):
        number = _NUMBER.search(name)
        key = (name, "") if number is None else (name[: number.start()], name[number.end() :])
        layers.setdefault(key, []).extend([] if number is None else [int(number.group())])
    lines = [f"{head}{_ranges(sorted(found))}{tail}" for (head, tail), found in layers.items()]
    rest = len(lines) - _LISTED
    return ", ".join(lines[:_LISTED]) + (f" and {rest} more" if rest > 0 else "")


def _ranges(numbers: Sequence[int]) -> str:
    if len(numbers) < 2:
        return "".join(map(str, numbers))
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return "{" + ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs) + "}"
