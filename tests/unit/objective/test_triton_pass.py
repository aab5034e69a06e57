"""The Triton kernel: its numbers by the interpreter, its code by the compiler, and when it is taken."""

from __future__ import annotations

import importlib.util
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from seqaware.objective import fused, softmax_pass
from seqaware.objective.softmax_pass import choose_kernel
from seqaware.objective.triton_kernels import _rows_pass
from tests.patience import run

CUDA = torch.device("cuda")


@pytest.fixture(autouse=True)
def nothing_chosen_yet() -> Iterator[None]:
    choose_kernel.cache_clear()
    yield
    choose_kernel.cache_clear()


def test_its_numbers_are_right_by_the_interpreter() -> None:
    cases = Path(__file__).with_name("interpreted_cases.py")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(cases)]
    variables = {"TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    finished = run(command, cwd=Path.cwd(), env={**os.environ, **variables})
    assert finished.returncode == 0, finished.stdout[-4000:] + finished.stderr[-2000:]
    assert re.search(r"\b13 passed", finished.stdout) and "skipped" not in finished.stdout, finished.stdout


@pytest.mark.parametrize("capability", [80, 90])
def test_it_compiles_for_gpus_that_are_not_here(
    capability: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Down to machine code; and rows are read and written 16 bytes at once, for any vocabulary."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    constants = {"HAS_BIAS": False, "HAS_CAP": False, "WANTS_GRADIENT": True, "COLUMNS": 8192}
    narrow = {"targets": "*i64", "gradient": "*bf16", "correct": "*u8", "scale": "fp32", "cap": "fp32"}
    narrow |= dict.fromkeys(("vocabulary", "width", "logits_stride", "gradient_stride"), "i32")
    names = [parameter.name for parameter in _rows_pass.params]
    signature = {name: narrow.get(name, "*fp32") for name in names} | dict.fromkeys(constants, "constexpr")
    # What a launch tells of its arguments: pointers, strides and the width are multiples of 16, the vocabulary is not.
    aligned = ("logits", "gradient", "logits_stride", "gradient_stride", "width")
    source = ASTSource(
        fn=_rows_pass,
        signature=signature,
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in aligned},
    )
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": 16})
    assert len(compiled.asm["cubin"]) > 1000
    # 16 float32 a thread, twice: eight pieces of four. 16 bfloat16: two.
    assert compiled.asm["ptx"].count("ld.global.v4") == 8
    assert compiled.asm["ptx"].count("st.global.v4") == 2


def test_a_cpu_and_float64_do_without() -> None:
    assert choose_kernel(torch.device("cpu"), torch.float32).kernel == "torch"
    assert "float64" in choose_kernel(CUDA, torch.float64).reason


def test_a_gpu_takes_it_when_a_trial_is_right(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(softmax_pass, "_trial_is_right", lambda device: True)
    assert choose_kernel(CUDA, torch.float32).kernel == "triton"


def test_a_gpu_without_triton_says_so_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.warns(UserWarning, match="triton is not installed") as told:
        choices = [choose_kernel(CUDA, torch.float32) for _ in range(3)]
    assert len(told) == 1 and {choice.kernel for choice in choices} == {"torch"}


@pytest.mark.parametrize("failure", ["wrong", "raises"])
def test_a_kernel_that_fails_on_its_trial_is_not_taken(failure: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def trial(device: torch.device) -> bool:
        if failure == "raises":
            raise RuntimeError("no C compiler\nlong story")
        return False

    monkeypatch.setattr(softmax_pass, "_trial_is_right", trial)
    with pytest.warns(UserWarning, match="wrong" if failure == "wrong" else "RuntimeError: no C compiler$"):
        assert choose_kernel(CUDA, torch.float32).kernel == "torch"


@pytest.mark.parametrize(("vocabulary", "rows"), [(32_000, 8192), (128_256, 2432), (256_000, 1152), (10**7, 128)])
def test_chunks_of_a_gpu_are_whole_tiles_within_the_budget(vocabulary: int, rows: int) -> None:
    weight = torch.empty(vocabulary, 4096, dtype=torch.bfloat16, device="meta")
    assert fused._most_chunk_rows(weight) == rows
    assert 4 * vocabulary * rows <= 1.25e9 or rows == fused._GPU_TILE_ROWS


def test_chunks_are_even_and_whole_tiles() -> None:
    assert fused._even_chunk_rows(16_384, 3584, tile_rows=128) == 3328  # 5 chunks: 4 of 3328 and one of 3072
    assert fused._even_chunk_rows(100, 3584, tile_rows=128) == 100
    assert fused._even_chunk_rows(0, 3584, tile_rows=128) == 1
