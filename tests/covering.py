"""Small, cheap sets of combinations in which all choices meet.

Every fault that needs two (three) certain choices at once shows in a set that covers every pair (triple) of choices.
"""

from __future__ import annotations

import itertools
import random
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

Combination = dict[str, Any]
"""One choice on every axis."""

_CANDIDATES = 200
_TRIES = 1000


def covering(
    axes: Mapping[str, Sequence[Any]],
    *,
    strength: int,
    valid: Callable[[Combination], bool],
    cheap: Mapping[str, Sequence[Any]] | None = None,
) -> list[Combination]:
    """Valid combinations in which any `strength` choices meet that can meet at all.

    Greedy: the next meeting that is missing is put into many random combinations, and the one with most missing
    meetings is taken. Drawn by a fixed seed: the same set every time.

    Args:
        cheap: axes whose choices cost more and less; the cheaper ones, best first. They stand wherever all still meet.
    """
    draw = random.Random(0)
    missing = dict.fromkeys(_meetings_of(axes, strength))
    chosen = []
    while missing:
        wanted = next(iter(missing))
        drawn = _candidates(axes, dict(wanted), draw=draw, valid=valid)
        if not drawn:
            del missing[wanted]  # no valid combination has it
            continue
        best = max(drawn, key=lambda each: sum(meeting in missing for meeting in _meetings(each, strength)))
        chosen.append(best)
        for meeting in _meetings(best, strength):
            missing.pop(meeting, None)
    return _cheaper(chosen, cheap or {}, strength=strength, valid=valid)


def _cheaper(
    chosen: Sequence[Combination],
    cheap: Mapping[str, Sequence[Any]],
    *,
    strength: int,
    valid: Callable[[Combination], bool],
) -> list[Combination]:
    """Leave out what brings no meeting of its own; take a cheaper choice where the dearer one's meetings remain."""
    meetings = [Counter(_meetings(each, strength)) for each in chosen]
    times = sum(meetings, Counter())
    kept = []
    for each, its in zip(chosen, meetings, strict=True):
        if (times - its).keys() == times.keys():
            times -= its
        else:
            kept.append(each)
    for axis, place in itertools.product(cheap, range(len(kept))):
        before = kept[place]
        others = times - Counter(_meetings(before, strength))
        for choice in itertools.takewhile(lambda choice, dear=before[axis]: choice != dear, cheap[axis]):
            after = {**before, axis: choice}
            if valid(after) and (others + Counter(_meetings(after, strength))).keys() >= times.keys():
                kept[place], times = after, others + Counter(_meetings(after, strength))
                break
    return kept


def _candidates(
    axes: Mapping[str, Sequence[Any]],
    fixed: Combination,
    *,
    draw: random.Random,
    valid: Callable[[Combination], bool],
) -> list[Combination]:
    found: list[Combination] = []
    for _ in range(_TRIES):
        combination = {axis: fixed.get(axis, draw.choice(choices)) for axis, choices in axes.items()}
        if valid(combination):
            found.append(combination)
        if len(found) == _CANDIDATES:
            break
    return found


def _meetings(combination: Combination, strength: int) -> Iterator[tuple[tuple[str, Any], ...]]:
    yield from itertools.combinations(combination.items(), strength)


def _meetings_of(axes: Mapping[str, Sequence[Any]], strength: int) -> Iterator[tuple[tuple[str, Any], ...]]:
    for some in itertools.combinations(axes, strength):
        for values in itertools.product(*(axes[axis] for axis in some)):
            yield tuple(zip(some, values, strict=True))
