"""Several verifications in one launch, with an error planted into the trainer for some of them.

Started by a launcher with a JSON file: a list of {"config": YAML file, "deepspeed": ZeRO json, "plant": name or null,
"train": bool}. Each is verified as launcher/verify.py does it, and certificate.json tells what came out; or it is
trained, and what stopped it goes to standard error.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from seqaware.config.load import load_config
from seqaware.engine.ranks import disconnect, find_address, prepare_environment
from seqaware.errors import ConfigError

Wrong = Callable[[Any], Any]
"""From the right thing to the wrong one."""


def _unshifted(right: Any) -> Any:
    """A token's weight stands at the token itself, not at the place that predicts it."""
    return lambda self, *args, **kwargs: right(self, *args, **kwargs).roll(1, dims=-1)


def _integer(right: Any) -> Any:
    return lambda self, *args, **kwargs: right(self, *args, **kwargs).int().float()


def _whole_row(right: Any) -> Any:
    """What a cache or a forgotten border does: the documents of a row are one."""

    def leaking(q: Any, k: Any, v: Any, documents: Any, call: Any) -> Any:
        one = replace(documents, cu_seqlens=documents.cu_seqlens[[0, -1]], lengths=(sum(documents.lengths),))
        return right["sdpa_per_document"](q, k, v, one, call)

    return {**right, "sdpa_per_document": leaking}


def _of_this_rank(right: Any) -> Any:
    """Every rank divides by its own, as if the mean of the ranks' means were the mean."""

    def denominator(self: Any, *args: Any) -> Any:
        size, self.ranks.size = self.ranks.size, 1  # a sum over one rank
        own = right(self, *args)
        self.ranks.size = size
        return size * own

    return denominator


def _without_the_last(right: Any) -> Any:
    return lambda ids, lengths, **options: right(ids[:-1], lengths[:-1], **options)


def _divided_once_more(right: Any) -> Any:
    """As a library does that averages over the micro-batches."""
    return lambda self, batches, weights, scale: right(self, batches, weights, scale / len(batches))


def _unweighted(right: Any) -> Any:
    return lambda hidden, **options: right(hidden, **{**options, "weights_N": options["weights_N"].clamp(max=1.0)})


def _places(plant: str) -> list[tuple[Any, str, Wrong]]:
    """Owners, attributes, and what is made of them."""
    from seqaware.engine import attention, first_step, model
    from seqaware.engine.engine import Engine
    from seqaware.objective.weighting import Weighting
    from seqaware.training import batches

    return {
        "unshifted weights": [(Weighting, "weights", _unshifted)],
        "integer weights": [(Weighting, "weights", _integer)],
        "documents see each other": [(attention, "BACKENDS", _whole_row)],
        "mean of every rank": [(Engine, "denominator", _of_this_rank)],
        "dropped tail": [(batches, "layout_step", _without_the_last)],
        "factor of the accumulation": [(Engine, "_accumulate", _divided_once_more)],
        "kernel without weights": [(module, "fused_cross_entropy", _unweighted) for module in (model, first_step)],
    }[plant]


@contextmanager
def planted(plant: str | None) -> Iterator[None]:
    """Inside, the trainer has the error."""
    places = [(owner, name, getattr(owner, name), wrong) for owner, name, wrong in _places(plant)] if plant else []
    for owner, name, right, wrong in places:
        setattr(owner, name, wrong(right))
    try:
        yield
    finally:
        for owner, name, right, _ in places:
            setattr(owner, name, right)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("requests", type=Path)
    requests = json.loads(parser.parse_known_args()[0].requests.read_text())
    prepare_environment()
    from seqaware.training.run import RunRequest, run
    from seqaware.training.verify.run import VerifyRequest, verify

    address = find_address()

    def carry_out(request: dict[str, Any]) -> str:
        config, zero = load_config(Path(request["config"]), []), Path(request["deepspeed"])
        if not request["train"]:
            return verify(VerifyRequest(config, zero, steps=2), address=address, say=lambda text: None).verdict
        try:
            run(RunRequest(config, zero), address=address, say=lambda text: None)
        except ConfigError as error:
            return f"stopped: {error}"
        return "trained"

    for request in requests:
        with planted(request["plant"]):
            outcome = carry_out(request)
        print(f"rank {address.rank}: {Path(request['config']).stem}: {outcome}", file=sys.stderr, flush=True)
    disconnect()


if __name__ == "__main__":
    main()
