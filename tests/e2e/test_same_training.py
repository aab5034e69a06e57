"""The law, through the real command: whatever the topology, a run is the run of the float64 oracle.

Every layout trains three full-batch steps on the same thirteen rows, of 1 to 90 answer words. Its losses, gradient
norms and final weights must be those of one process that takes the documents one by one in float64.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests import launch, oracles, tiny
from tests.e2e.kinds import kinds
from tests.e2e.layouts import CHOICES, Layout, covering_layouts
from tests.e2e.many_runs import check_all, launch_all

STEPS = 3
# Engines of one process are not freed to the last byte: the full matrix takes a new process now and then.
RUNS_A_LAUNCH = 48
LEARNING_RATE = 1e-3
# The workshop's schedule: linear from the first step on, and it would be zero one step after the last.
RATES = [LEARNING_RATE * (STEPS - done) / STEPS for done in range(STEPS)]

# Float32 against float64. A loss is a mean over ~300 tokens of sums over 32 to 48 products in two layers: each value
# carries ~√(depth · width) ≈ 15 roundings of 6e-8, that is 1e-6 relative, with a factor of ten to spare.
LOSS_TOLERANCE = 1e-5
# The squares of the gradient's entries add the error of the backward, twice as deep.
NORM_TOLERANCE = 2e-5
# An update is proportional to the gradient here (see EPS), so it carries the relative error of NORM_TOLERANCE, a factor
# of five to spare; and each step rounds the float32 weight itself once, by up to 2^-24 of its size.
# Muon's five quintic steps multiply an error of a matrix by at most 3.4445^5 = 485. Its norm is 1 before them and about
# the root of its rank, here at least 4, after them: an error of 1e-6 of the float32 gradient comes to 1e-4.
UPDATE_TOLERANCE = 1e-4
ROUNDING = STEPS * 2.0**-24
# AdamW's first updates are lr · g / (|g| + ε). With the usual ε they are signs, which hide any error in g's size and
# amplify rounding where g is nearly zero. An ε above the clipped gradient's entries (~1/√n = 0.01) leaves them linear.
EPS = 1e-2


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> tiny.Workshop:
    return tiny.build(tmp_path_factory.mktemp("layouts"))


def _oracle(
    workshop: tiny.Workshop, gamma: float, normalize_by: str, kind: str = "questions", optimizer: str = "adamw"
) -> oracles.OracleRun:
    settings = oracles.OracleSettings(gamma, normalize_by, RATES, eps=EPS, optimizer=optimizer)
    return oracles.train(workshop.model, [kinds(workshop)[kind].documents(gamma)] * STEPS, settings)


def _config(workshop: tiny.Workshop, layout: Layout) -> Path:
    config = workshop.config(
        model__loss_kernel=layout.kernel,
        model__activation_checkpointing=layout.checkpointing,
        model__mlp_tile_tokens=layout.mlp_tile,
        model__compile=layout.compiled,
        parallel__sequence=layout.sequence,
        packing__enabled=layout.packed,
        training__optimizer={"type": layout.optimizer, "lr": LEARNING_RATE, "eps": EPS},
        training__schedule__micro_batch_tokens=layout.micro_batch_tokens,
        training__sft={"gamma": layout.gamma, "normalize_by": layout.normalize_by},
        output__dir=str(workshop.folder / layout.name),
        **kinds(workshop)[layout.kind].changes,
    )
    return workshop.write(layout.name, config)


def _zero(stage: int) -> str:
    return str(launch.DS_CONFIGS / f"zero{stage}.json")


def _train_all(workshop: tiny.Workshop, layouts: Sequence[Layout]) -> None:
    for ranks in sorted({layout.ranks for layout in layouts}):
        requests = [
            {"config": str(_config(workshop, layout)), "deepspeed": _zero(layout.stage), "set": []}
            for layout in layouts
            if layout.ranks == ranks
        ]
        for first in range(0, len(requests), RUNS_A_LAUNCH):
            some = requests[first : first + RUNS_A_LAUNCH]
            check_all(launch_all(some, ranks=ranks, folder=workshop.folder / "launches"))


def _compare(workshop: tiny.Workshop, layout: Layout, oracle: oracles.OracleRun) -> None:
    folder = workshop.folder / layout.name
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if line["kind"] == "step"]
    assert [line["step"] for line in steps] == list(range(1, STEPS + 1)), layout.name
    for line, loss, plain, norm, accuracy in zip(
        steps, oracle.losses, oracle.unweighted, oracle.grad_norms, oracle.accuracies, strict=True
    ):
        assert line["loss"] == pytest.approx(loss, rel=LOSS_TOLERANCE), layout.name
        assert line["unweighted_loss"] == pytest.approx(plain, rel=LOSS_TOLERANCE), layout.name
        assert line["grad_norm"] == pytest.approx(norm, rel=NORM_TOLERANCE), layout.name
        assert line["accuracy"] == pytest.approx(accuracy), layout.name
    trained = load_file(folder / "model" / "model.safetensors")
    assert trained.keys() == oracle.weights.keys()
    bounds = _weight_bounds(workshop, oracle)
    for name, expected in oracle.weights.items():
        difference = _distance(trained[name], expected)
        assert difference < bounds[name], f"{layout.name}: {name} differs by {difference:.1e}, not {bounds[name]:.1e}"


def _weight_bounds(workshop: tiny.Workshop, oracle: oracles.OracleRun) -> dict[str, float]:
    """How far the mean entry of each tensor may be from the oracle's."""
    initial = load_file(workshop.model / "model.safetensors")
    return {
        name: UPDATE_TOLERANCE * _distance(initial[name], trained) + ROUNDING * float(trained.abs().max())
        for name, trained in oracle.weights.items()
    }


def _distance(tensor: torch.Tensor, other: torch.Tensor) -> float:
    return float((tensor.double() - other.double()).abs().mean())


def _prove(workshop: tiny.Workshop, layouts: Sequence[Layout]) -> None:
    _train_all(workshop, layouts)
    oracle = cache(lambda *objective: _oracle(workshop, *objective))
    for layout in layouts:
        _compare(workshop, layout, oracle(layout.gamma, layout.normalize_by, layout.kind, layout.optimizer))


def test_layouts_that_cover_every_pair_of_choices(workshop: tiny.Workshop) -> None:
    _prove(workshop, covering_layouts(2))


def test_every_pair_of_choices_is_among_them() -> None:
    """Counted anew, without the generator: what is missing cannot be, or is refused by the table of capabilities."""
    layouts = [dataclasses.asdict(layout) for layout in covering_layouts(2)]
    for one, other in itertools.combinations(CHOICES, 2):
        wanted = set(itertools.product(CHOICES[one], CHOICES[other]))
        left = wanted - {(layout[one], layout[other]) for layout in layouts}
        match (one, other):
            case ("ranks", "sequence"):
                assert all(ranks < sequence for ranks, sequence in left)
            case ("checkpointing", "mlp_tile"):
                assert left == {("selective", 16)}
            case ("checkpointing", "compiled"):
                assert left == {("selective", True)}
            case _:
                assert not left, (one, other, left)


@pytest.mark.matrix
def test_layouts_that_cover_every_triple_of_choices(tmp_path: Path) -> None:
    _prove(tiny.build(tmp_path), covering_layouts(3))


def test_the_command_itself_on_two_ranks(workshop: tiny.Workshop, tmp_path: Path) -> None:
    """launcher/train.py through the deepspeed launcher, ZeRO-3, packed, several micro-batches."""
    layout = Layout(2, 1, 3, True, 128, "fused", "none", None, False, 0.98, "tokens")
    path = _config(workshop, layout)
    folder = tmp_path / layout.name
    arguments, port = (str(path), "--deepspeed", _zero(3), "--set", f"output.dir={folder}"), launch.free_port()
    done = launch.deepspeed("launcher/train.py", *arguments, ranks=2, port=port)
    assert done.returncode == 0, done.stderr[-6000:]
    # Whatever DeepSpeed lays there bears the port in its name.
    assert not list(Path("/dev/shm").glob(f"*_{port}_*")), "it left shared memory behind"
    assert "model" in done.stdout and str(folder / "model") in done.stdout
    moved = tiny.Workshop(tmp_path, workshop.model, workshop.rows)
    _compare(moved, layout, _oracle(workshop, layout.gamma, layout.normalize_by))


def test_the_oracle_is_not_deaf(workshop: tiny.Workshop) -> None:
    """γ, the normaliser and a single row each move the oracle by far more than the tolerances above."""
    reference = _oracle(workshop, 0.98, "tokens")
    for other in (_oracle(workshop, 0.9, "tokens"), _oracle(workshop, 0.98, "weight")):
        assert abs(other.losses[0] / reference.losses[0] - 1) > 100 * LOSS_TOLERANCE
        for name, bound in _weight_bounds(workshop, reference).items():
            assert _distance(other.weights[name], reference.weights[name]) > 10 * bound, name
    settings = oracles.OracleSettings(gamma=0.98, normalize_by="tokens", learning_rates=RATES, eps=EPS)
    rows = kinds(workshop)["questions"].documents(0.98)
    fewer = oracles.train(workshop.model, [rows[1:]] * STEPS, settings)
    assert abs(fewer.losses[0] / reference.losses[0] - 1) > 100 * LOSS_TOLERANCE
