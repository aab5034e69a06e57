"""What only a GPU can show: our kernels' numbers on it, and that a run there is the run that a CPU does.

    python -m pytest tests/gpu

Runs are started at once and share the GPU; each is one rank.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from seqaware.models.attention import Documents, attention
from seqaware.models.attention_choice import choose_backend
from seqaware.objective import fused
from seqaware.objective.cross_entropy import Head
from seqaware.objective.fused import fused_cross_entropy
from seqaware.objective.softmax_pass import choose_kernel
from tests.launch import DS_CONFIGS, ROOT, environment
from tests.patience import communicate
from tests.tiny import build
from tests.unit.objective.cases import Bounds, Case, Shape, assert_within, evaluate, exact, make_case

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

# float32: a GPU's exponential is off by two units in the last place, and its roundings are those of any float32.
UNIT_ROUNDING = {torch.float32: 2.0**-22, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
SHAPES = (
    Shape(rows=300, hidden=64, vocabulary=9001),
    Shape(rows=200, hidden=64, vocabulary=50_257),
    Shape(rows=200, hidden=64, vocabulary=512, bias=True, softcap=4.0, scale=0.5),
    Shape(rows=1, hidden=8, vocabulary=3, ignored=0.0, zero_weight=0.0),
)


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: f"V{shape.vocabulary}")
@pytest.mark.parametrize("dtype", list(UNIT_ROUNDING), ids=str)
def test_the_loss_equals_float64_up_to_rounding(shape: Shape, dtype: torch.dtype) -> None:
    case = _on_gpu(make_case(shape, dtype))
    assert choose_kernel(case.hidden.device, torch.float32).kernel == "triton"
    ours = evaluate(fused_cross_entropy, case, chunk_rows=128, factor=0.01)
    eps = UNIT_ROUNDING[dtype]
    assert_within(ours, exact(case, factor=0.01), Bounds.of(case, eps, factor=0.01), rounding=2.01 * eps)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_large_heads_gradient_in_the_bytes_of_its_sum(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of an odd vocabulary; no more than 4·V·H and the chunk's buffers at the peak."""
    monkeypatch.setattr(fused, "_GPU_CHUNK_BYTES", 2**20)
    V, H, rows = 50_257, 256, 256
    case = _on_gpu(make_case(Shape(rows=rows, hidden=H, vocabulary=V), dtype))
    evaluate(fused_cross_entropy, case, chunk_rows=64, factor=0.01)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    ours = evaluate(fused_cross_entropy, case, chunk_rows=64, factor=0.01)
    taken = torch.cuda.max_memory_allocated() - before
    eps = UNIT_ROUNDING[dtype]
    assert_within(ours, exact(case, factor=0.01), Bounds.of(case, eps, factor=0.01), rounding=2.01 * eps)
    # A chunk's logits, a piece of 4 MiB and per-row tensors: less than 6·V·H.
    assert taken <= 4 * V * H + 4 * 64 * (V + 64) + 8 * 2**20


def _on_gpu(case: Case) -> Case:
    hidden, weight, *bias = (each.detach().cuda().requires_grad_() for each in case.inputs)
    head = Head(weight, *bias, scale=case.head.scale, softcap=case.head.softcap)
    return Case(hidden, head, case.labels.cuda(), case.weights.cuda())


@pytest.mark.parametrize("window", [None, 64])
@pytest.mark.parametrize(("heads", "key_heads", "head_dim"), [(4, 2, 64), (4, 4, 128), (2, 1, 40)])
def test_varlen_attention_is_the_reference_up_to_rounding(
    window: int | None, heads: int, key_heads: int, head_dim: int
) -> None:
    """bfloat16 beside the written-out softmax in float64: forward and gradients."""
    choice = choose_backend("auto", device="cuda", dtype=torch.bfloat16, head_dim=head_dim)
    assert choice.backend in ("varlen", "flash_attention_2", "flash_attention_3")
    lengths = (300, 1, 77, 130, 4)
    generator = torch.Generator().manual_seed(0)
    shapes = ((heads, head_dim), (key_heads, head_dim), (key_heads, head_dim))
    drawn = [torch.randn(1, shape[0], sum(lengths), shape[1], generator=generator) for shape in shapes]
    borders = torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32, device="cuda")
    found, wanted = (
        _attend(drawn, Documents(borders, lengths, backend), dtype=dtype, window=window)
        for backend, dtype in ((choice.backend, torch.bfloat16), ("eager", torch.float64))
    )
    # Of probabilities, scores and outputs each is rounded once or twice; gradients add up two of them.
    for mine, exactly in zip(found, wanted, strict=True):
        error = (mine.double() - exactly).norm() / exactly.norm()
        assert error.item() < 4 * 2.0**-8


def _attend(
    drawn: list[torch.Tensor], documents: Documents, *, dtype: torch.dtype, window: int | None
) -> list[torch.Tensor]:
    # Rounded to bfloat16 first: both start from the same numbers.
    leaves = [tensor.bfloat16().cuda().to(dtype).requires_grad_() for tensor in drawn]
    module = torch.nn.Module()
    output, _ = attention(module, *leaves, None, documents=documents, sliding_window=window)
    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(1)).to("cuda", dtype)
    return [output.detach(), *torch.autograd.grad((output * weights).sum(), leaves)]


@dataclass(frozen=True)
class Kind:
    device: str
    dtype: str
    stage: int
    changes: tuple[tuple[str, Any], ...] = ()


KINDS = {
    "cpu": Kind("cpu", "float32", 1),
    **{f"zero{stage}": Kind("cuda", "float32", stage) for stage in range(4)},
    "narrow1": Kind("cuda", "bfloat16", 1),
    "narrow3": Kind("cuda", "bfloat16", 3),
    "half": Kind("cuda", "float16", 2),
    "compiled": Kind("cuda", "bfloat16", 1, (("model__compile", True),)),
    "selective": Kind("cuda", "bfloat16", 3, (("model__activation_checkpointing", "selective"),)),
    "offload": Kind("cuda", "bfloat16", 1, (("model__activation_checkpointing", "offload"),)),
}


@pytest.fixture(scope="module")
def losses(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, list[float]]]:
    """Every step's weighted loss, of each kind of run."""
    folder = tmp_path_factory.mktemp("runs")
    workshop = build(folder)
    processes = {}
    for name, kind in KINDS.items():
        changes = dict(kind.changes) | {"model__dtype": kind.dtype, "output__dir": str(folder / name)}
        yaml = workshop.write(name, workshop.config(**changes))
        command = [sys.executable, "launcher/train.py", str(yaml), "--deepspeed", f"{DS_CONFIGS}/zero{kind.stage}.json"]
        variables = environment(PYTHONPATH=os.pathsep.join([str(ROOT), *sys.path[1:]]))
        if kind.device == "cuda":
            del variables["DS_ACCELERATOR"]
        processes[name] = subprocess.Popen(
            command, cwd=ROOT, env=variables, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
    outputs = {name: communicate(process)[0] for name, process in processes.items()}
    for name, process in processes.items():
        assert process.returncode == 0, f"{name}: {outputs[name][-3000:]}"
    yield {name: _losses(folder / name) for name in KINDS}


def _losses(run: Path) -> list[float]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if line["kind"] == "step"]


@pytest.mark.distributed
@pytest.mark.parametrize("name", [name for name in KINDS if name.startswith("zero")])
def test_a_float32_run_is_that_of_a_cpu(losses: dict[str, list[float]], name: str) -> None:
    assert len(losses[name]) == 3
    assert losses[name] == pytest.approx(losses["cpu"], rel=2e-5)


@pytest.mark.distributed
@pytest.mark.parametrize("name", [name for name, kind in KINDS.items() if kind.dtype != "float32"])
def test_a_narrow_run_follows_it(losses: dict[str, list[float]], name: str) -> None:
    assert losses[name] == pytest.approx(losses["cpu"], rel=2e-2)


@pytest.mark.distributed
def test_what_is_kept_of_a_layer_changes_nothing(losses: dict[str, list[float]]) -> None:
    assert losses["offload"] == losses["narrow1"]
    assert losses["selective"] == losses["narrow3"]
