"""What an optimizer step uses and leaves, whole: gradients, weights and moments; and digests of what ranks hold."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_grad, safe_get_full_optimizer_state
from torch import Tensor, nn

from seqaware.engine.engine import Engine


@contextmanager
def before_optimizer_steps(engine: Engine, look: Callable[[], None]) -> Iterator[None]:
    """Inside, `look` is called when the gradients are summed over micro-batches and ranks, and clipping is next.

    Under ZeRO, DeepSpeed finishes the reduction inside its own `step()`, so the optimizer's is the only place where
    every stage has the whole gradient and none has used it. Without ZeRO the engine reduces, clips and steps.
    """
    if engine.zero_stage == 0:
        owner, name = engine, "_reduce_gradients"
    else:
        owner, name = engine.deepspeed.optimizer, "step"
    call = getattr(owner, name)

    def reduce_and_look() -> None:
        call()
        look()

    def look_and_step(*arguments: object, **options: object) -> object:
        look()
        return call(*arguments, **options)

    setattr(owner, name, reduce_and_look if engine.zero_stage == 0 else look_and_step)
    try:
        yield
    finally:
        delattr(owner, name)


def full_gradients(engine: Engine) -> Iterator[tuple[str, Tensor]]:
    """Every trained parameter's gradient by name, in the order of the model; float32 or the dtype of accumulation.

    Meant for `before_optimizer_steps`. Collective: every rank must take all of them. One is whole at a time.
    """
    for name, parameter in trained_parameters(engine):
        gradient = safe_get_full_grad(parameter)
        yield name, torch.zeros(_shape(parameter)) if gradient is None else gradient.detach().view(_shape(parameter))


def full_weights(engine: Engine) -> Iterator[tuple[str, Tensor]]:
    """Every trained parameter by name, in the float32 that the optimizer updates. Collective, as `full_gradients`."""
    for name, parameter in trained_parameters(engine):
        weights = safe_get_full_fp32_param(parameter)
        yield name, (parameter if weights is None else weights).detach().view(_shape(parameter))


def full_moments(engine: Engine, moments: Iterable[tuple[str, str]]) -> Iterator[tuple[tuple[str, str], Tensor]]:
    """Moments of the optimizer by the parameter's name and their own. Collective, as `full_gradients`."""
    parameters = dict(trained_parameters(engine))
    optimizer = engine.deepspeed.optimizer
    if hasattr(optimizer, "_hp_optimizer_states_linked"):
        # DeepSpeed 0.19.8 links the moments of all groups after the first step of the first group, when the others have
        # none yet: ZeRO-1 and 2 in float32 would find no moments of vectors.
        optimizer._hp_optimizer_states_linked = False
        optimizer._lazy_init_hp_params_optimizer_state()
    for name, moment in moments:
        parameter = parameters[name]
        if engine.zero_stage == 0:
            state = engine.deepspeed.optimizer.state[parameter][moment]
        else:
            state = safe_get_full_optimizer_state(parameter, moment)
        yield (name, moment), state.detach().view(_shape(parameter))


def rates_of_groups(engine: Engine) -> list[float]:
    """The learning rates with which the optimizer itself would step now."""
    optimizer = engine.deepspeed.optimizer
    return [float(group["lr"]) for group in getattr(optimizer, "optimizer", optimizer).param_groups]


def trained_parameters(engine: Engine) -> Iterator[tuple[str, nn.Parameter]]:
    """The parameters that the run trains, by their names in the model of transformers."""
    for name, parameter in engine.wrapped.model.named_parameters():
        if parameter.requires_grad:
            yield name, parameter


def digest_of_weights(engine: Engine) -> str:
    """SHA-256 of what this rank holds of the weights; equal digests mean equal values (−0 counts as 0)."""
    return _digest(getattr(parameter, "ds_tensor", parameter) for _, parameter in trained_parameters(engine))


def digest_of_replicas(engine: Engine) -> str:
    """SHA-256 of what every rank should hold alike: weights that are whole here, and without ZeRO the moments."""
    # Of ZeRO-3's parameters only the small ones, which it keeps gathered, are whole between steps.
    model = engine.wrapped.model
    tensors = [p for p in model.parameters() if _is_whole(p)]
    if engine.zero_stage == 0:
        states = [engine.deepspeed.optimizer.state[parameter] for _, parameter in trained_parameters(engine)]
        tensors += [state[key] for state in states for key in sorted(state) if torch.is_tensor(state[key])]
    return _digest(tensors)


def _digest(tensors: Iterable[Tensor]) -> str:
    digest = hashlib.sha256()
    for tensor in tensors:
        # A byte has no sum with 0.0 that is a byte: quantized weights are taken as they are.
        held = tensor.detach() + 0.0 if tensor.is_floating_point() else tensor.detach()
        digest.update(held.contiguous().flatten().view(torch.uint8).cpu().numpy().tobytes())
    return digest.hexdigest()


def _is_whole(parameter: nn.Parameter) -> bool:
    status = getattr(parameter, "ds_status", None)
    return status is None or status.name == "AVAILABLE"


def _shape(parameter: nn.Parameter) -> torch.Size:
    shape: torch.Size = getattr(parameter, "ds_shape", parameter.shape)
    return shape
