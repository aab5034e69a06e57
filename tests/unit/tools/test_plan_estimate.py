"""`launcher/plan.py` on the worked examples, as a person types it."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from seqaware.config.loading import REPOSITORY, load_config
from seqaware.errors import ConfigError, DataError
from seqaware.estimate.hardware import DEVICES
from seqaware.estimate.known_models import known_facts
from seqaware.estimate.run_estimate import outlook, overridden
from seqaware.tools.dry_run import plan_for
from seqaware.tools.plan_estimate import Gpus, ask
from tests.unit.data.store.test_token_store import document, write

EXAMPLES = [("llama8b_node", 8), ("llama70b_8nodes", 64), ("llama8b_512k", 8)]


def lines(name: str, gpus: int, *overrides: str, deepspeed: Path | None = None) -> dict[str, str]:
    config = load_config(REPOSITORY / "train_configs" / f"{name}.yaml", overrides)
    found: dict[str, str] = {}
    for label, text in outlook(ask(config, deepspeed_path=deepspeed, gpus=Gpus(gpus, 8), device=DEVICES["h200"])):
        current = label or list(found)[-1]
        found[current] = f"{found[current]}\n{text}" if current in found else text
    return found


@pytest.mark.parametrize(("name", "gpus"), EXAMPLES)
def test_every_worked_example_fits_and_is_told_what_it_costs(name: str, gpus: int) -> None:
    told = lines(name, gpus)
    assert told["memory"].startswith("fits: ")
    assert "change" not in told
    for label in ("step", "traffic", "largest", "cheapest", "longest", "assumed", "disk"):
        assert told[label]


def test_what_does_not_fit_says_so_and_what_to_change() -> None:
    told = lines("llama70b_8nodes", 16, "training.schedule.micro_batch_tokens=65536")
    assert told["memory"].startswith("DOES NOT FIT")
    assert "training.schedule.micro_batch_tokens: " in told["change"]


def test_a_deepspeed_config_that_cannot_be_had_is_named_with_the_reason() -> None:
    assert "not ds_configs/zero0.json: without ZeRO" in lines("llama8b_node", 8)["cheapest"]


def test_offloaded_states_are_shown_in_cpu_memory() -> None:
    path = REPOSITORY / "ds_configs" / "zero3_offload_cpu.json"
    assert "GiB for each GPU" in lines("llama8b_node", 8, deepspeed=path)["cpu memory"]


def test_what_is_installed_here_and_drives_here_are_not_asked_for_a_plan_of_elsewhere(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("seqaware.plan.offload.find_library", lambda name: None)
    monkeypatch.setattr("seqaware.plan.validation.is_installed", lambda module: False)
    zero = json.loads((REPOSITORY / "ds_configs" / "zero3_offload_nvme.json").read_text())["zero_optimization"]
    for block in ("offload_optimizer", "offload_param"):
        zero[block]["nvme_path"] = "/a-drive-of-their-nodes"
    path = tmp_path / "nvme.json"
    path.write_text(json.dumps({"zero_optimization": zero}))
    theirs = ("training.optimizer.type=cpu_adam", "model.attention=flash_attention_3")
    assert "GiB for each GPU" in lines("llama8b_node", 8, *theirs, deepspeed=path)["drive"]
    config = load_config(REPOSITORY / "train_configs" / "llama8b_node.yaml", theirs)
    here = replace(Gpus(8, 8).world(), elsewhere=False)
    with pytest.raises(ConfigError) as refused:
        plan_for(config, world=here, deepspeed_path=path, model=known_facts("meta-llama/Llama-3.1-8B"))
    for word in ("is not a folder on this machine", "needs libaio", "flash_attn_interface, which is not installed"):
        assert word in str(refused.value)


def test_nodes_must_be_full() -> None:
    with pytest.raises(ConfigError, match="write 8 or 16 GPUs"):
        Gpus(12, 8).world()


def test_a_model_of_unknown_size_is_refused() -> None:
    config = load_config(REPOSITORY / "train_configs" / "llama8b_node.yaml", ["model.base_name=somebody/some-model"])
    with pytest.raises(ConfigError, match="sizes are not known here"):
        ask(config, deepspeed_path=None, gpus=Gpus(8, 8), device=DEVICES["h200"])


def test_figures_of_ones_own_replace_the_devices() -> None:
    mine = overridden(DEVICES["h200"], memory_gib=80, link_gb=None, network_gb=25)
    assert (mine.memory, mine.link_rate, mine.network_rate) == (80 * 2**30, DEVICES["h200"].link_rate, 25e9)


def test_the_command_answers_without_torch_and_refuses_with_one_line() -> None:
    command = [sys.executable, "-X", "importtime", "launcher/plan.py", "train_configs/llama8b_node.yaml"]
    answered = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert answered.returncode == 0
    assert "8,030,261,248 weights" in answered.stdout
    imported = {line.rsplit("|", 1)[-1].strip() for line in answered.stderr.splitlines()}
    assert not imported & {"torch", "deepspeed", "transformers", "numba"}
    refused = subprocess.run([*command, "--device", "tpu"], cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert refused.returncode == 2
    assert "error: --device is not one that is known here; got tpu" in refused.stderr


@pytest.mark.parametrize("wrong", [0.0, -3.0, float("nan"), float("inf")])
def test_figures_of_ones_own_are_above_zero(wrong: float) -> None:
    with pytest.raises(ConfigError, match=r"--nvlink must be a number from 0\.001 to 1e\+06; got"):
        overridden(DEVICES["h200"], memory_gib=None, link_gb=wrong, network_gb=None)


def test_the_whole_run_is_told_in_steps_hours_and_disk(tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"text": "a"}\n' * 1000)
    changes = (f"dataset.name={rows}", "training.schedule.global_batch_tokens=null", "training.schedule.num_epochs=2")
    size = ("training.schedule.global_batch_size=64", "output.save_every=10", "output.keep_every=16")
    told = lines("llama8b_node", 8, *changes, *size)
    assert told["run"] == "about 32 steps, 2 epoch(s) of 1,000 documents"
    hours, _, gpu_hours = told["time"].partition(" = ")
    minutes = float(hours.removesuffix(" minutes"))
    assert float(gpu_hours.split()[0]) == pytest.approx(8 * minutes / 60, abs=0.06)
    # Two of keep_last, the one that is being written, and step 32. No step 16 is saved.
    assert "at most 4 checkpoint(s)" in told["disk in all"]


def test_data_that_is_not_here_is_said_to_be_unknown() -> None:
    told = lines("llama8b_node", 8)
    assert "not known before the data is tokenised" in told["run"]
    assert told["time"].startswith("1,000 steps: ") and "at most 1 checkpoint(s)" in told["disk in all"]


def test_packing_is_laid_out_where_the_data_is_tokenised(tmp_path: Path) -> None:
    # 16 documents of 600 tokens in micro-batches of 1,024: none holds two.
    store = write(tmp_path / "store", [document(600, seed=seed) for seed in range(16)], max_seq_length=600)
    changes = (f"dataset.name={store}", "training.schedule.global_batch_tokens=null")
    sizes = ("training.parameters.max_seq_length=1024", "training.schedule.micro_batch_tokens=1024")
    told = lines("llama8b_node", 8, *changes, *sizes, "training.schedule.global_batch_size=8")
    assert told["run"].startswith("6 steps, 3 epoch(s) of 16 documents, 9,600 tokens an epoch")
    assert told["packing"].startswith(f"packed: micro-batches of 1,024 tokens are {600 / 1024:.1%} full")
    assert "1.000 × the mean (first 6 steps)" in told["packing"]
    lengths = store / "lengths.bin"
    lengths.write_bytes(bytes(lengths.stat().st_size))
    with pytest.raises(DataError, match=r"offsets\.bin and lengths\.bin contradict each other"):
        lines("llama8b_node", 8, *changes, *sizes, "training.schedule.global_batch_size=8")
