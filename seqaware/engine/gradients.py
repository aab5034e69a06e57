"""What an optimizer step is about to use: every parameter's gradient, whole, and a digest of the weights."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from deepspeed.utils import safe_get_full_grad
from torch import Tensor, nn

from seqaware.engine.engine import Engine


@contextmanager
def before_optimizer_steps(engine: Engine, look: Callable[[], None]) -> Iterator[None]:
    """Inside, `look` is called when the gradients are summed over micro-batches and ranks, and the optimizer is next.

    DeepSpeed finishes the reduction inside its own `step()`, so the optimizer's is the only place where every ZeRO
    stage has the whole gradient and none has used it. Without ZeRO we clip before that: not in here.
    """
    optimizer, limit = engine.deepspeed.optimizer, engine.max_grad_norm
    step = optimizer.step

    def look_and_step(*arguments: object, **options: object) -> object:
        look()
        return step(*arguments, **options)

    optimizer.step = look_and_step
    engine.max_grad_norm = 0.0
    try:
        yield
    finally:
        optimizer.step = step
        engine.max_grad_norm = limit


def full_gradients(engine: Engine) -> Iterator[tuple[str, Tensor]]:
    """Every trained parameter's gradient by name, in the order of the model; float32 or the dtype of accumulation.

    Meant for `before_optimizer_steps`. Collective: every rank must take all of them. One is whole at a time.
    """
    for name, parameter in trained_parameters(engine):
        gradient = safe_get_full_grad(parameter)
        yield name, torch.zeros(_shape(parameter)) if gradient is None else gradient.detach().view(_shape(parameter))


def trained_parameters(engine: Engine) -> Iterator[tuple[str, nn.Parameter]]:
    """The parameters that the run trains, by their names in the model of transformers."""
    for name, parameter in engine.wrapped.model.named_parameters():
        if parameter.requires_grad:
            yield name, parameter


def digest_of_weights(engine: Engine) -> str:
    """SHA-256 of what this rank holds of the weights; equal digests mean equal values (−0 counts as 0)."""
    digest = hashlib.sha256()
    for _, parameter in trained_parameters(engine):
        held = getattr(parameter, "ds_tensor", parameter).detach()
        digest.update((held + 0.0).contiguous().view(torch.uint8).cpu().numpy().tobytes())
    return digest.hexdigest()


def _shape(parameter: nn.Parameter) -> torch.Size:
    shape: torch.Size = getattr(parameter, "ds_shape", parameter.shape)
    return shape
