"""The Plan without starting anything: no torch, no process group, answers in under a second."""

from __future__ import annotations

from pathlib import Path

from seqaware.config.schema import Config
from seqaware.data.store import TokenStore
from seqaware.data.store_index import find_store
from seqaware.plan.facts import DataFacts, World, model_facts, rows_of_local_file
from seqaware.plan.plan import Plan, make_plan
from seqaware.training.facts import data_facts


def plan_without_torch(config: Config, *, deepspeed_path: Path | None, ranks: int, gpu: bool) -> Plan:
    """The Plan for so many ranks: exact where the data is tokenised, a guess from a local file's rows elsewhere.

    Raises:
        ConfigError: the config contradicts itself, the ranks or the model.
    """
    world = World(size=ranks, local_size=ranks, nodes=1, device="cuda" if gpu else "cpu", bf16=True)
    data = _known_data(config)
    return make_plan(config, world=world, deepspeed_path=deepspeed_path, model=model_facts(config.model), data=data)


def _known_data(config: Config) -> DataFacts | None:
    found = find_store(config)
    if found is None:
        return rows_of_local_file(config.dataset)
    return data_facts(TokenStore.open(found), None)
