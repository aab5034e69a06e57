"""Which parameters ZeRO-3 holds whole at once, and how many it gathers: DeepSpeed's coordinator, played on paper.

DeepSpeed 0.19 walks the trace of modules (forward, then backward). At each module it gathers what is missing, then
prefetches what comes next while fewer than `prefetch` weights are on their way and fewer than `max_live` are whole;
after the module it releases those of its parameters that do not come again within the next `reuse` weights of the
trace. Parameters smaller than `persistence` are always whole. (deepspeed/runtime/zero/partitioned_param_coordinator.py)
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate

from seqaware.estimate.decoder import Decoder, Module


@dataclass(frozen=True)
class GatherSettings:
    """Keys of the DeepSpeed JSON, in weights: prefetch_bucket_size, max_live_parameters, max_reuse_distance,
    param_persistence_threshold."""

    prefetch: int
    max_live: int
    reuse: int
    persistence: int


@dataclass(frozen=True)
class Gathering:
    """Of one micro-batch.

    Attributes:
        gathered: weights that all-gathers bring together, forward and backward.
        peak: the most weights that are whole at once. at_loss: those that are whole when the forward ends.
        early_backward: the most while the last layer goes backward, when all activations are still there.
        persistent: weights that are always whole, and counted in none of the above.
    """

    gathered: int
    peak: int
    at_loss: int
    early_backward: int
    persistent: int


@dataclass(frozen=True)
class _Visit:
    """A module computes. held: its parameters stay, because its backward waits for the layer to be computed again."""

    parameters: tuple[tuple[str, int], ...]
    moment: str  # forward, last_layer (backward) or backward
    held: bool = False


@lru_cache(maxsize=64)
def gathering(decoder: Decoder, settings: GatherSettings, *, recomputed: bool, whole_mlp: bool = False) -> Gathering:
    """Play one micro-batch of a recorded trace.

    Args:
        recomputed: checkpointing runs each layer's forward again. whole_mlp: an MLP is gathered as one module.
    """
    layer = _with_whole_mlp(decoder.layer) if whole_mlp else decoder.layer
    visits = tuple(_visits(decoder, layer, recomputed=recomputed))
    return _Coordinator(visits, settings).play()


def _with_whole_mlp(layer: tuple[Module, ...]) -> tuple[Module, ...]:
    first = 1 + [module.name for module in layer].index("mlp_norm")
    return *layer[:first], Module("mlp", tuple(size for module in layer[first:] for size in module.parameters))


def _visits(decoder: Decoder, modules: tuple[Module, ...], *, recomputed: bool) -> Iterator[_Visit]:
    before = [_visit(module, "") for module in decoder.embedding]
    layers = [[_visit(module, f"{number}.") for module in modules] for number in range(decoder.layers)]
    after = [_visit(module, "", tied=decoder.tied) for module in decoder.final]
    for parameters in (*before, *(module for layer in layers for module in layer), *after):
        yield _Visit(parameters, "forward")
    for parameters in reversed(after):
        yield _Visit(parameters, "last_layer")
    for number, layer in reversed(list(enumerate(layers))):
        moment = "last_layer" if number == decoder.layers - 1 else "backward"
        if recomputed:
            # The backward of the last module asks for what it saved, and that computes the layer again.
            yield _Visit(layer[-1], moment, held=True)
            yield from (_Visit(parameters, moment, held=parameters == layer[-1]) for parameters in layer)
        yield from (_Visit(parameters, moment) for parameters in reversed(layer))
    for parameters in reversed(before):
        yield _Visit(parameters, "backward")


def _visit(module: Module, prefix: str, *, tied: bool = False) -> tuple[tuple[str, int], ...]:
    name = "embedding" if tied and module.name == "head" else module.name
    return tuple((f"{prefix}{name}.{index}", size) for index, size in enumerate(module.parameters))


@dataclass
class _Bundle:
    """Parameters that one all-gather brings in one buffer of `size` weights."""

    size: int
    waiting: set[str]
    copied: bool = False


class _Coordinator:
    """What DeepSpeed keeps while it walks the trace, under its own names."""

    def __init__(self, visits: tuple[_Visit, ...], settings: GatherSettings) -> None:
        self.visits, self.settings = visits, settings
        self.sizes = {name: size for visit in visits for name, size in visit.parameters}
        self.persistent = {name for name, size in self.sizes.items() if size < settings.persistence}
        self.whole = set(self.persistent)
        self.uses: dict[str, deque[int]] = defaultdict(deque)
        for step, visit in enumerate(visits):
            for name, _ in visit.parameters:
                self.uses[name].append(step)
        # Weights of all visits before each one: how far a later use is away.
        self.before = [0, *accumulate(sum(size for _, size in visit.parameters) for visit in visits)]
        self.queue = deque((name, step) for step, visit in enumerate(visits) for name, _ in visit.parameters)
        self.fetched_for: dict[str, int] = defaultdict(lambda: -1)
        self.in_flight: dict[str, _Bundle] = {}
        self.live = self.gathered = self.copies = 0

    def play(self) -> Gathering:
        most: dict[str, int] = defaultdict(int)
        at_loss = 0
        for step, visit in enumerate(self.visits):
            self._fetch([name for name, _ in visit.parameters])
            self._wait(visit)
            self._leave_queue(visit, step)
            self._prefetch()
            most[visit.moment] = max(most[visit.moment], self.live + self.copies)
            if not visit.held:
                self._release(visit, step + 1)
            if visit.moment == "forward":
                at_loss = self.live + self.copies
        persistent = sum(self.sizes[name] for name in self.persistent)
        peak = max(most.values())
        return Gathering(self.gathered, peak, at_loss, most["last_layer"], persistent)

    def _fetch(self, names: Sequence[str]) -> None:
        missing = [name for name in names if name not in self.whole]
        size = sum(self.sizes[name] for name in missing)
        self.whole.update(missing)
        self.live += size
        self.gathered += size
        # Several parameters come in one buffer and are copied out of it; a single one stays where it came.
        if len(missing) > 1:
            bundle = _Bundle(size, set(missing))
            self.in_flight.update(dict.fromkeys(missing, bundle))

    def _wait(self, visit: _Visit) -> None:
        """The first module that needs one parameter of a bundle has all copied; the last one lets the buffer go."""
        for name, _ in visit.parameters:
            bundle = self.in_flight.pop(name, None)
            if bundle is None:
                continue
            if not bundle.copied:
                bundle.copied = True
                self.copies += bundle.size
            bundle.waiting.discard(name)
            if not bundle.waiting:
                self.copies -= bundle.size

    def _leave_queue(self, visit: _Visit, step: int) -> None:
        """Take this module's parameters off the queue, unless a prefetch already did."""
        waiting = {name for name, _ in visit.parameters if self.fetched_for[name] < step}
        for _ in range(len(waiting)):
            name, used_at = self.queue.popleft()
            self.fetched_for[name] = used_at

    def _prefetch(self) -> None:
        most = min(self.settings.max_live - self.live, self.settings.prefetch)
        coming: dict[str, int] = {}
        size = 0
        while self.queue and size < most:
            name, used_at = self.queue.popleft()
            self.fetched_for[name] = max(self.fetched_for[name], used_at)
            if name not in self.whole and name not in coming:
                coming[name] = used_at
                size += self.sizes[name]
        self._fetch(list(coming))

    def _release(self, visit: _Visit, step: int) -> None:
        """Let go of this module's parameters, but those that come again within the next `reuse` weights."""
        for name, size in visit.parameters:
            if name in self.persistent or self.fetched_for[name] > step or self._comes_again(name, step):
                continue
            self.whole.discard(name)
            self.live -= size

    def _comes_again(self, name: str, step: int) -> bool:
        uses = self.uses[name]
        while uses and uses[0] < step:
            uses.popleft()
        return bool(uses) and self.before[uses[0]] - self.before[step] < self.settings.reuse
