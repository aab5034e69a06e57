"""A run that goes on with another number of ranks, another ZeRO stage or another sequence parallelism: same training.

Runs of two ranks are saved after step 2 of 4 and go on in other topologies; losses, norms and final weights are held to
the run that never stopped. Every checkpoint is exported too, and must be the model that the run itself wrote.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from seqaware.checkpoint.shards import FP32, Shards
from seqaware.checkpoint.tensor_files import read_tensors
from seqaware.checkpoint.universal import convert
from seqaware.errors import CheckpointError, ConfigError
from seqaware.tools.export_model import export_checkpoint
from seqaware.tools.whole_model import whole_model
from tests import launch, tiny
from tests.e2e.many_runs import check_all, launch_all

# float32 sums in another order; see test_same_training, where they are derived.
LOSS_TOLERANCE = 1e-5
NORM_TOLERANCE = 2e-5
UPDATE_TOLERANCE = 1e-4
ROUNDING = 2.0**-23
SAVED, LAST = 2, 4

SOURCES: dict[str, tuple[int, list[str]]] = {
    "zero0": (0, []),
    "zero1": (1, []),
    "zero3": (3, []),
    "bf16": (3, ["model.dtype=bfloat16"]),
    "muon": (2, ["training.optimizer.type=muon"]),
    "lora": (2, ["lora.rank=4", "lora.target_modules=all-linear"]),
}
# (ranks, source, ZeRO stage now, more settings)
Case = tuple[int, str, int, tuple[str, ...]]
CASES: list[Case] = [
    (1, "zero3", 1, ()),
    (1, "zero1", 3, ()),
    (1, "zero1", 0, ()),
    (1, "bf16", 1, ()),
    (1, "lora", 3, ()),
    (3, "zero0", 3, ()),
    (3, "zero3", 2, ()),
    (4, "zero3", 3, ("parallel.sequence=2",)),
    (4, "zero1", 2, ()),
    (4, "bf16", 2, ()),
]


def _config(workshop: tiny.Workshop) -> dict[str, Any]:
    schedule = {"num_epochs": 4, "max_steps": LAST, "global_batch_size": 5, "scheduler_type": "constant"}
    schedule["micro_batch_tokens"] = 128
    # eps is large beside the gradients' rounding, so that an update is proportional to the gradient.
    config = workshop.config(training__schedule=schedule, output__save_every=SAVED, output__keep_last=9)
    config["training"]["optimizer"]["eps"] = 1e-2
    return config


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> tiny.Workshop:
    """With the runs of all sources in it, each trained to its end by two ranks."""
    workshop = tiny.build(tmp_path_factory.mktemp("topology"))
    path = workshop.write("run", _config(workshop))
    requests = [_request(path, stage, workshop.folder / name, settings) for name, (stage, settings) in SOURCES.items()]
    _run(workshop, requests, ranks=2)
    return workshop


def _request(path: Path, stage: int, folder: Path, settings: list[str], **more: Any) -> dict[str, Any]:
    zero = str(launch.DS_CONFIGS / f"zero{stage}.json")
    return {"config": str(path), "deepspeed": zero, "set": [f"output.dir={folder}", *settings], **more}


def _run(workshop: tiny.Workshop, requests: list[dict[str, Any]], *, ranks: int) -> None:
    check_all(launch_all(requests, ranks=ranks, folder=workshop.folder / "launches"))


def _steps(folder: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == "step"]


def _cut(workshop: tiny.Workshop, source: str, folder: Path) -> None:
    """The run of `source` as it lay there after its first checkpoint."""
    later = shutil.ignore_patterns(f"step-{LAST:08d}", "model", "latest")
    shutil.copytree(workshop.folder / source, folder, ignore=later)


def _checkpoint(workshop: tiny.Workshop, source: str, step: int) -> Path:
    return workshop.folder / source / "checkpoints" / f"step-{step:08d}"


def _model(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor.double() for name, tensor in load_file(folder / "model" / "model.safetensors").items()}


def _compare(workshop: tiny.Workshop, source: str, folder: Path) -> None:
    whole, resumed = workshop.folder / source, folder
    # bfloat16 rounds a weight to 8 bits after every step: sums in another order may round it another way.
    rounding = 2.0**-8 if source == "bf16" else ROUNDING
    loose = 1e3 if source == "bf16" else 1.0
    for before, after in zip(_steps(whole), _steps(resumed), strict=True):
        assert after["step"] == before["step"]
        assert after["loss"] == pytest.approx(before["loss"], rel=LOSS_TOLERANCE * loose), folder.name
        assert after["grad_norm"] == pytest.approx(before["grad_norm"], rel=NORM_TOLERANCE * loose), folder.name
    initial = {name: tensor.double() for name, tensor in load_file(workshop.model / "model.safetensors").items()}
    expected, found = _model(whole), _model(resumed)
    assert expected.keys() == found.keys()
    for name, tensor in expected.items():
        moved = float(torch.linalg.vector_norm(tensor - initial[name]))
        bound = UPDATE_TOLERANCE * moved + rounding * float(torch.linalg.vector_norm(tensor))
        assert float(torch.linalg.vector_norm(found[name] - tensor)) <= bound, (folder.name, name)


@pytest.mark.parametrize("ranks", [1, 3, 4])
def test_it_goes_on_in_another_topology(workshop: tiny.Workshop, ranks: int) -> None:
    path, requests, folders = workshop.folder / "run.yaml", [], []
    for count, source, stage, settings in CASES:
        if count != ranks:
            continue
        folder = workshop.folder / f"{source}-on-{ranks}-zero{stage}"
        _cut(workshop, source, folder)
        requests.append(_request(path, stage, folder, [*SOURCES[source][1], *settings]))
        folders.append((source, folder))
    if ranks == 3:  # and once from a checkpoint that was made universal
        folder, converted = workshop.folder / "from-universal", workshop.folder / "universal" / "any-name"
        convert(_checkpoint(workshop, "zero1", SAVED), converted)
        _cut(workshop, "zero1", folder)
        requests.append(_request(path, 3, folder, [], resume=str(converted)))
        folders.append(("zero1", folder))
    _run(workshop, requests, ranks=ranks)
    for source, folder in folders:
        attempts = json.loads((folder / "manifest.json").read_text())["attempts"]
        assert [attempt["topology"]["ranks"] for attempt in attempts] == [2, ranks]
        assert attempts[1]["from_step"] == SAVED
        _compare(workshop, source, folder)


def test_a_rank_may_own_nothing_but_padding(tmp_path: Path) -> None:
    """The norms of a model of 4 hidden units have 12 elements: of 4 ranks the last owns padding alone at ZeRO-1 and 2.

    With 3 hidden units and their 9 elements, the third rank owns some padding as well.
    """
    sources = {"zero1": (1, 4, "float32"), "part": (2, 3, "float32"), "bf16": (1, 4, "bfloat16")}
    sources["zero3"] = (3, 4, "float32")
    whole, resumed = [], []
    for name, (stage, hidden, dtype) in sources.items():
        shape = {"model_type": "llama", "hidden_size": hidden, "intermediate_size": 2 * hidden, "num_hidden_layers": 1}
        shape |= {"num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 2, "max_position_embeddings": 160}
        workshop = tiny.build(tmp_path / name)
        config = _config(workshop)
        config["model"] = {"from_scratch": shape, "tokenizer": str(workshop.model), "dtype": dtype}
        path, folder = workshop.write("run", config), workshop.folder / name
        whole.append(_request(path, stage, folder, []))
        checkpoint = _checkpoint(workshop, name, SAVED)
        now = 2 if stage == 3 else 3
        resumed.append(_request(path, now, workshop.folder / "resumed", [], resume=str(checkpoint)))
    _run(workshop, [*whole, *resumed], ranks=4)
    for name, (stage, _, _) in sources.items():
        folder = tmp_path / name / name
        checkpoint = folder / "checkpoints" / f"step-{SAVED:08d}"
        shards = Shards(checkpoint)
        assert all(len(shards.read(key, state)) for key in shards.shapes for state in shards.keys(key))
        if stage < 3:
            parts = [read_tensors(path)["optimizer_state_dict"] for path in checkpoint.glob("*optim_states.pt")]
            assert any(max(part["group_paddings"]) for part in parts), "no rank owns padding"
        convert(checkpoint, tmp_path / name / "universal" / "any-name")
        after = [line for line in _steps(folder) if line["step"] > SAVED]
        rounding = 1e3 if name == "bf16" else 1.0  # as in _compare
        for before, line in zip(after, _steps(tmp_path / name / "resumed"), strict=True):
            assert line["loss"] == pytest.approx(before["loss"], rel=LOSS_TOLERANCE * rounding), name
            assert line["grad_norm"] == pytest.approx(before["grad_norm"], rel=NORM_TOLERANCE * rounding), name


@pytest.mark.parametrize("source", SOURCES)
def test_an_exported_checkpoint_is_the_model_of_the_run(workshop: tiny.Workshop, source: str) -> None:
    """File by file, bit for bit; the run has exported its last step."""
    folder = workshop.folder / f"exported-{source}"
    # In the ranks' own environment: the tokenizer notes whether it was read offline.
    done = launch.forked("launcher/export.py", str(_checkpoint(workshop, source, LAST)), str(folder), ranks=1)
    assert done.returncode == 0, done.stderr[-4000:]
    assert f"exported    step {LAST} of " in done.stdout
    written = {path.name: path.read_bytes() for path in (workshop.folder / source / "model").iterdir()}
    del written["README.md"]
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == written
    AutoModelForCausalLM.from_pretrained(folder)


def test_a_checkpoint_is_evaluated_as_the_model_that_it_holds(workshop: tiny.Workshop) -> None:
    """Two ranks that ask at once make one folder of it, which serves again while it is of that checkpoint."""
    for source in ("zero3", "lora"):
        checkpoint, run = _checkpoint(workshop, source, LAST), workshop.folder / source
        asked = [f"evaluation.dataset.name={workshop.rows}", "evaluation.metric=exact_match", "evaluation.batch_size=4"]
        settings = [
            part
            for each in [*asked, r"evaluation.answer_pattern=(?P<answer>\w+)", "evaluation.max_new_tokens=2"]
            for part in ("--set", each)
        ]
        arguments = (str(checkpoint), str(workshop.folder / "run.yaml"), *settings)
        done = launch.forked("launcher/evaluate.py", *arguments, ranks=2)
        assert done.returncode == 0, done.stderr[-4000:]
        results = json.loads((run / "evaluations" / checkpoint.name / "results.json").read_text())
        assert results["questions"] == tiny.count_rows(workshop.rows)
        made = run / "exported" / checkpoint.name
        size = sum(path.stat().st_size for path in made.iterdir())
        assert f"model       {made} ({size / 1e6:.1f} MB), of {checkpoint}" in done.stdout
        expected, found = (load_file(folder / "model.safetensors") for folder in (run / "model", made))
        assert expected.keys() == found.keys() and all(found[name].equal(expected[name]) for name in expected), source
        said: list[str] = []
        assert whole_model(str(checkpoint), say=said.append) == str(made) and len(said) == 1
        (made / ".made-of").write_text("another checkpoint")
        assert whole_model(str(checkpoint), say=said.append) == str(made) and "making" in said[1]
    adapter = workshop.folder / "lora" / "adapter"
    export_checkpoint(_checkpoint(workshop, "lora", LAST), adapter, lora="adapter")
    merged = load_file(Path(whole_model(str(adapter), say=print)) / "model.safetensors")
    for name, weight in _model(workshop.folder / "lora").items():
        # Both merge in float32: the product of A and B in another order, a rounding or two.
        assert torch.allclose(merged[name].double(), weight, rtol=0, atol=4 * 2.0**-24 * float(weight.abs().max())), (
            name
        )
    (adapter / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "base_model_name_or_path": "/none"}))
    with pytest.raises(ConfigError, match="the adapter and its base model make no model"):
        whole_model(str(adapter), say=print)
    assert sorted(path.name for path in (workshop.folder / "lora" / "exported").iterdir() if path.name[0] != ".") == [
        "adapter",
        checkpoint.name,
    ]


def test_what_cannot_be_exported_is_told(workshop: tiny.Workshop, tmp_path: Path) -> None:
    checkpoint = _checkpoint(workshop, "zero3", LAST)
    with pytest.raises(ConfigError, match="is there already"):
        export_checkpoint(checkpoint, tmp_path)
    moved = tmp_path / "step-00000004"
    shutil.copytree(checkpoint, moved)
    with pytest.raises(ConfigError, match="name the run's folder with --run"):
        export_checkpoint(moved, tmp_path / "model")
    export_checkpoint(moved, tmp_path / "model", run=workshop.folder / "zero3")
    with pytest.raises(CheckpointError, match="parameters are not those"):
        export_checkpoint(moved, tmp_path / "other", run=workshop.folder / "lora")
    (moved / "zero_pp_rank_1_mp_rank_00_optim_states.pt").write_bytes(b"")
    with pytest.raises(CheckpointError, match="optim_states\\.pt has 0 bytes"):
        export_checkpoint(moved, tmp_path / "torn", run=workshop.folder / "zero3")
    assert not list(tmp_path.glob("*.partial"))


def test_an_optimizer_that_cannot_be_shared_out_anew_is_refused(workshop: tiny.Workshop, tmp_path: Path) -> None:
    """Its weights can be read all the same: they were exported above."""
    with pytest.raises(CheckpointError, match=r"optimizer's state cannot be cut.*Muon's momentum.*that wrote it"):
        convert(_checkpoint(workshop, "muon", SAVED), tmp_path / "universal")
    shards = Shards(_checkpoint(workshop, "muon", SAVED))
    with pytest.raises(CheckpointError, match="Muon's momentum"):
        shards.keys(next(iter(shards.shapes)))


def test_a_state_of_another_size_than_the_weights_is_refused(workshop: tiny.Workshop, tmp_path: Path) -> None:
    """As that of an 8-bit optimizer, which has a scale for every block of weights."""
    checkpoint = tmp_path / "step-00000002"
    shutil.copytree(_checkpoint(workshop, "zero1", SAVED), checkpoint)
    for path in checkpoint.glob("*optim_states.pt"):
        content = read_tensors(path)
        for state in content["optimizer_state_dict"]["base_optimizer_state"]["state"].values():
            state["absmax1"] = torch.ones(3)
        torch.save(content, path.with_suffix(".new"))  # it is mapped: not written over
        path.with_suffix(".new").replace(path)
    shards = Shards(checkpoint)
    name = next(iter(shards.shapes))
    assert shards.read(name, FP32).numel() == shards.shapes[name].numel()
    with pytest.raises(CheckpointError, match="absmax1 has 3 elements beside"):
        shards.keys(name)


def test_deepspeeds_own_loader_reads_a_universal_checkpoint(workshop: tiny.Workshop) -> None:
    """Two ranks at ZeRO 1 to 3; universal_loading.py compares every element there."""
    for source in ("zero0", "zero1", "zero3"):
        folder = workshop.folder / "for-deepspeed" / source
        convert(_checkpoint(workshop, source, SAVED), folder)
    arguments = (str(workshop.model), str(workshop.folder / "for-deepspeed"))
    done = launch.forked("tests/e2e/universal_loading.py", *arguments, ranks=2)
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.count("is what was saved after step 2") == 9, done.stdout
