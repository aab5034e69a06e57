"""Under ZeRO-3, evaluating, exporting, saving and generating in any order leave training as it would be without them.

DeepSpeed records the order of the modules in training and gathers weights ahead by that record; each of these actions
gathers or releases weights outside of it. All drawn sequences share one launch of two ranks.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from tests import launch, tiny
from tests.e2e.many_runs import Outcome, launch_all

DRAWN = 8
STEPS = 4
BACK_TO = 1
ACTIONS = ("train", "evaluate", "export", "save", "generate", "go_back")
# Weights below a threshold stay gathered: of the small model all, its norms and its head, or none. With a reuse
# distance of 0 every other weight is released after its module, and few are gathered ahead of their next use.
AHEAD = {"stage3_max_reuse_distance": 0, "stage3_prefetch_bucket_size": 2000}
ENGINES: dict[str, tuple[dict[str, int], list[str]]] = {
    "all": ({"stage3_param_persistence_threshold": 100_000}, []),
    "head": ({"stage3_param_persistence_threshold": 600, **AHEAD}, []),
    "none": ({"stage3_param_persistence_threshold": 0, **AHEAD}, []),
    "dora": (
        {"stage3_param_persistence_threshold": 600, **AHEAD},
        ["lora.rank=2", "lora.dora=true", "lora.target_modules=all-linear"],
    ),
}


@dataclass(frozen=True)
class Drawn:
    """Actions on a new engine of a kind, that starts from the checkpoint of a step, or from scratch (0)."""

    engine: str
    start: int
    actions: tuple[str, ...]

    def within_steps(self) -> Drawn:
        """Without the steps that the undisturbed sequence does not have."""
        step, kept = self.start, []
        for action in self.actions:
            if action == "train" and step == STEPS:
                continue
            step = BACK_TO if action == "go_back" else step + (action == "train")
            kept.append(action)
        return Drawn(self.engine, self.start, tuple(kept))


def _drawn_sequences() -> list[Drawn]:
    """The same ones in every session: the ranks run them from a file."""
    sequences: list[Drawn] = []
    actions = st.lists(st.sampled_from(ACTIONS), min_size=12, max_size=16).map(tuple)

    @settings(max_examples=DRAWN, derandomize=True, database=None, phases=[Phase.generate], deadline=None)
    @given(st.builds(Drawn, st.sampled_from(list(ENGINES)), st.sampled_from((0, BACK_TO, 2)), actions))
    def collect(sequence: Drawn) -> None:
        sequences.append(sequence.within_steps())

    collect()
    return sequences


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[Drawn, Outcome]]:
    """Every sequence with what its actions returned; the undisturbed one of each engine comes first."""
    workshop = tiny.build(tmp_path_factory.mktemp("sequences"))
    held_out = {"dataset": {"name": str(workshop.rows)}, "metric": "exact_match", "max_new_tokens": 3}
    held_out |= {"answer_pattern": "(?P<answer>.+)", "batch_size": 4}
    # Several micro-batches a step: from the second on, DeepSpeed follows what it recorded in the first.
    schedule = {"num_epochs": 9, "max_steps": STEPS, "global_batch_size": 6, "micro_batch_tokens": 64}
    config = workshop.config(training__schedule=schedule, evaluation=held_out, output__dir=str(workshop.folder / "run"))
    config["training"]["parameters"] = {"max_seq_length": 64}
    undisturbed = [Drawn(engine, 0, ("train", "save") * STEPS) for engine in ENGINES]
    # What a resumed run does at its end, and an evaluation before it.
    ending = ("train", "evaluate", "export", "evaluate", "generate", "train")
    resumed = [Drawn(engine, BACK_TO, ending) for engine in ENGINES]
    sequences = [*undisturbed, *resumed, *_drawn_sequences()]
    path = str(workshop.write("config", config))
    requests = [_request(workshop, path, number, sequence) for number, sequence in enumerate(sequences)]
    outcomes = launch_all(
        requests, ranks=2, folder=workshop.folder / "launches", script="tests/e2e/engine_sequences.py"
    )
    return list(zip(sequences, outcomes, strict=True))


def _request(workshop: tiny.Workshop, config: str, number: int, sequence: Drawn) -> dict[str, Any]:
    keys, overrides = ENGINES[sequence.engine]
    zero = json.loads((launch.DS_CONFIGS / "zero3.json").read_text())
    zero["zero_optimization"] |= keys
    path = workshop.folder / f"{sequence.engine}.json"
    path.write_text(json.dumps(zero))
    undisturbed = workshop.folder / str(list(ENGINES).index(sequence.engine))
    source = undisturbed / "checkpoints"
    return {
        "config": config,
        "set": overrides,
        "deepspeed": str(path),
        "folder": str(workshop.folder / str(number)),
        "checkpoints": str(source),
        "start": sequence.start,
        "actions": sequence.actions,
    }


def test_no_action_changes_what_another_returns(results: list[tuple[Drawn, Outcome]]) -> None:
    expected: dict[tuple[str, str, int], Any] = {}
    for sequence, outcome in results:
        found, other = outcome.check().results
        assert found == other, f"{sequence}: the ranks differ"
        for action, step, value in found:
            same = expected.setdefault((sequence.engine, action, step), value)
            assert value == same, f"{sequence}: {action} after step {step}"
        assert [action for action, *_ in found] == list(sequence.actions), f"{sequence}: {found[-1]}"
