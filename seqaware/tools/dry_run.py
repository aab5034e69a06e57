"""The Plan without starting anything: no torch, no process group, and no numba where no order must be computed."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from seqaware.config.schema import Config
from seqaware.data.store.store_index import find_store
from seqaware.data.store.store_specs import data_facts, needs_order, step_order
from seqaware.data.store.token_store import TokenStore
from seqaware.plan.plan import Plan, make_plan
from seqaware.plan.specs import DataFacts, ModelFacts, World, model_facts, rows_of_local_file


def plan_without_torch(config: Config, *, deepspeed_path: Path | None, ranks: int, gpu: bool) -> Plan:
    """The Plan for so many ranks: exact where the data is tokenised, a guess from a local file's rows elsewhere.

    Raises:
        ConfigError: the config contradicts itself, the ranks or the model.
    """
    world = World(size=ranks, local_size=ranks, nodes=1, device="cuda" if gpu else "cpu", bf16=True)
    return plan_for(config, world=world, deepspeed_path=deepspeed_path, model=model_facts(config.model))


def plan_for(config: Config, *, world: World, deepspeed_path: Path | None, model: ModelFacts | None) -> Plan:
    """The Plan for ranks that need not be here.

    Raises:
        ConfigError: the config contradicts itself, the ranks or the model.
    """
    plan = partial(make_plan, config, world=world, deepspeed_path=deepspeed_path, model=model)
    return plan(data=_known_data(config, draft=plan(data=None)))


def _known_data(config: Config, *, draft: Plan) -> DataFacts | None:
    found = find_store(config)
    if found is None:
        return rows_of_local_file(config.dataset)
    store = TokenStore.open(found)
    store.check_documents()
    order = step_order(store, draft) if needs_order(store.facts(), draft) else None
    return data_facts(store, order, config.training.schedule)
