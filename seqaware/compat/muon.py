"""DeepSpeed's Muon: imported without a compiler, and clipping the gradient rather than the orthogonalized update."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import cache, wraps
from typing import Any

import torch
from torch import Tensor

Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]


def import_muon() -> None:
    """Import DeepSpeed's Muon, which every ZeRO stage does to ask whether its optimizer is one.

    As it comes it hands functions to `torch.compile` at its import, and that imports the whole compiler: 570 modules,
    a second and a half of every start. Here they are handed over when they are first called.
    """
    from deepspeed.runtime import compiler

    at_once = compiler.compile
    compiler.compile = lambda: _when_called(at_once())
    try:
        import deepspeed.runtime.zero.muon.original_muon  # noqa: F401  # for what its import does
    finally:
        compiler.compile = at_once


def _when_called(decorate: Decorator) -> Decorator:
    def later(function: Callable[..., Any]) -> Callable[..., Any]:
        decorated = cache(lambda: decorate(function))

        @wraps(function)
        def call(*arguments: Any, **options: Any) -> Any:
            return decorated()(*arguments, **options)

        return call

    return later


@contextmanager
def marking(mark: Callable[[], None]) -> Iterator[None]:
    """Inside, `deepspeed.initialize` takes our marks for the matrices that Muon orthogonalizes.

    DeepSpeed (0.19.8) marks by name, all matrices without "embed" or "lm_head" in theirs: GPT-2's wte and wpe as well.
    """
    import deepspeed

    by_name = deepspeed.set_optimizer_flags
    deepspeed.set_optimizer_flags = lambda *_: mark()
    try:
        yield
    finally:
        deepspeed.set_optimizer_flags = by_name


def orthogonalize_for(dtype: torch.dtype) -> None:
    """Let DeepSpeed orthogonalize in float32 in a float32 run, from now on in this process.

    DeepSpeed (0.19.8) uses half precision wherever the device has it, CPUs too: an update is then some percent off that
    of another machine, whatever dtype the config asks for. A run in half precision keeps DeepSpeed's choice.

    Args:
        dtype: of the run's weights.
    """
    from deepspeed.runtime.zero.muon import original_muon

    choice = _choice_of_deepspeed()
    original_muon.ns_compute_dtype = _float32 if dtype == torch.float32 else choice


@cache
def _choice_of_deepspeed() -> Callable[..., torch.dtype]:
    from deepspeed.runtime.zero.muon import original_muon

    choice: Callable[..., torch.dtype] = original_muon.ns_compute_dtype
    return choice


def _float32(ns_method: str = "gram") -> torch.dtype:
    del ns_method
    return torch.float32


def orthogonalizing_dtype() -> torch.dtype:
    """The dtype in which DeepSpeed orthogonalizes here, after `orthogonalize_for`."""
    from deepspeed.runtime.zero.muon import original_muon

    dtype: torch.dtype = original_muon.ns_compute_dtype()
    return dtype


def clip_before_muon(zero: Any, *, stage: int) -> None:
    """Make a ZeRO optimizer measure and clip the gradient first, and orthogonalize the clipped gradient.

    DeepSpeed (0.19.8) orthogonalizes first: the norm it reports, and clips by, is that of the update, which says
    nothing about the gradient. Here its norm is taken of the gradient, its Muon is handed the gradient divided by the
    loss scale and by the clip factor, and the update is multiplied by both, because `unscale_and_clip_grads` divides
    every group by them afterwards.

    Args:
        zero: the optimizer of ZeRO stage 1, 2 or 3, around a MuonWithAuxAdam.
    """
    from deepspeed.runtime.bf16_optimizer import BF16_Optimizer

    if isinstance(zero, BF16_Optimizer):
        return  # stage 1 in bfloat16: it clips first by itself
    if stage == 3:
        _clip_partitions(zero)
    elif zero.cpu_offload:
        _clip_offloaded(zero)
    else:
        _clip_whole_gradients(zero)


def _clip_partitions(zero: Any) -> None:
    """Stage 3: each rank holds a part of every gradient; Muon gathers them in place."""
    from deepspeed.runtime.utils import combine_grad_norm_groups

    measure, orthogonalize = zero._get_norm_groups, zero._apply_muon_to_accumulated_grads

    def norms_of_gradients() -> list[Any]:
        zero.sub_groups_lacking_loss_scale.clear()
        norms: list[Any] = measure()
        factor = _clip_factor(zero, combine_grad_norm_groups(norms))
        if factor is not None:
            scale = factor if zero.offload_optimizer else factor * zero.loss_scale
            groups = [i for i, is_muon in enumerate(zero.sub_groups_using_muon) if is_muon and zero.fp16_groups[i]]
            parts = [part for i in groups for part in _parts(zero, i)]
            _divide(parts, scale)
            orthogonalize()
            _multiply(parts, scale)
        zero.sub_groups_lacking_loss_scale.clear()
        return norms

    zero._apply_muon_to_accumulated_grads = lambda: None
    zero._get_norm_groups = norms_of_gradients


def _parts(zero: Any, sub_group: int) -> list[Tensor]:
    if zero.offload_optimizer:
        return [zero.fp32_partitioned_groups_flat[sub_group].grad]
    parts: list[Tensor] = zero.averaged_gradients[sub_group]
    return parts


def _clip_offloaded(zero: Any) -> None:
    """Stages 1 and 2 with the optimizer in CPU memory: Muon gathers what the ranks hold, in place."""
    measure, orthogonalize = zero.scaled_global_norm, zero._apply_muon_updates_cpu_offload

    def norm_of_gradients() -> Tensor:
        norm: Tensor = measure()
        factor = _clip_factor(zero, norm)
        if factor is not None:
            flats = [zero.single_partition_of_fp32_groups[i].grad for i in _muon_groups(zero)]
            scale = factor.cpu()
            _divide(flats, scale)
            orthogonalize()
            _multiply(flats, scale)
        return norm

    zero._apply_muon_updates_cpu_offload = lambda: None
    zero.scaled_global_norm = norm_of_gradients


def _clip_whole_gradients(zero: Any) -> None:
    """Stages 1 and 2: a rank has the whole gradients of its partition, and Muon cuts the updates out of them.

    Until the step they are kept whole, beside views of the parts that the rank owns.
    """
    measure, partition = zero.scaled_global_norm, zero.get_flat_partition
    kept: dict[int, tuple[Callable[[], list[Tensor]], list[Tensor]]] = {}

    def part_of_gradient(parameters: list[Any], *arguments: Any, param_group_idx: int, **options: Any) -> Any:
        def cut() -> Any:
            return partition(parameters, *arguments, param_group_idx=param_group_idx, **options)

        if not parameters or param_group_idx not in _muon_groups(zero):
            return cut()
        kept[param_group_idx] = cut, zero.all_grad_tensors[param_group_idx]
        for parameter in parameters:
            parameter.use_muon = False
        try:
            return cut()
        finally:
            for parameter in parameters:
                parameter.use_muon = True

    def norm_of_gradients() -> Tensor:
        norm: Tensor = measure()
        factor = _clip_factor(zero, norm)
        if factor is not None:
            scale = factor * zero.loss_scale
            for group, (cut, gradients) in kept.items():
                _divide(gradients, scale)
                zero.all_grad_tensors[group] = gradients
                zero.averaged_gradients[group] = cut()
                zero.all_grad_tensors[group] = None
                _multiply(zero.averaged_gradients[group], scale)
        kept.clear()
        zero.groups_lacking_loss_scale.clear()
        return norm

    zero.get_flat_partition = part_of_gradient
    zero.scaled_global_norm = norm_of_gradients


def _muon_groups(zero: Any) -> list[int]:
    return [i for i, group in enumerate(zero.optimizer.param_groups) if group["use_muon"]]


def _clip_factor(zero: Any, scaled_norm: Tensor) -> Tensor | None:
    """What clipping divides the gradient by, at least 1; None where the norm is not finite and the step is skipped."""
    from deepspeed.runtime.utils import is_invalid_grad_norm

    if is_invalid_grad_norm(scaled_norm):
        return None
    if not zero.clip_grad:
        return torch.ones_like(scaled_norm)
    # As unscale_and_clip_grads of all stages has it, and torch's clip_grad_norm_, which clips without ZeRO.
    factor: Tensor = ((scaled_norm / zero.loss_scale + 1e-6) / zero.clip_grad).clamp(min=1.0)
    return factor


def _divide(tensors: Iterable[Tensor], scale: Tensor) -> None:
    for tensor in tensors:
        tensor.div_(scale)


def _multiply(tensors: Iterable[Tensor], scale: Tensor) -> None:
    for tensor in tensors:
        tensor.mul_(scale)
