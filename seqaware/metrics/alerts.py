"""What is worth a word while a run goes on: said once when it begins, in words that a person can act on."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from statistics import median, median_low
from typing import Any

_WINDOW = 50
_MANY = 5
# The loss of a run that diverges leaves its best by a share of it, and by more than noise does near zero.
_RISEN_SHARE = 0.25
_RISEN_NATS = 0.1
# Devices of one kind differ by some percent; a rank that is this much slower is not one of them.
_SLOW_FACTOR = 1.3
_SLOW = "slow rank"


@dataclass(frozen=True)
class Limits:
    """What the config says of a healthy run. max_grad_norm: 0 clips nothing. total_steps: None where not known."""

    max_grad_norm: float
    total_steps: int | None


class Alerts:
    """Looks at every step's line; `see` returns what has become true with it and was not before."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._losses: deque[float] = deque(maxlen=_WINDOW)
        self._norms: deque[float] = deque(maxlen=_WINDOW)
        self._rates: deque[float] = deque(maxlen=_MANY)
        self._best = math.inf
        self._standing: dict[str, str] = {}

    @property
    def standing(self) -> list[str]:
        """What is true now."""
        return list(self._standing.values())

    def see(self, line: Mapping[str, Any]) -> list[str]:
        """Take in a line of metrics.jsonl."""
        match line.get("kind"):
            case "step":
                found = {**self._of_step(line), **{k: v for k, v in self._standing.items() if k == _SLOW}}
            case "pace":
                found = {**{k: v for k, v in self._standing.items() if k != _SLOW}, **dict(self._slow(line))}
            case _:
                return []
        new = [text for name, text in found.items() if name not in self._standing]
        self._standing = found
        return new

    def _of_step(self, line: Mapping[str, Any]) -> dict[str, str]:
        if not {"unweighted_loss", "grad_norm", "lr"} <= line.keys():
            return dict(self._standing)  # of another version, or not written by us
        self._losses.append(float(line["unweighted_loss"]))
        self._norms.append(float(line["grad_norm"]))
        self._rates.append(float(line["lr"]))
        if len(self._losses) == _WINDOW:
            self._best = min(self._best, median(self._losses))
        return dict(self._found(int(line["step"])))

    def _found(self, step: int) -> Iterator[tuple[str, str]]:
        full = len(self._losses) == _WINDOW
        if full and (risen := self._risen()):
            yield "divergence", risen
        limit = self._limits.max_grad_norm
        if full and limit and min(self._norms) > limit:
            usual = median(self._norms)
            yield (
                "clipping",
                f"the gradient was clipped at each of the last {_WINDOW} steps (median norm {usual:.3g}, "
                f"max_grad_norm {limit:g}): clipping decides the size of the steps; lower the learning rate, raise "
                "max_grad_norm, or write training.sft.normalize_by: weight",
            )
        left = (self._limits.total_steps or step) - step
        if len(self._rates) == _MANY and left > _MANY and max(self._rates) == 0.0:
            yield "dead rate", f"the learning rate is 0, and {left} steps are left: nothing more is learnt"
        if full and max(self._norms) == 0.0:
            yield "dead gradient", f"the gradient was 0 at each of the last {_WINDOW} steps: nothing is learnt"

    def _risen(self) -> str | None:
        recent = median(self._losses)
        if recent <= self._best + max(_RISEN_NATS, _RISEN_SHARE * abs(self._best)):
            return None
        return (
            f"the loss rises: its median over the last {_WINDOW} steps is {recent:.4f} nats a token, after "
            f"{self._best:.4f} at its best; if it goes on, take a checkpoint from before and a lower learning rate"
        )

    def _slow(self, line: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
        """Whether one rank's device is slower than the others', in a line of `engine.pace`."""
        seconds = [float(value) for value in line["seconds"]]
        slowest, usual = max(seconds), median_low(seconds)
        if len(seconds) < 2 or usual == 0.0 or slowest < _SLOW_FACTOR * usual:
            return
        rank = seconds.index(slowest)
        yield (
            _SLOW,
            f"rank {rank} on {line['hosts'][rank]} computes {slowest / usual:.1f} times slower than the "
            "others, which wait for it; look at its clock, its temperature and other processes there",
        )


def standing_alerts(lines: Iterable[Mapping[str, Any]], limits: Limits) -> list[str]:
    """What is true at the end of these lines."""
    alerts = Alerts(limits)
    for line in lines:
        alerts.see(line)
    return alerts.standing


def limits_of(plan: Mapping[str, Any]) -> Limits:
    """From a run's plan.json, or from what there is of it."""
    optimizer = ((plan.get("config") or {}).get("training") or {}).get("optimizer") or {}
    return Limits(float(optimizer.get("max_grad_norm", 0.0)), (plan.get("batches") or {}).get("total_steps"))
