"""Hostile files of checkpoints, whose manifests are right: weights are read from them, or one error names the file."""

from __future__ import annotations

import hashlib
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from deepspeed.utils.tensor_fragment import fragment_address
from hypothesis import given
from hypothesis import strategies as st

import launcher.convert
import launcher.export
from seqaware.checkpoint.manifest import MANIFEST
from seqaware.checkpoint.shards import FP32, Shards
from seqaware.checkpoint.tensor_files import as_written, read_tensors
from seqaware.config.schema import Config
from seqaware.data.tokenization import load_tokenizer
from seqaware.engine.random_state import begin_randomness, random_state, restore_random_state
from seqaware.errors import CheckpointError
from seqaware.models.model import empty_causal_lm, initial_config
from tests.fakes import checkpoint_folder
from tests.fuzz import hostile
from tests.fuzz.bounds import ends_well, fuzzed, refuses_clearly
from tests.fuzz.test_config import DEMO

_SIZES = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
SMALL = hostile.mutated(
    DEMO, [(f"model.from_scratch.{name}", size) for name, size in {**_SIZES, "num_key_value_heads": 1}.items()]
)
Files = dict[str, Any]


def _moments(size: int) -> dict[str, Any]:
    return {"step": torch.tensor(3.0), "exp_avg": torch.zeros(size), "exp_avg_sq": torch.ones(size)}


def whole(weights: dict[str, torch.Tensor]) -> Files:
    """ZeRO-0: the weights and the optimizer in one file."""
    ordered = sorted(weights, key=lambda name: weights[name].dim() < 2)
    group = {"lr": 1e-3, "params": list(range(len(ordered)))}
    state = {index: _moments(weights[name].numel()) for index, name in enumerate(ordered)}
    model = {"module": weights, "buffer_names": [], "shared_params": {}, "ds_version": "0.19.8"}
    return {"mp_rank_00_model_states.pt": {**model, "optimizer": {"state": state, "param_groups": [group]}}}


def rows(weights: dict[str, torch.Tensor]) -> Files:
    """ZeRO-1 on two ranks: one row of all weights, cut in two."""
    row = torch.cat([each.reshape(-1) for each in weights.values()])
    half, files = (len(row) + 1) // 2, {}
    for rank in range(2):
        begin, end, place, slices = rank * half, min(len(row), (rank + 1) * half), 0, {}
        for name, each in weights.items():
            low, high = max(begin, place), min(end, place + each.numel())
            if low < high:
                slices[name] = fragment_address(high - low, low - begin)
            place += each.numel()
        optimizer = {"state": {0: _moments(end - begin)}, "param_groups": [{"lr": 1e-3, "params": [0]}]}
        content = {"base_optimizer_state": optimizer, "single_partition_of_fp32_groups": [row[begin:end].clone()]}
        content |= {
            "param_slice_mappings": [slices],
            "group_paddings": [0],
            "partition_count": [2],
            "loss_scaler": None,
        }
        files[f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"] = {"optimizer_state_dict": content}
    shapes = [{name: each.shape for name, each in weights.items()}]
    model = {"module": weights, "buffer_names": [], "shared_params": {}, "param_shapes": shapes, "ds_version": "0.19.8"}
    return {"mp_rank_00_model_states.pt": model, **files}


def parts(weights: dict[str, torch.Tensor]) -> Files:
    """ZeRO-3 on one rank."""
    row = torch.cat([each.reshape(-1) for each in weights.values()])
    optimizer = {"state": {0: _moments(len(row))}, "param_groups": [{"lr": 1e-3, "params": [0]}]}
    content = {"fp32_flat_groups": [row], "optimizer_state_dict": optimizer, "partition_count": 1, "loss_scaler": None}
    shapes = [{name: each.shape for name, each in weights.items()}]
    module = {name: torch.empty(0) for name in weights}
    model = {"module": module, "buffer_names": [], "shared_params": {}, "param_shapes": shapes, "ds_version": "0.19.8"}
    return {
        "zero_pp_rank_0_mp_rank_00_model_states.pt": model,
        "zero_pp_rank_0_mp_rank_00_optim_states.pt": {"optimizer_state_dict": content},
    }


def universal(weights: dict[str, torch.Tensor]) -> Files:
    """DeepSpeed's universal checkpoint."""
    common = {"loss_scaler": None, "param_groups": [{"lr": 1e-3}], "optimizer_state_dict": {"state": {0: {"step": 3}}}}
    files: Files = {"zero/optimizer_state.pt": common}
    for name, each in weights.items():
        for key in (FP32, "exp_avg", "exp_avg_sq"):
            files[f"zero/{name}/{key}.pt"] = {"param": each, "cat_dim": 0}
    model = {"module": weights, "buffer_names": [], "shared_params": {}, "ds_version": "0.19.8"}
    return {"mp_rank_00_model_states.pt": model, **files}


LAYOUTS = {"whole": whole, "rows": rows, "parts": parts, "universal": universal}


@pytest.fixture(scope="module")
def weights() -> dict[str, torch.Tensor]:
    """Those of a tiny Llama, by the names that they have in the engine."""
    config = Config.model_validate(SMALL)
    assert config.model.from_scratch is not None
    tokenizer = load_tokenizer(config.model)
    model = empty_causal_lm(initial_config(config.model.from_scratch, tokenizer), trust_remote_code=False)
    return {f"model.{name}": torch.ones(weight.shape) for name, weight in model.named_parameters()}


TENSORS: list[Callable[[], Any]] = [
    lambda: torch.zeros(0),
    lambda: torch.zeros(()),
    lambda: torch.zeros(3),
    lambda: torch.zeros(2, 3),
    lambda: torch.zeros(100_000),
    lambda: torch.zeros(1).expand(10**6),
    lambda: torch.full((8,), float("nan")),
    lambda: torch.arange(8),
    lambda: torch.zeros(8, dtype=torch.complex64),
    lambda: torch.zeros(8, dtype=torch.bool),
    lambda: torch.zeros(8, device="meta"),
    lambda: torch.zeros(4, 4).t(),
    lambda: torch.zeros(2, 2).to_sparse(),
    lambda: torch.nn.Parameter(torch.zeros(8)),
    lambda: torch.Size([2**40, 2**40]),
    lambda: torch.Size([2**31]),
    lambda: torch.Size([0]),
    lambda: fragment_address(-1, 0),
    lambda: fragment_address(5, -3),
    lambda: fragment_address(2**62, 2**62),
    lambda: fragment_address("x", None),
    lambda: {"param": 1},
    lambda: {0: {"step": "x"}},
    lambda: 2**63,
    lambda: (1, 2),
    lambda: {1, 2},
    lambda: b"x",
]
VALUES = st.sampled_from(TENSORS).map(lambda make: make()) | hostile.values


KEYS = ["../x", "/etc/x", "x" * 300, "a\0b", "", 5, None, "model.norm.weight", (1, 2), "\ud800", "\x1b[2J"]


def inner(value: Any) -> list[Any]:
    """The keys or places of a container."""
    return (
        list(value) if isinstance(value, dict) else list(range(len(value))) if isinstance(value, list | tuple) else []
    )


@st.composite
def changed(draw: st.DrawFn, content: Any) -> Any:
    """A copy with another value somewhere, or without it."""
    keys = inner(content)
    if not keys or not draw(st.integers(0, 5)):
        return draw(VALUES)
    key = draw(st.sampled_from(keys))
    copy: Any = dict(content) if isinstance(content, dict) else list(content)
    if not draw(st.integers(0, 7)):
        del copy[key]
    elif isinstance(copy, dict) and not draw(st.integers(0, 9)):
        copy[draw(st.sampled_from(KEYS))] = copy.pop(key)
    else:
        copy[key] = draw(changed(content[key]))
    return copy


def saved(path: Path, content: Any) -> bytes:
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(content, path)
    return path.read_bytes()


def read(checkpoint: Path) -> None:
    """All weights and states, as a resharding resume reads them."""
    shards = Shards(checkpoint)
    for name in shards.shapes:
        for key in shards.keys(name):
            shards.read(name, key)
        shards.scalars(name)
    shards.buffers()


def checkpoint_of(place: Path, files: Files) -> Path:
    """A run with a checkpoint of these files, whose manifest fits them."""
    run = place / "run"
    shutil.rmtree(run, ignore_errors=True)
    path = run / "checkpoints" / "step-00000003"
    path.mkdir(parents=True)
    (run / "config.yaml").write_text(yaml.safe_dump(Config.model_validate(SMALL).model_dump(mode="json")))
    for name, content in files.items():
        saved(path / name, content)
    return path


def sign(path: Path) -> None:
    files = {}
    for file in path.rglob("*.pt"):
        content = file.read_bytes()
        record = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        files[file.relative_to(path).as_posix()] = record
    checkpoint_folder(path, 3, files=files, mathematics={"model": {"dtype": "float32"}})


def use(place: Path, path: Path) -> bool:
    """Whether the weights can be read; and what the commands make of them."""
    sign(path)
    made = [place / "converted", place / "exported"]
    for folder in made:
        shutil.rmtree(folder, ignore_errors=True)
    readable = refuses_clearly(lambda: read(path))
    ends_well(launcher.convert.app, [str(path), str(made[0])])
    ends_well(launcher.export.app, [str(path), str(made[1])])
    return readable and (made[0] / MANIFEST).is_file() and (made[1] / "config.json").is_file()


def restore(path: Path) -> None:
    """Random states as a resume on the same ranks reads them, and the next draws."""
    state = read_tensors(path)
    with as_written(path):
        restore_random_state(state)
    torch.rand(700), random.random(), random.gauss(0, 1), np.random.random(700), np.random.normal()


@pytest.fixture
def generators() -> Iterator[None]:
    before = random_state()
    yield
    restore_random_state(before)


@pytest.mark.usefixtures("generators")
@fuzzed("generators")
@given(data=st.data())
def test_hostile_random_states_are_restored_or_refused(place: Path, data: st.DataObject) -> None:
    saved(place / "rng-0.pt", data.draw(changed(random_state())))
    refuses_clearly(lambda: restore(place / "rng-0.pt"))
    begin_randomness(1, step=0, rank=0)


@pytest.mark.usefixtures("generators")
@pytest.mark.parametrize("name", ["place", "keys", "gauss", "kind"])
def test_random_states_that_once_failed(place: Path, name: str) -> None:
    """A large place made numpy read beyond its memory, which ended the process."""
    state = random_state()
    kind, keys, at, has_gauss, gauss = state["numpy"]
    changes = {
        "place": {"numpy": [kind, keys, 10**9, has_gauss, gauss]},
        "keys": {"numpy": [kind, keys[:5], at, has_gauss, gauss]},
        "gauss": {"python": [*state["python"][:2], "x"]},
        "kind": {"numpy": ["PCG64", keys, at, has_gauss, gauss]},
    }
    saved(place / "rng-0.pt", state | changes[name])
    assert not refuses_clearly(lambda: restore(place / "rng-0.pt"))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_layouts_are_those_of_checkpoints(place: Path, weights: dict[str, torch.Tensor], layout: str) -> None:
    assert use(place, checkpoint_of(place, LAYOUTS[layout](weights)))


def test_a_weight_of_which_no_rank_has_a_piece_is_named(place: Path, weights: dict[str, torch.Tensor]) -> None:
    files = rows(weights)
    name = next(iter(weights))
    for rank in range(2):
        content = files[f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"]["optimizer_state_dict"]
        content["param_slice_mappings"][0].pop(name, None)
    with pytest.raises(CheckpointError, match=f"no file holds a piece of {name}"):
        read(checkpoint_of(place, files))


@fuzzed("shards")
@given(data=st.data(), layout=st.sampled_from(sorted(LAYOUTS)))
def test_hostile_files_of_a_checkpoint_are_read_or_refused(
    place: Path, weights: dict[str, torch.Tensor], data: st.DataObject, layout: str
) -> None:
    files = LAYOUTS[layout](weights)
    name = data.draw(st.sampled_from(sorted(files)))
    if data.draw(st.integers(0, 2)):
        path = checkpoint_of(place, files | {name: data.draw(changed(files[name]))})
    else:
        path = checkpoint_of(place, files)
        content = bytearray((path / name).read_bytes())
        # The table is at the beginning, the archive's list of names at the end.
        table = st.integers(0, min(1500, len(content) - 1)) | st.integers(max(0, len(content) - 800), len(content) - 1)
        for at in data.draw(st.lists(table, min_size=1, max_size=3)):
            content[at] = data.draw(st.integers(0, 255))
        cut = data.draw(st.sampled_from([None, None, None, len(content) // 2, 10, 0]))
        (path / name).write_bytes(bytes(content[:cut]))
    use(place, path)
