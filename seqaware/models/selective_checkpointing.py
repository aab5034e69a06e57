"""Selective activation checkpointing: a layer keeps what costs most to compute, and computes the rest again.

Kept are the results of the weights' products and of attention. Norms, activations, rotations and sums are cheap, and
most of what autograd saves: they run again when the layer goes backward, on the kept results.

`create_selective_checkpoint_contexts` of torch.utils.checkpoint would do, but that it wants the second forward to call
the operations of the first, and ZeRO-3 gathers weights in another order then. Here only kept operations are counted.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.checkpoint import checkpoint

from seqaware.estimate.layout import is_thin

_PRODUCTS = (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)
_Kept = defaultdict[Any, deque[Any]]
"""Results of each operation, in the order of its calls."""


def recompute_selected(function: Callable[..., Any], *inputs: Any) -> Any:
    """`function(*inputs)`, of which only inputs, products and attention are kept for the backward."""
    return checkpoint(function, *inputs, use_reentrant=False, context_fn=_contexts)


def _contexts() -> tuple[TorchDispatchMode, TorchDispatchMode]:
    kept: _Kept = defaultdict(deque)
    return _Keep(kept), _TakeKept(kept)


def _is_kept(operation: Any, given: tuple[Any, ...]) -> bool:
    name = operation.name()
    if "attention" in name or "attn" in name:
        return True
    # LoRA's second factor is cheaper to compute again: its result is as large as that of the layer beside it, and in
    # DoRA as large as a weight.
    return operation in _PRODUCTS and not is_thin(*given[-1].shape)


class _Keep(TorchDispatchMode):
    """Around the forward."""

    def __init__(self, kept: _Kept) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._kept = kept
        self._places: set[int] = set()

    def __torch_dispatch__(
        self, operation: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if args and isinstance(args[0], Tensor) and _in_place(operation):
            self._save_from_change(args[0])
        result = operation(*args, **(kwargs or {}))
        if _is_kept(operation, args):
            self._kept[operation].append(tree_map_only(Tensor, self._noted, result))
        return result

    def _noted(self, tensor: Tensor) -> Tensor:
        self._places.add(_place(tensor))
        # Without the graph that autograd is about to hang on the result.
        return tensor.detach()

    def _save_from_change(self, tensor: Tensor) -> None:
        """An operation in place, such as a bias that ZeRO-3's linear layer adds, gets what was kept to itself."""
        place = _place(tensor)
        if place not in self._places:
            return
        self._places.remove(place)

        def own(kept: Tensor) -> Tensor:
            return kept.clone() if _place(kept) == place else kept

        for results in self._kept.values():
            for number, result in enumerate(results):
                results[number] = tree_map_only(Tensor, own, result)


class _TakeKept(TorchDispatchMode):
    """Around the forward that runs again; what it takes is its own."""

    def __init__(self, kept: _Kept) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._kept = kept

    def __torch_dispatch__(
        self, operation: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if _is_kept(operation, args):
            return self._kept[operation].popleft()
        return operation(*args, **(kwargs or {}))

    def __exit__(self, *error: Any) -> None:
        # Torch stops once all that autograd saves is there: nobody asks for the last product.
        self._kept.clear()
        super().__exit__(*error)  # type: ignore[no-untyped-call]


def _place(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _in_place(operation: Any) -> bool:
    """By the name, as aten::add_.Tensor has it."""
    name: str = operation.name()
    return name.partition(".")[0].endswith("_")
