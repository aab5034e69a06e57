"""The model card of a shared model: objective, data, plan, results and certificate, from what its run has left."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, TypeVar

import yaml
from pydantic import BaseModel, Field, ValidationError

from seqaware.checkpoint.manifest import step_of
from seqaware.config.loading import load_config
from seqaware.data.file_records import Count, Text, first_problem
from seqaware.errors import DataError
from seqaware.files import MalformedError, read_json
from seqaware.masking import escaped, masked
from seqaware.metrics.metrics_file import EvaluationShares, read_metrics, shown_shares

_FORMULA = """Every supervised token's cross-entropy is weighted by its place in its own sequence. With the losses
l_1 … l_L of a sequence's supervised tokens, the sum over all of its suffixes of their discounted losses is

    Σ_s Σ_{k ≥ s} γ^(k−s) · l_k  =  Σ_k w_k · l_k,      w_k = (1 − γ^k) / (1 − γ)
"""


class _Topology(BaseModel):
    ranks: Count
    nodes: Count
    zero_stage: Count
    dtype: Text


class _CardAttempt(BaseModel):
    topology: _Topology


class _CardManifest(BaseModel):
    """What a card takes from manifest.json."""

    seqaware: Text
    git_revision: Text | None
    data_fingerprint: Text | None
    mathematics: dict[str, Any]
    attempts: Annotated[list[_CardAttempt], Field(min_length=1)]
    finished_steps: Count | None = None


class _Dataset(BaseModel):
    name: Text | None
    split: Text


class _Evaluated(BaseModel):
    dataset: _Dataset


class _CardResults(EvaluationShares):
    """What a card takes from results.json."""

    evaluation: _Evaluated


class _Item(BaseModel):
    verdict: Text


class _CardCertificate(BaseModel):
    """What a card takes from certificate.json."""

    verdict: Text
    oracle: Text
    steps: list[Count]
    items: list[_Item]


Record = TypeVar("Record", bound=BaseModel)


def run_card(run: Path, *, title: str, sent: list[str], checkpoint: Path | None = None) -> str:
    """README.md, with its front matter, for the model of a run.

    Args:
        sent: names of the files beside it. checkpoint: that the model is of, whole; default: it is the run's last.

    Raises:
        ConfigError, DataError: a file of the run is not what a run has written.
    """
    config = load_config(run / "config.yaml").model_dump(mode="json")
    manifest, _ = _read(run / "manifest.json", _CardManifest)
    sections = [
        f"# {title}\n",
        "## Objective\n",
        _FORMULA,
        _table(_objective(config, manifest)),
        "## Data and training\n",
        _table(_training(config, manifest) | _steps(manifest, checkpoint)),
        "## Results\n",
        "\n".join(_results(run, checkpoint)) or "This model was not evaluated on held-out rows.",
        "\n## Certificate\n",
        _certificate(run),
        "\n## Files\n",
        "\n".join(f"- `{name}`" for name in sent),
    ]
    body = "\n".join(sections)
    card = masked(
        f"---\n{yaml.safe_dump(_front_matter(config, checkpoint), sort_keys=False, allow_unicode=True)}---\n{body}\n"
    )
    return escaped(card, keep="\n")


def bare_card(title: str) -> str:
    """README.md for a model that brings neither a card nor a run to tell about it."""
    front = {"library_name": "transformers", "pipeline_tag": "text-generation", "tags": ["seqaware"]}
    return f"---\n{yaml.safe_dump(front, sort_keys=False)}---\n# {title}\n\nNothing is known of how it was trained.\n"


def _read(path: Path, model: type[Record]) -> tuple[Record, dict[str, Any]]:
    """A file of the run, of which the model checks what is used.

    Raises:
        DataError: it cannot be read, or is not valid.
    """
    do = "correct it, or move it out of the run's folder"
    try:
        content = read_json(path)
        return model.model_validate(content), content
    except (OSError, MalformedError) as error:
        raise DataError("a file of the run cannot be read", got=f"{path}: {error}", do=do) from error
    except ValidationError as error:
        raise DataError("a file of the run is not valid", got=f"{path}: {first_problem(error)}", do=do) from error


def _front_matter(config: Mapping[str, Any], checkpoint: Path | None) -> dict[str, Any]:
    base, lora = config["model"].get("base_name"), config.get("lora")
    adapter = lora is not None and lora.get("export") == "adapter" and checkpoint is None
    front: dict[str, Any] = {
        "library_name": "peft" if adapter else "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["seqaware"],
    }
    # A path on the machine where it was trained is no name of the hub's.
    if base and not Path(base).expanduser().exists() and base.count("/") <= 1 and not base.startswith((".", "/", "~")):
        front["base_model"] = base
    return front


def _objective(config: Mapping[str, Any], manifest: _CardManifest) -> dict[str, Any]:
    sft = config["training"]["sft"]
    keys = ("gamma", "half_life", "horizon", "weighting", "scale", "positions", "normalize_by", "on_split")
    return {key: sft[key] for key in keys if sft.get(key) is not None} | {
        "mathematics of the run": ", ".join(sorted(manifest.mathematics))
    }


def _training(config: Mapping[str, Any], manifest: _CardManifest) -> dict[str, Any]:
    dataset, model, last = config["dataset"], config["model"], manifest.attempts[-1].topology
    parts = [dataset] if dataset.get("name") else dataset["mixture"]
    optimizer = config["training"]["optimizer"]
    scratch = (model.get("from_scratch") or {}).get("model_type")
    return {
        "trained from": f"a {scratch}, from scratch" if scratch else _last_name(model["base_name"]),
        "data": ", ".join(f"{_last_name(part['name'])} ({part['split']})" for part in parts),
        "data fingerprint": manifest.data_fingerprint,
        "optimizer": f"{optimizer['type']}, learning rate {optimizer['lr']:g}",
        "precision": last.dtype,
        "plan": f"{_so_many(last.ranks, 'rank')} on {_so_many(last.nodes, 'node')}, ZeRO-{last.zero_stage}",
        "attempts": len(manifest.attempts),
        "seqaware": f"{manifest.seqaware}, revision {manifest.git_revision or 'unknown'}",
    }


def _so_many(number: int, of: str) -> str:
    return f"{number} {of}" if number == 1 else f"{number} {of}s"


def _steps(manifest: _CardManifest, checkpoint: Path | None) -> dict[str, Any]:
    steps = manifest.finished_steps
    if checkpoint is not None and step_of(checkpoint) != steps:
        return {"optimizer steps": f"{step_of(checkpoint)} (a checkpoint on the way)"}
    return {"optimizer steps": "not finished" if steps is None else steps}


def _last_name(name: str) -> str:
    """A hub id as it is; of a path its last name, for the folders above tell of a machine."""
    return name if name.count("/") <= 1 and not name.startswith(("/", ".", "~")) else Path(name).name


def _results(run: Path, checkpoint: Path | None) -> Iterator[str]:
    metrics = run / "metrics.jsonl"
    lines = list(read_metrics(metrics)) if metrics.is_file() else []
    evaluations = [line for line in lines if line.get("kind") == "evaluation"]
    if checkpoint is not None:
        evaluations = [line for line in evaluations if line["step"] <= step_of(checkpoint)]
    if evaluations and (checkpoint is None or evaluations[-1]["step"] == step_of(checkpoint)):
        last = evaluations[-1]
        losses = [f"{each['unweighted_loss']:.4f}" for each in (evaluations[0], last) if "unweighted_loss" in each]
        yield f"- held-out loss, unweighted, before and after: {' → '.join(losses)} nats a token"
        yield from _shares(last)
    for path in sorted(run.glob(f"evaluations/{checkpoint.name if checkpoint else '*'}/results.json")):
        results, found = _read(path, _CardResults)
        dataset = results.evaluation.dataset
        yield f"- evaluated on {_last_name(dataset.name or 'a mixture')} ({dataset.split}):"
        yield from (f"  {line}" for line in _shares(found))


def _shares(found: Mapping[str, Any]) -> Iterator[str]:
    for title, share, low, high in shown_shares(found):
        yield f"- {title}: {share} (95 %: {low} to {high}) of {found.get('questions', '?')} rows"


def _certificate(run: Path) -> str:
    path = run / "certificate.json"
    if not path.is_file():
        return "The run's mathematics was not verified against the oracle (`seqaware verify`)."
    found, _ = _read(path, _CardCertificate)
    held = sum(item.verdict == "holds" for item in found.items)
    steps = ", ".join(map(str, found.steps))
    return (
        f"Loss and gradients **{found.verdict}**: {held} of {len(found.items)} comparisons with the oracle "
        f"({found.oracle}) over the steps {steps}."
    )


def _table(rows: Mapping[str, Any]) -> str:
    return "\n".join(["| | |", "|---|---|", *(f"| {key} | {value} |" for key, value in rows.items()), ""])
