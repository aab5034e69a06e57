"""Several verifications in one launch, with an error planted into the trainer for some of them.

Started by a launcher with a JSON file: a list of {"config": YAML file, "deepspeed": ZeRO json, "plant": name or null,
"train": bool}. Each is verified as launcher/verify.py does it, and certificate.json tells what came out; or it is
trained, and what stopped it goes to standard error.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import accumulate
from pathlib import Path
from typing import Any

from seqaware.config.loading import load_config
from seqaware.distributed.launch_environment import LaunchEnvironment
from seqaware.errors import ConfigError
from tests.e2e.many_runs import do_each

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
    # A step of one document has no tail to drop.
    return lambda ids, lengths, **options: right(
        ids[: max(1, len(ids) - 1)], lengths[: max(1, len(ids) - 1)], **options
    )


def _divided_once_more(right: Any) -> Any:
    """As a library does that averages over the micro-batches."""
    return lambda self, batches, weights, scale: right(self, batches, weights, scale / len(batches))


def _unweighted(right: Any) -> Any:
    return lambda hidden, **options: right(hidden, **{**options, "weights_N": options["weights_N"].clamp(max=1.0)})


def _own_embedding_gradient(right: Any) -> Any:
    """Rank 1 keeps what its own rows make of the embedding's gradient."""

    def reduce(self: Any) -> None:
        embedding = self.wrapped.model.get_input_embeddings().weight
        own = embedding.grad.clone()
        right(self)
        if self.ranks.rank == 1:
            embedding.grad.copy_(own)

    return reduce


def _twice_the_decay(right: Any) -> Any:
    return lambda model, weight_decay: right(model, 2 * weight_decay)


def _clip_of_a_rank(right: Any) -> Any:
    def initialize(plan: Any, model: Any) -> Any:
        shared = plan.deepspeed["gradient_clipping"] / plan.world.size
        return right(replace(plan, deepspeed={**plan.deepspeed, "gradient_clipping": shared}), model)

    return initialize


def _one_step_late(right: Any) -> Any:
    return lambda plan, step: right(plan, max(1, step - 1))


def _mean_of_parts(right: Any) -> Any:
    """Held-out figures of every part of the documents, averaged."""

    def held_out_loss(engine: Any, steps: Any, *arguments: Any, **options: Any) -> Any:
        parts = [right(engine, [batches], *arguments, **options) for batches in steps]
        ratios = {key: sum(part[key] for part in parts) / len(parts) for key in ("loss", "unweighted_loss", "accuracy")}
        whole = {key: sum(part[key] for part in parts) for key, value in parts[0].items() if key not in _RATIOS}
        return {**parts[0], **whole, **ratios}

    return held_out_loss


_RATIOS = ("loss", "unweighted_loss", "accuracy", "logsumexp_mean", "logsumexp_std", "by_position")


def _leak(merged: Callable[[list[int]], list[int]]) -> Wrong:
    """Attention over other documents than the row has."""

    def wrong(right: Any) -> Any:
        def leaking(q: Any, k: Any, v: Any, documents: Any, call: Any) -> Any:
            lengths = merged(list(documents.lengths))
            borders = documents.cu_seqlens.new_tensor([0, *accumulate(lengths)])
            other = replace(documents, cu_seqlens=borders, lengths=tuple(lengths))
            return right["sdpa_per_document"](q, k, v, other, call)

        return {**right, "sdpa_per_document": leaking}

    return wrong


def _after_64_tokens(lengths: list[int]) -> list[int]:
    """A row longer than 64 tokens is one document."""
    return [sum(lengths)] if sum(lengths) > 64 else lengths


def _after_a_long_document(lengths: list[int]) -> list[int]:
    """A document longer than 64 tokens is joined with the next one."""
    long = next((i for i, length in enumerate(lengths[:-1]) if length > 64), None)
    return lengths if long is None else [*lengths[:long], sum(lengths[long : long + 2]), *lengths[long + 2 :]]


def _places(plant: str) -> list[tuple[Any, str, Wrong]]:
    """Owners, attributes, and what is made of them."""
    from seqaware.data import batch_loader as batches
    from seqaware.engine import engine, loss_check, optimizer
    from seqaware.engine.engine import Engine
    from seqaware.evaluation import evaluator
    from seqaware.models import attention, model
    from seqaware.objective.weighting import Weighting
    from seqaware.training import loop

    return {
        "unshifted weights": [(Weighting, "weights", _unshifted)],
        "integer weights": [(Weighting, "weights", _integer)],
        "documents see each other": [(attention, "BACKENDS", _whole_row)],
        "mean of every rank": [(Engine, "denominator", _of_this_rank)],
        "dropped tail": [(batches, "layout_step", _without_the_last)],
        "factor of the accumulation": [(Engine, "_accumulate", _divided_once_more)],
        "leak beyond 64 tokens": [(attention, "BACKENDS", _leak(_after_64_tokens))],
        "leak after a long document": [(attention, "BACKENDS", _leak(_after_a_long_document))],
        "gradient of one rank": [(Engine, "_reduce_gradients", _own_embedding_gradient)],
        "decay twice": [(module, "parameter_groups", _twice_the_decay) for module in (engine, optimizer)],
        "clip of a rank": [(engine, "_initialize", _clip_of_a_rank)],
        "clipped update": [(engine, "clip_before_muon", lambda right: lambda zero, stage: None)],
        "rate one step late": [(loop, "scheduled_rate", _one_step_late)],
        "mean of held-out parts": [(evaluator, "held_out_loss", _mean_of_parts)],
        "kernel without weights": [(module, "fused_cross_entropy", _unweighted) for module in (model, loss_check)],
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


def _carry_out(request: dict[str, Any], address: LaunchEnvironment) -> str:
    from seqaware.training.launch import RunRequest, run
    from seqaware.verify.verification import VerifyRequest, verify

    config, zero = load_config(Path(request["config"]), []), Path(request["deepspeed"])
    with planted(request["plant"]):
        if not request["train"]:
            return verify(VerifyRequest(config, zero, steps=2), address=address, say=lambda text: None).verdict
        try:
            run(RunRequest(config, zero), address=address, say=lambda text: None)
        except ConfigError as error:
            return f"stopped: {error}"
    return "trained"


if __name__ == "__main__":
    do_each(_carry_out)
