"""ZeRO's whole range through the real command: offload to the CPU and to a drive, and hpZ, against the float64 oracle.

The model is wide enough that a rank's share of a matrix is 1 MiB, below which DeepSpeed keeps tensors off the drive.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from ctypes.util import find_library
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from tests import launch, oracles, tiny
from tests.e2e.many_runs import Outcome, check_all, launch_all
from tests.e2e.test_same_training import EPS, LOSS_TOLERANCE, NORM_TOLERANCE, ROUNDING, UPDATE_TOLERANCE

STEPS = 3
LEARNING_RATE = 1e-3
HAS_AIO = find_library("aio") is not None
CPU = {"device": "cpu"}

# Name -> (DeepSpeed's file, changes to its zero_optimization, the optimizer). DRIVE stands for a folder of the test's.
DRIVE = {"device": "nvme", "nvme_path": "DRIVE"}
BUFFERED = {**DRIVE, "buffer_size": 1_000_000}
Variant = tuple[str, Mapping[str, Any], str]
VARIANTS: dict[str, Variant] = {
    "zero0": ("zero0", {}, "adamw"),
    "zero1": ("zero1", {}, "adamw"),
    "zero2": ("zero2", {}, "adamw"),
    "zero3": ("zero3", {}, "adamw"),
    "zero1, optimizer on the CPU": ("zero1_offload_optimizer", {}, "adamw"),
    "zero1, cpu_adam": ("zero1_offload_optimizer", {}, "cpu_adam"),
    "zero2, optimizer on the CPU": ("zero2_offload_optimizer", {}, "adamw"),
    "zero2, cpu_adam": ("zero2_offload_optimizer", {}, "cpu_adam"),
    "zero3, optimizer on the CPU": ("zero3", {"offload_optimizer": CPU}, "adamw"),
    "zero3, parameters on the CPU": ("zero3", {"offload_param": CPU}, "adamw"),
    "zero3, both on the CPU": ("zero3_offload_cpu", {}, "adamw"),
    "zero3, both on the CPU, cpu_adam": ("zero3_offload_cpu", {}, "cpu_adam"),
}
ON_A_DRIVE: dict[str, Variant] = {
    "both on a drive": ("zero3_offload_nvme", {"offload_optimizer": DRIVE, "offload_param": BUFFERED}, "adamw"),
    "both on a drive, cpu_adam": (
        "zero3_offload_nvme",
        {"offload_optimizer": DRIVE, "offload_param": BUFFERED},
        "cpu_adam",
    ),
    "both on a drive, several sub-groups": (
        "zero3_offload_nvme",
        {"offload_optimizer": DRIVE, "offload_param": BUFFERED, "sub_group_size": 600_000},
        "cpu_adam",
    ),
    "both on a drive, in a pipeline": (
        "zero3_offload_nvme",
        {
            "offload_optimizer": {**DRIVE, "pipeline_read": True, "pipeline_write": True, "buffer_count": 8},
            "offload_param": BUFFERED,
        },
        "cpu_adam",
    ),
    "optimizer on a drive": ("zero3", {"offload_optimizer": DRIVE}, "cpu_adam"),
    "parameters on a drive": ("zero3", {"offload_param": BUFFERED}, "adamw"),
}
# Last: DeepSpeed keeps hpZ's groups for the life of the process.
HPZ: dict[str, Variant] = {"hpz": ("zero_hpz", {"zero_hpz_partition_size": 2}, "adamw")}
RUN_HERE = {**VARIANTS, **(ON_A_DRIVE if HAS_AIO else {}), **HPZ}
RESUMED = ("zero3, both on the CPU", "zero2, cpu_adam")
STOPPED = "both on a drive"
# cpu_adam multiplies β^t up step by step, and on resuming takes the power: one float32 rounding apart. In 1 - β₂^t,
# 3e-3 after three steps, that is 2e-5, and half of it in the update, whose entries are at most the learning rate; and
# the weight is rounded.
POWER_ERROR = {"rtol": 2.0**-23, "atol": 2e-5 * LEARNING_RATE}


def _build(folder: Path) -> tiny.Workshop:
    workshop = tiny.build(folder)
    tokenizer = AutoTokenizer.from_pretrained(workshop.model)
    config = AutoConfig.for_model(
        "llama",
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=4096,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=tiny.MAX_POSITIONS,
        eos_token_id=tokenizer.eos_token_id,
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(workshop.model)
    return workshop


def _request(workshop: tiny.Workshop, name: str, folder: Path, max_steps: int = STEPS) -> dict[str, Any]:
    file, changes, optimizer = RUN_HERE[name]
    settings = json.loads((launch.DS_CONFIGS / f"{file}.json").read_text())
    zero = settings["zero_optimization"]
    for key, value in changes.items():
        zero[key] = {**zero.get(key, {}), **value} if isinstance(value, dict) else value
    drive = workshop.folder / "drive"
    drive.mkdir(exist_ok=True)
    path = folder.with_suffix(".json")
    path.write_text(json.dumps(settings).replace('"DRIVE"', json.dumps(str(drive))))
    config = workshop.config(
        training__optimizer={"lr": LEARNING_RATE, "eps": EPS, "type": optimizer},
        training__schedule={"num_epochs": STEPS, "global_batch_size": 13, "scheduler_type": "constant"},
        output__save_every=2,
    )
    config["training"]["schedule"]["micro_batch_tokens"] = 128
    config["training"]["sft"] = {"gamma": 0.98}
    sets = [f"output.dir={folder}", f"training.schedule.max_steps={max_steps}"]
    return {"config": str(workshop.write(folder.name, config)), "deepspeed": str(path), "set": sets}


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> tiny.Workshop:
    return _build(tmp_path_factory.mktemp("zero"))


@pytest.fixture(scope="module")
def outcomes(workshop: tiny.Workshop) -> dict[str, Outcome]:
    """By the name of the run's folder; of a resumed run, that of its last part."""
    resumed = [name for name in RESUMED if name in RUN_HERE]
    requests = [
        _request(workshop, name, _resumed_folder(workshop, name), steps) for name in resumed for steps in (2, STEPS)
    ]
    if HAS_AIO:
        requests.append(_request(workshop, STOPPED, _resumed_folder(workshop, STOPPED), 2))
    requests += [_request(workshop, name, _folder(workshop, name)) for name in RUN_HERE]
    # The operators are built first.
    done = launch_all(requests, ranks=2, folder=workshop.folder / "launches")
    return {Path(request["config"]).stem: outcome for request, outcome in zip(requests, done, strict=True)}


def _folder(workshop: tiny.Workshop, name: str) -> Path:
    return workshop.folder / f"run-{list(RUN_HERE).index(name)}"


def _resumed_folder(workshop: tiny.Workshop, name: str) -> Path:
    return workshop.folder / f"resumed-{list(RUN_HERE).index(name)}"


@pytest.fixture(scope="module")
def oracle(workshop: tiny.Workshop) -> oracles.OracleRun:
    documents = oracles.question_rows(workshop.rows, AutoTokenizer.from_pretrained(workshop.model))
    rates = [LEARNING_RATE] * STEPS
    settings = oracles.OracleSettings(gamma=0.98, normalize_by="tokens", learning_rates=rates, eps=EPS)
    return oracles.train(workshop.model, [documents] * STEPS, settings)


def _steps(folder: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == "step"]


def _weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model" / "model.safetensors")


@pytest.mark.parametrize("name", RUN_HERE)
def test_the_same_training(
    workshop: tiny.Workshop, outcomes: dict[str, Outcome], oracle: oracles.OracleRun, name: str
) -> None:
    """The tolerances are those of test_same_training: the same arithmetic, moved elsewhere."""
    outcomes[_folder(workshop, name).name].check()
    steps = _steps(_folder(workshop, name))
    assert len(steps) == STEPS
    for step, loss, norm in zip(steps, oracle.losses, oracle.grad_norms, strict=True):
        assert step["loss"] == pytest.approx(loss, rel=LOSS_TOLERANCE)
        assert step["grad_norm"] == pytest.approx(norm, rel=NORM_TOLERANCE)
    initial = load_file(workshop.model / "model.safetensors")
    for key, trained in _weights(_folder(workshop, name)).items():
        expected = oracle.weights[key]
        update = float((initial[key].double() - expected).abs().mean())
        bound = UPDATE_TOLERANCE * update + ROUNDING * float(expected.abs().max())
        difference = float((trained.double() - expected).abs().mean())
        assert difference < bound, f"{key} differs by {difference:.1e}, not {bound:.1e}"
        assert update > 10 * bound or key.endswith("norm.weight"), f"{key}: an update that the bound would hide"


@pytest.mark.parametrize("name", [name for name in RESUMED if name in RUN_HERE])
def test_resume_is_never_having_stopped(workshop: tiny.Workshop, outcomes: dict[str, Outcome], name: str) -> None:
    whole, parts = _folder(workshop, name), _resumed_folder(workshop, name)
    check_all([outcomes[folder.name] for folder in (whole, parts)])
    figures = ("step", "loss", "grad_norm")
    assert [[s[f] for f in figures] for s in _steps(parts)] == [[s[f] for f in figures] for s in _steps(whole)]
    resumed = _weights(parts)
    for key, tensor in _weights(whole).items():
        exact = RUN_HERE[name][2] != "cpu_adam"
        torch.testing.assert_close(resumed[key], tensor, **({"rtol": 0, "atol": 0} if exact else POWER_ERROR), msg=key)


@pytest.mark.skipif(not HAS_AIO, reason="no libaio, so nothing was put on a drive")
def test_a_run_with_states_on_a_drive_is_not_resumed(workshop: tiny.Workshop, outcomes: dict[str, Outcome]) -> None:
    outcomes[_resumed_folder(workshop, STOPPED).name].check()
    request = _request(workshop, STOPPED, _resumed_folder(workshop, STOPPED))
    sets = [part for each in request["set"] for part in ("--set", each)]
    done = launch.forked("launcher/train.py", request["config"], "--deepspeed", request["deepspeed"], *sets, ranks=1)
    assert done.returncode == 2
    assert "a run that offloads to nvme cannot be resumed" in done.stderr


@pytest.mark.usefixtures("outcomes")
def test_nothing_stays_on_the_drive(workshop: tiny.Workshop) -> None:
    assert not list((workshop.folder / "drive").iterdir())
