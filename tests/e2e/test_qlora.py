"""Adapters over a quantised base: the run is the float64 oracle's over the dequantised weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from tests import tiny
from tests.adapter_oracle import SEVEN, Adapted
from tests.e2e.adapter_runs import LOSS_TOLERANCE, check, documents_of, oracle, request, steps_of
from tests.e2e.many_runs import check_all, launch_all

functional = pytest.importorskip("bitsandbytes.functional")

NF4 = {"rank": 4, "alpha": 8, "quantize_base": "nf4"}
INT8 = {"rank": 4, "alpha": 8, "quantize_base": "int8"}
# name -> (ZeRO stage, lora, the oracle's adapters, settings)
NF4_RUNS = {
    "nf4-z0": (0, NF4, Adapted(4, 2.0), {}),
    "nf4-z1": (1, {**NF4, "dora": True}, Adapted(4, 2.0, dora=True), {"packing__enabled": False}),
    "nf4-z2": (2, NF4, Adapted(4, 2.0), {"model__activation_checkpointing": "full"}),
    # The other layers are quantised without an adapter; the head and what is trained whole are not quantised.
    "nf4-saved": (2, {**NF4, "target_modules": ["q_proj"], "modules_to_save": ["v_proj"]}, None, {}),
}
INT8_RUNS = {"int8-z0": 0, "int8-z2": 2}
# LLM.int8 rounds each token's activations to 127 steps of its largest: an error of 1/254 at most, about 0.2 % of the
# largest in the mean, in each of seven products a layer. The oracle does not round them; a loss is a mean over tokens.
INT8_LOSS, INT8_NORM = 2e-3, 5e-2
# Between layouts, float32 sums in another order move single activations across a rounding border: 1/127 of one entry in
# some of ~10^5, so far below one part in 10^4 of a loss.
INT8_SAME = 1e-4


def _nf4(weight: Tensor) -> Tensor:
    packed, state = functional.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
    return functional.dequantize_4bit(packed, state)


def _int8(weight: Tensor) -> Tensor:
    step = weight.abs().amax(dim=1, keepdim=True) / 127
    return torch.round(weight / step) * step


def _dequantised(workshop: tiny.Workshop, name: str, rounded: Callable[[Tensor], Tensor], kept: str = "") -> Path:
    model = AutoModelForCausalLM.from_pretrained(workshop.model)
    for module, layer in model.named_modules():
        if module.endswith(SEVEN) and not (kept and module.endswith(kept)):
            layer.weight.data = rounded(layer.weight.data)
    folder = workshop.folder / name
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_quantised_base_trains_the_oracles_adapters(tmp_path: Path, ranks: int) -> None:
    workshop = tiny.build(tmp_path)
    requests = [request(workshop, name, lora, z, **settings) for name, (z, lora, _, settings) in NF4_RUNS.items()]
    requests += [request(workshop, name, INT8, stage) for name, stage in INT8_RUNS.items()]
    check_all(launch_all(requests, ranks=ranks, folder=tmp_path / "launches"))
    documents = documents_of(workshop)
    base = _dequantised(workshop, "dequantised", _nf4)
    # What rounding the base to 4 bits does to the first loss is far more than the comparison lets pass.
    whole = oracle(workshop.model, Adapted(4, 2.0), documents)
    rounded = oracle(base, Adapted(4, 2.0), documents)
    assert abs(rounded.run.losses[0] / whole.run.losses[0] - 1) > 10 * LOSS_TOLERANCE
    partly = _dequantised(workshop, "partly", _nf4, kept="v_proj")
    for name, (_, _, adapted, _) in NF4_RUNS.items():
        folder = base if adapted else partly
        expected = oracle(folder, adapted or Adapted(4, 2.0, ("q_proj",), whole=("v_proj",)), documents)
        check(name, tmp_path / name, folder, expected)
    expected = oracle(_dequantised(workshop, "dequantised-8", _int8), Adapted(4, 2.0), documents)
    for name in INT8_RUNS:
        lines = zip(steps_of(tmp_path / name), steps_of(tmp_path / "int8-z0"), strict=True)
        for (line, first), loss, norm in zip(lines, expected.run.losses, expected.run.grad_norms, strict=True):
            assert line["loss"] == pytest.approx(loss, rel=INT8_LOSS), name
            assert line["grad_norm"] == pytest.approx(norm, rel=INT8_NORM), name
            assert line["loss"] == pytest.approx(first["loss"], rel=INT8_SAME), name


def test_a_quantised_run_resumes_bitwise(tmp_path: Path) -> None:
    workshop = tiny.build(tmp_path)
    schedule = {"num_epochs": 2, "global_batch_size": 5, "scheduler_type": "constant"}
    requests = []
    for name, last in (("whole", 4), ("parts", 2), ("parts", 4)):
        one = request(workshop, name, {**NF4, "export": "adapter"}, 2, training__schedule=schedule)
        requests.append({**one, "set": [f"training.schedule.max_steps={last}", "output.save_every=2"]})
    check_all(launch_all(requests, ranks=2, folder=tmp_path / "launches"))
    whole, parts = (
        [(line["step"], line["loss"], line["grad_norm"]) for line in steps_of(tmp_path / name)]
        for name in ("whole", "parts")
    )
    assert parts == whole and len(whole) == 4
    expected, resumed = (load_file(tmp_path / n / "model" / "adapter_model.safetensors") for n in ("whole", "parts"))
    assert all(resumed[name].equal(tensor) for name, tensor in expected.items())
