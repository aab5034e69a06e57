"""Which attention is taken and what is said of the others; and that each backend is called as its version wants it."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import CheckpointError, checkpoint
from transformers import (
    BioGptConfig,
    BioGptForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

from seqaware.config.packages import FLASH_MODULES, is_installed
from seqaware.errors import ConfigError
from seqaware.models import attention, attention_choice
from seqaware.models.attention import BACKENDS, AttentionCall, Documents
from seqaware.models.attention_choice import AttentionChoice, attention_of, choose_backend
from seqaware.models.attention_trial import Trial
from tests.unit.models import varlen_fakes

BF16 = torch.bfloat16
HOPPER, AMPERE, TURING = (9, 0), (8, 0), (7, 5)


@pytest.fixture(autouse=True)
def forgotten() -> Iterator[None]:
    yield
    attention.varlen_function.cache_clear()
    attention.takes_grouped_heads.cache_clear()


def install(patch: pytest.MonkeyPatch, **packages: str) -> None:
    """flash_attn and flash_attn_interface: `works`, `broken` (its import fails) or `old` (lacks the function)."""
    find, import_module = importlib.util.find_spec, importlib.import_module

    def found(name: str, *rest: Any) -> Any:
        return find("json") if name in packages else None if name.startswith("flash_attn") else find(name, *rest)

    def imported(name: str, *rest: Any) -> Any:
        if packages.get(name) == "broken":
            raise ImportError(f"{name}: undefined symbol\nand more")
        module = ModuleType(name)
        if packages.get(name) == "works":
            module.flash_attn_varlen_func = varlen_fakes.flash_attn_varlen_func  # type: ignore[attr-defined]
        return module if name in packages else import_module(name, *rest)

    patch.setattr(importlib.util, "find_spec", found)
    patch.setattr(importlib, "import_module", imported)


@pytest.mark.parametrize(
    ("packages", "capability", "backend", "said"),
    [
        ({}, HOPPER, "varlen", ["flash_attn_interface, which is not", "flash_attn, which is not installed"]),
        ({"flash_attn": "works"}, HOPPER, "flash_attention_2", ["flash_attn_interface, which is not installed"]),
        ({"flash_attn": "works", "flash_attn_interface": "works"}, HOPPER, "flash_attention_3", []),
        ({"flash_attn_interface": "works"}, AMPERE, "varlen", ["needs compute capability 9.0, this GPU has 8.0"]),
        ({"flash_attn": "broken"}, AMPERE, "varlen", ["cannot be imported: flash_attn: undefined symbol"]),
        ({"flash_attn": "old"}, AMPERE, "varlen", ["has no flash_attn_varlen_func"]),
        ({"flash_attn": "works"}, TURING, "sdpa_per_document", ["varlen needs compute capability 8.0"]),
    ],
)
def test_the_fastest_that_can_run_is_taken_and_the_others_are_told_of(
    packages: dict[str, str],
    capability: tuple[int, int],
    backend: str,
    said: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    install(monkeypatch, **packages)
    choice = choose_backend("auto", device="cuda", dtype=BF16, head_dim=64, capability=capability)
    assert choice.backend == backend
    assert all(text in choice.reason for text in said), choice.reason
    assert "\n" not in choice.reason


@pytest.mark.parametrize(
    ("dtype", "head_dim", "said"), [(torch.float32, 64, "not float32"), (BF16, 512, "has 512"), (BF16, 60, "has 60")]
)
def test_what_no_gpu_kernel_takes_goes_document_by_document(dtype: torch.dtype, head_dim: int, said: str) -> None:
    choice = choose_backend("auto", device="cuda", dtype=dtype, head_dim=head_dim, capability=HOPPER)
    assert choice.backend == "sdpa_per_document" and said in choice.reason
    with pytest.raises(ConfigError, match=said):
        choose_backend("varlen", device="cuda", dtype=dtype, head_dim=head_dim, capability=HOPPER)


def test_who_drops_out_is_given_attention_that_can(monkeypatch: pytest.MonkeyPatch) -> None:
    choose = partial(choose_backend, device="cuda", dtype=BF16, head_dim=64, capability=HOPPER, dropout=0.1)
    install(monkeypatch, flash_attn_interface="works")
    choice = choose("auto")
    assert choice.backend == "sdpa_per_document"
    assert "flash_attention_3 has no dropout; this model's attention has 0.1" in choice.reason
    with pytest.raises(ConfigError, match="varlen cannot run here: it has no dropout"):
        choose("varlen")
    install(monkeypatch, flash_attn="works")
    assert choose("auto").backend == "flash_attention_2"


def test_a_cpu_says_why() -> None:
    assert "loop over the documents" in choose_backend("auto", device="cpu", dtype=BF16, head_dim=64).reason
    assert choose_backend("eager", device="cpu", dtype=BF16, head_dim=512).backend == "eager"


def _problem(key_heads: int) -> tuple[tuple[Tensor, Tensor, Tensor], Documents]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((20, 4, 8), (20, key_heads, 8), (20, key_heads, 8))
    q, k, v = (torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_() for shape in shapes)
    return (q, k, v), Documents(torch.tensor([0, 9, 10, 20], dtype=torch.int32), (9, 1, 10), "varlen")


def _outcome(backend: str, key_heads: int, window: int | None) -> tuple[Tensor, ...]:
    tensors, documents = _problem(key_heads)
    call = AttentionCall(scale=0.3, dropout=0.0, window=window, softcap=None)
    output = BACKENDS[backend](*tensors, documents, call)
    return output, *torch.autograd.grad(output.square().sum(), tensors)


@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("key_heads", [4, 2])
@pytest.mark.parametrize(
    ("function", "grouped"),
    [
        (varlen_fakes.torch_2_13, True),
        (varlen_fakes.torch_2_11, True),
        (varlen_fakes.torch_2_11_strict, False),
        (varlen_fakes.torch_2_11_wrong, False),
    ],
)
def test_varlen_of_every_version_gives_what_the_loop_gives(
    function: Callable[..., Tensor],
    grouped: bool,
    key_heads: int,
    window: int | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from torch.nn.attention import varlen

    monkeypatch.setattr(varlen, "varlen_attn", function)
    ours, expected = _outcome("varlen", key_heads, window), _outcome("sdpa_per_document", key_heads, window)
    for got, want in zip(ours, expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    assert attention.takes_grouped_heads(torch.device("cpu"), torch.float64) is grouped


def test_a_recomputed_layer_holds_no_trial_of_the_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its trial in the first forward saves tensors that the second does not: the backward would refuse the layer."""
    from torch.nn.attention import varlen

    monkeypatch.setattr(varlen, "varlen_attn", varlen_fakes.torch_2_13)
    tensors, documents = _problem(key_heads=2)
    call = AttentionCall(scale=0.3, dropout=0.0, window=None, softcap=None)

    def gradients() -> tuple[Tensor, ...]:
        output = checkpoint(BACKENDS["varlen"], *tensors, documents, call, use_reentrant=False)
        return torch.autograd.grad(output.square().sum(), tensors)

    with pytest.raises(CheckpointError):
        gradients()
    attention.takes_grouped_heads.cache_clear()
    attention.takes_grouped_heads(torch.device("cpu"), torch.float64)
    for got, want in zip(gradients(), _outcome("varlen", 2, None)[1:], strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=0)


def _installed(monkeypatch: pytest.MonkeyPatch, version: str, function: Callable[..., Any]) -> None:
    package = ModuleType(FLASH_MODULES[version])
    package.flash_attn_varlen_func = function  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, FLASH_MODULES[version], package)


FLASH = {
    "flash_attention_2": varlen_fakes.flash_attn_varlen_func,
    "flash_attention_4": varlen_fakes.flash_attn_4_varlen_func,
}


CPU = torch.device("cpu")


def _model(**changes: Any) -> LlamaForCausalLM:
    sizes = {"num_hidden_layers": 1, "hidden_size": 16, "num_attention_heads": 8, "num_key_value_heads": 1}
    return LlamaForCausalLM(LlamaConfig(**sizes, head_dim=24, vocab_size=16, intermediate_size=16, **changes))


def _chosen(monkeypatch: pytest.MonkeyPatch, backend: str) -> list[dict[str, Any]]:
    """What the choice is asked; it takes this backend, though this is a CPU."""
    asked: list[dict[str, Any]] = []

    def choose(name: str, **need: Any) -> AttentionChoice:
        asked.append(need)
        return AttentionChoice(backend, name)

    monkeypatch.setattr(attention_choice, "choose_backend", choose)
    return asked


def test_a_model_is_asked_for_its_heads_and_dropout(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = _chosen(monkeypatch, "sdpa_per_document")
    gpt2 = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=48, n_head=3, vocab_size=16, attn_pdrop=0.2))
    sizes = {"hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 3, "intermediate_size": 8}
    biogpt = BioGptForCausalLM(BioGptConfig(vocab_size=16, attention_probs_dropout_prob=0.3, **sizes))
    for model in (gpt2, biogpt, _model()):
        attention_of(model, "auto", device=CPU, dtype=BF16)
    assert [(need["head_dim"], need["dropout"]) for need in asked] == [(16, 0.2), (8, 0.3), (24, 0.0)]


def test_varlen_is_asked_for_grouped_heads_before_the_first_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.nn.attention import varlen

    monkeypatch.setattr(varlen, "varlen_attn", varlen_fakes.torch_2_13)
    _chosen(monkeypatch, "varlen")
    attention_of(_model(), "auto", device=CPU, dtype=torch.float32)
    assert attention.takes_grouped_heads.cache_info().misses == 1


@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("version", FLASH)
def test_flash_attention_gives_what_the_loop_gives(
    version: str, window: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    _installed(monkeypatch, version, FLASH[version])
    ours, expected = _outcome(version, 2, window), _outcome("sdpa_per_document", 2, window)
    for got, want in zip(ours, expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


def test_dropout_is_not_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    _installed(monkeypatch, "flash_attention_4", varlen_fakes.flash_attn_4_varlen_func)
    tensors, documents = _problem(key_heads=2)
    call = AttentionCall(scale=0.3, dropout=0.1, window=None, softcap=None)
    with pytest.raises(ConfigError, match="has no dropout"):
        BACKENDS["flash_attention_4"](*tensors, documents, call)


def test_version_4_is_taken_only_where_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, **{"flash_attn.cute": "works"})
    choose = partial(choose_backend, device="cuda", dtype=BF16, head_dim=64)
    assert choose("auto", capability=HOPPER).backend == "varlen"
    assert choose("flash_attention_4", capability=HOPPER).backend == "flash_attention_4"
    with pytest.raises(ConfigError, match="needs compute capability"):
        choose("flash_attention_4", capability=AMPERE)


def _seeing_the_next(*tensors: Tensor, **options: Any) -> tuple[Tensor, None]:
    """Later tokens of a document see one that comes after them."""
    q, k, v = tensors
    output, _ = varlen_fakes.flash_attn_4_varlen_func(q, k, v, **options)
    later = torch.arange(q.shape[0]) % 250 > 128
    leak = v.roll(-1, 0).repeat_interleave(q.shape[1] // v.shape[1], dim=1) / 250
    return torch.where(later[:, None, None], output + leak, output), None


def _without_windows(*tensors: Tensor, **options: Any) -> tuple[Tensor, None]:
    return varlen_fakes.flash_attn_4_varlen_func(*tensors, **{**options, "window_size": (None, None)})


class CompilerError(Exception):
    """As kernels that are compiled as they are called raise it."""


def _failing(*tensors: Tensor, **options: Any) -> tuple[Tensor, None]:
    raise CompilerError("Unsupported compute capability\nand more")


@pytest.mark.parametrize(
    ("function", "said"),
    [
        (_seeing_the_next, "output is off by"),
        (_without_windows, "output is off by"),
        (_failing, "CompilerError: Unsupported compute"),
    ],
)
def test_version_4_is_tried_before_it_is_trusted(
    function: Callable[..., Any], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    _chosen(monkeypatch, "flash_attention_4")
    model = _model()
    model.config.sliding_window = 4
    trial = partial(attention_of, model, "flash_attention_4", device=CPU, dtype=torch.float32)
    _installed(monkeypatch, "flash_attention_4", varlen_fakes.flash_attn_4_varlen_func)
    assert trial().backend == "flash_attention_4"
    _installed(monkeypatch, "flash_attention_4", function)
    with pytest.raises(ConfigError, match=f"does not work here; got {said}"):
        trial()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("head_dim", [64, 256])
def test_right_kernels_pass_the_trial_in_any_dtype(dtype: torch.dtype, head_dim: int) -> None:
    trial = Trial((4, 2, head_dim), (250, 1, 5), CPU, dtype)
    call = AttentionCall(scale=head_dim**-0.5, dropout=0.0, window=None, softcap=None)
    assert attention.difference(BACKENDS["eager"], BACKENDS["sdpa_per_document"], trial=trial, call=call) is None


def test_a_module_in_a_package_that_is_not_there_is_not_installed() -> None:
    assert is_installed("torch.nn") and not is_installed("torch.nowhere") and not is_installed("nowhere.at.all")


@pytest.mark.parametrize("line", ["import einops_of_another_year", "raise OSError('undefined symbol')"])
def test_a_package_that_is_broken_is_told_as_such(line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "flash_attn" / "cute").mkdir(parents=True)
    (tmp_path / "flash_attn" / "cute" / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    choose = partial(choose_backend, device="cuda", dtype=BF16, head_dim=64, capability=HOPPER)
    with pytest.raises(ConfigError, match="needs the package flash_attn, which is not installed"):
        choose("flash_attention_2")  # a folder around version 4 is no version 2
    with pytest.raises(ConfigError, match="has no flash_attn_varlen_func"):
        choose("flash_attention_4")
    for name in ("flash_attn", "flash_attn.cute"):
        sys.modules.pop(name)
    importlib.invalidate_caches()
    (tmp_path / "flash_attn" / "__init__.py").write_text(line)
    with pytest.raises(ConfigError, match="is installed but cannot be imported"):
        choose("flash_attention_4")
