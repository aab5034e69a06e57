"""From a config to the question that `seqaware.estimate.run_estimate` answers, without torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from seqaware.config.loading import REPOSITORY
from seqaware.config.schema import Config
from seqaware.data.store.store_index import find_store
from seqaware.data.store.store_specs import step_order
from seqaware.data.store.token_store import TokenStore
from seqaware.errors import ConfigError
from seqaware.estimate.hardware import Device
from seqaware.estimate.known_models import known_facts
from seqaware.estimate.layout import Layout, layout_of
from seqaware.estimate.run_estimate import EstimateRequest
from seqaware.estimate.run_totals import Packing, RunFigures
from seqaware.plan.plan import Plan, make_plan
from seqaware.plan.specs import World, model_facts
from seqaware.tools.dry_run import plan_for

_STEPS_LAID_OUT = 8


@dataclass(frozen=True)
class Gpus:
    """All of the run, and those of one node."""

    all: int
    of_node: int

    def world(self) -> World:
        """The ranks as the Plan counts them.

        Raises:
            ConfigError: nodes that are not full.
        """
        of_node = min(self.of_node, self.all)
        if self.all % of_node:
            raise ConfigError(
                "--gpus is not a multiple of --per-node",
                got=f"{self.all} and {of_node}",
                do=f"write {self.all - self.all % of_node} or {self.all + of_node - self.all % of_node} GPUs",
            )
        nodes = self.all // of_node
        return World(size=self.all, local_size=of_node, nodes=nodes, device="cuda", bf16=True, elsewhere=True)


def ask(config: Config, *, deepspeed_path: Path | None, gpus: Gpus, device: Device) -> EstimateRequest:
    """The layout of a run on these GPUs, and what it is to be compared with.

    Raises:
        ConfigError: the config contradicts itself, the ranks or the model, or the model's sizes are not known here.
    """
    world = gpus.world()
    facts = model_facts(config.model) or known_facts(config.model.base_name)
    plan = plan_for(config, world=world, deepspeed_path=deepspeed_path, model=facts)
    layout = layout_of(plan)
    if layout is None:
        raise ConfigError(
            "the model's sizes are not known here",
            got=config.model.base_name or "model.from_scratch",
            do="name a folder with its config.json, load it from the hub once, or write all sizes in from_scratch",
        )
    others, refused = [], {}
    for path in sorted((REPOSITORY / "ds_configs").glob("*.json")):
        name = f"ds_configs/{path.name}"
        if path.resolve() == plan.deepspeed_path.resolve():
            continue
        try:
            other = layout_of(make_plan(config, world=world, deepspeed_path=path, model=facts))
        except ConfigError as error:
            refused[name] = str(error)
        else:
            assert other is not None, "the model's sizes are known"
            others.append((name, other))
    mean = _mean_length(plan)
    return EstimateRequest(
        model=config.model.base_name or "a model from scratch",
        layout=layout,
        device=device,
        source=_shown(plan.deepspeed_path),
        step_tokens=_step_tokens(plan, layout, mean),
        mean_length=mean,
        others=others,
        refused=refused,
        most_positions=None if facts is None else facts.max_positions,
        run=RunFigures(plan, _packing(plan)),
    )


def _packing(plan: Plan) -> Packing | None:
    """Of the first steps, laid out as the run will; None where the data is not tokenised yet."""
    found = find_store(plan.config)
    if found is None or plan.total_steps is None:
        return None
    # Imported here: it brings numba, which a plan of data that is not tokenised does without.
    from seqaware.data.packing import layout_step

    store = TokenStore.open(found)
    store.check_documents()
    order = step_order(store, plan)
    count = min(_STEPS_LAID_OUT, plan.total_steps)
    layouts = []
    for step in range(1, count + 1):
        ids = order.documents(*order.position(step))
        layouts.append(
            layout_step(
                ids,
                store.lengths[ids],
                capacity=plan.batches.micro_batch_tokens,
                ranks=plan.world.groups,
                packed=plan.config.packing.enabled,
            )
        )
    return Packing(
        efficiency=sum(each.efficiency for each in layouts) / count,
        balance=sum(each.balance for each in layouts) / count,
        steps=count,
    )


def _mean_length(plan: Plan) -> float | None:
    """As if all documents were equally long: the facts of the data hold no Σ L²."""
    data = plan.data
    return data.tokens / data.documents if data and data.tokens else None


def _step_tokens(plan: Plan, layout: Layout, mean_length: float | None) -> int:
    if plan.batches.global_batch_tokens is not None:
        return plan.batches.global_batch_tokens
    assert plan.batches.global_batch_size is not None, "a step has a size in sequences or in tokens"
    return max(1, round(plan.batches.global_batch_size * (mean_length or layout.longest)))


def _shown(path: Path) -> str:
    """As a person would type it from the repository."""
    whole = path.resolve()
    return str(whole.relative_to(REPOSITORY)) if whole.is_relative_to(REPOSITORY) else str(path)
