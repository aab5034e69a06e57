"""Keep the module trace of ZeRO-3 to what training does.

DeepSpeed records in one micro-batch which modules run and which weights each of them reads, and from then on gathers
weights ahead by that trace. Two things make the trace wrong (DeepSpeed 0.19.8). The next forward then ends with a
"tracing error", or every micro-batch gathers all weights twice:

- A forward without a backward (evaluation, generation, the start-up probes) is recorded like one of training.
- A module reads a weight that it does not own, as the fused loss reads the head's. DeepSpeed notes that only if the
  weight is not gathered at that moment. A weight below the persistence threshold stays gathered until something else
  releases it, such as an export. The next forward then notes a weight that the trace lacks.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class ModuleTrace:
    """The trace of one DeepSpeed engine at ZeRO-3. All ranks make the same calls: the next forward compares traces."""

    def __init__(self, engine: Any) -> None:
        self._coordinator = engine.optimizer.parameter_offload.get_param_coordinator()
        self._modules = tuple(engine.module.modules())

    @contextmanager
    def forward_only(self) -> Iterator[None]:
        """Around forwards without a backward: follow a complete trace, and record none."""
        follows = self._coordinator.is_complete_trace()
        yield
        if follows and self._coordinator.is_complete_trace():
            self._coordinator.reset_step()  # waits for the weights that were gathered ahead for a backward
        else:
            self._forget()

    @contextmanager
    def any_forward(self) -> Iterator[None]:
        """Around every forward: drop the trace where a module turns out to read a weight that it does not own."""
        before = self._borrowed()
        yield
        if self._borrowed() != before:
            self._forget()

    def _borrowed(self) -> int:
        return sum(len(module._external_params) for module in self._modules)

    def _forget(self) -> None:
        if not self._coordinator.is_invalid_trace():
            self._coordinator._invalidate_trace()
