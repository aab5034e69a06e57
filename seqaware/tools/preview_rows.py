"""The rows of one optimizer step as the model will get them, with what the objective makes of every token."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from seqaware.config.schema import Config
from seqaware.data.collate import Batch, build_batch
from seqaware.data.packing import MicroBatch, layout_step
from seqaware.data.store.store_specs import step_order
from seqaware.errors import ConfigError
from seqaware.objective.weighting import Weighting
from seqaware.plan.specs import World, model_facts
from seqaware.report.preview import Preview, ShownDocument, ShownRow, ShownToken
from seqaware.tools.dry_run import plan_for
from seqaware.tools.inspect_rows import TrainingRows
from seqaware.training.prepare import build_weighting


@dataclass(frozen=True)
class PreviewRequest:
    """Which rows: of optimizer step `step` (from 1) on so many ranks, the first `rows` ones in the order of ranks.

    ranks: None: as few as the config can have.
    """

    step: int = 1
    rows: int = 3
    ranks: int | None = None


def preview(config: Config, training: TrainingRows, request: PreviewRequest) -> Preview:
    """Lay out the step and weigh its tokens.

    Raises:
        ConfigError: the run has no such step, or the ranks cannot share it.
    """
    ranks = request.ranks or config.parallel.sequence
    # GPUs, or a config for them could not be looked at elsewhere; rows do not depend on the device.
    world = World(ranks, ranks, 1, "cuda", bf16=True, elsewhere=True)
    plan = plan_for(config, world=world, deepspeed_path=None, model=model_facts(config.model))
    total = plan.total_steps
    if total is not None and request.step > total:
        raise ConfigError("the run has no such step", got=request.step, do=f"write --step {total} or less")
    store, order = training.store, step_order(training.store, plan)
    ids = order.documents(*order.position(request.step))
    packed, sft = config.packing.enabled, config.training.sft
    layout = layout_step(
        ids, store.lengths[ids], capacity=plan.batches.micro_batch_tokens, ranks=plan.world.groups, packed=packed
    )
    weighting = build_weighting(config)
    mine = [(rank, each) for rank in range(plan.world.groups) for each in layout.micro_batches(rank) if each.rows]
    count = sum(len(each.rows) for _, each in mine)
    rows: list[ShownRow] = []
    for rank, each in mine:
        if len(rows) < request.rows:
            batch = build_batch(store, each.rows, positions=sft.positions, on_split=sft.on_split, pad_id=0)
            rows += _rows(batch, each, weighting, training=training, rank=rank)
    return Preview(
        title=f"step {request.step}: {len(ids)} documents in {count} row(s) for {_named(plan.world)}",
        objective=f"{sft.weighting}, γ = {sft.discount:.6g}, positions {sft.positions}, scale {sft.scale}",
        capacity=plan.batches.micro_batch_tokens if packed else None,
        rows=tuple(rows[: request.rows]),
        left_out=max(0, count - request.rows),
    )


def _rows(
    batch: Batch, micro_batch: MicroBatch, weighting: Weighting, *, training: TrainingRows, rank: int
) -> Iterator[ShownRow]:
    weights = weighting.weights(batch.k, batch.length, batch.sequence_offsets, token_weight=batch.token_weight)
    names = iter(batch.document_names)
    for row, ids in enumerate(micro_batch.rows):
        place, documents = 0, []
        for index in ids:
            here = slice(place, place + int(training.store.lengths[index]))
            # What is known of a token stands one place before it, where it is predicted; the first is not.
            k, of_token = ([0.0, *each[row, here].tolist()[:-1]] for each in (batch.k, weights))
            texts = (_text(training.tokenizer, token) for token in batch.input_ids[row, here].tolist())
            tokens = tuple(ShownToken(*each) for each in zip(texts, map(int, k), of_token, strict=True))
            documents.append(ShownDocument(next(names), tokens))
            place = here.stop
        yield ShownRow(rank, tuple(documents), padding=batch.input_ids.shape[1] - place)


def _named(world: World) -> str:
    shared = f" in groups of {world.sequence} that share each" if world.sequence > 1 else ""
    return f"{world.size} rank(s){shared}"


def _text(tokenizer: Any, token: int) -> str:
    return str(tokenizer.decode([token]))
