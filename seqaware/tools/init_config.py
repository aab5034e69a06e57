"""A first config from a few answers: every key that a person may soon want to change, and why it is as it is."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from seqaware.config.loading import REPOSITORY
from seqaware.config.messages import config_error
from seqaware.config.schema import Config
from seqaware.errors import ConfigError
from seqaware.estimate.hardware import Device
from seqaware.estimate.search import LayoutChoice, cheapest
from seqaware.files import JSON_BYTES, MalformedError, local_path, parse_json, parse_yaml
from seqaware.tools.plan_estimate import Gpus, ask

_ZERO = {1: "ds_configs/zero1.json"}
_QUESTION = ("question", "answer")
_QUESTION_SOURCES = ("gsm8k", "squad", "openbookqa")


@dataclass(frozen=True)
class Answers:
    """What a person says about a run.

    Attributes:
        discount: {"gamma": 0.98}, {"half_life": 34} or {"horizon": 50}. gpus: 0: no GPU.
        batch: sequences of an optimizer step.
    """

    model: str
    data: str
    held_out: str | None
    discount: Mapping[str, float]
    gpus: Gpus
    device: Device
    max_seq_length: int
    batch: int
    lora: bool
    name: str


@dataclass(frozen=True)
class _Layout:
    """deepspeed: a JSON of ds_configs. why: in words, for the comment."""

    deepspeed: str
    checkpointing: str
    why: str


def starter(answers: Answers) -> str:
    """The YAML: it parses, and the layout is the fastest that the plan says fits, where it can tell.

    Raises:
        ConfigError: the answers make no config, or nothing fits these GPUs.
    """
    if answers.gpus.all and answers.batch < answers.gpus.all:
        raise ConfigError(
            "--batch is less than one sequence for each GPU",
            got=f"{answers.batch} for {answers.gpus.all}",
            do=f"write at least {answers.gpus.all}",
        )
    return _rendered(answers, _layout(answers))


def _layout(answers: Answers) -> _Layout:
    count = max(1, answers.gpus.all)
    default = _ZERO.get(count, "ds_configs/zero2.json")
    if not answers.gpus.all:
        return _Layout(default, "none", "no GPU: one rank, or as many as the machine has cores to spare")
    for checkpointing in ("none", "selective", "full"):
        draft = _parsed(_rendered(answers, _Layout(default, checkpointing, "")))
        try:
            question = ask(draft, deepspeed_path=REPOSITORY / default, gpus=answers.gpus, device=answers.device)
        except ConfigError as error:
            if "sizes are not known" not in str(error):
                raise
            return _Layout(default, "none", "the model's sizes are not known here; `seqaware plan` tells once they are")
        layouts = ((question.source, question.layout), *question.others)
        plain = [each for each in layouts if "offload" not in each[0] and "zeropp" not in each[0]]
        for candidates in (plain, layouts):
            best = cheapest(candidates, answers.device, step_tokens=question.step_tokens)
            if best is not None and (candidates is plain or checkpointing == "full"):
                return _Layout(best.name, checkpointing, _why(best, answers))
    raise ConfigError(
        f"{answers.model} does not fit {answers.gpus.all} × {answers.device.name} at {answers.max_seq_length} tokens",
        do="take more GPUs, --lora, or a smaller --max-seq-length",
    )


def _why(best: LayoutChoice, answers: Answers) -> str:
    return f"the fastest that fits {answers.gpus.all} × {answers.device.name}: about {best.time.seconds:.2g} s a step"


def _parsed(text: str) -> Config:
    try:
        return Config.model_validate(parse_yaml(text))
    except ValidationError as error:
        raise config_error(error, origin="the config of these answers") from error


def first_row(data: str) -> dict[str, Any]:
    """The first row of a local jsonl file; empty for any other source."""
    path = local_path(data)
    if path.suffix != ".jsonl" or not path.is_file():
        return {}
    with path.open("rb") as file:
        line = file.readline(JSON_BYTES)
    try:
        row = parse_json(line) if line.strip() else {}
    except MalformedError as error:
        raise ConfigError(f"{data}: the first row is not JSON", got=error, do="write one JSON object a line") from error
    return row if isinstance(row, dict) else {}


def _format(data: str) -> str:
    row = first_row(data)
    if all(key in row for key in _QUESTION) or data in _QUESTION_SOURCES:
        return (
            '  prompt_template: "Question: {question}\\nAnswer:"   # any column of the rows is a {field}\n'
            '  answer_template: " {answer}"                       # what carries loss'
        )
    kind = "chat: loss on the assistant's turns" if "messages" in row else "the row's own prompt, messages or text"
    return f"  prompt_template: null             # {kind}; or a text with {{fields}}, then answer_template too"


def _evaluation(held_out: str | None) -> str:
    if held_out is None:
        return "  dataset: null                     # held-out rows, such as {name: heldout.jsonl}"
    return f"  dataset: {{name: {_quoted(held_out)}}}\n  every_steps: 100"


def _rendered(answers: Answers, layout: _Layout) -> str:
    discount, value = next(iter(answers.discount.items()))
    lora = "{rank: 16}" if answers.lora else "null"
    return f"""\
# Made by `seqaware init`. Every key there is, with its default: train_configs/default.yaml and docs/config.md.
#   seqaware plan {answers.name}.yaml        what it costs, before it runs
#   seqaware preview {answers.name}.yaml     the rows as the model gets them
#   seqaware weights {answers.name}.yaml     where the objective puts its weight
#   seqaware train {answers.name}.yaml       one rank; deepspeed, torchrun, srun and mpirun start launcher/train.py

model:
  base_name: {_quoted(answers.model)}
  output_name: {_quoted(answers.name)}
  activation_checkpointing: {layout.checkpointing:<10}# none | selective (less memory) | full (a third slower) | offload

lora: {lora:<28}# {{rank: 16}} trains adapters instead of the whole model; null: all weights

dataset:
  name: {_quoted(answers.data)}

format:
{_format(answers.data)}

training:
  parameters:
    max_seq_length: {answers.max_seq_length:<14} # tokens of an example; seqaware weights tells what truncation loses
  optimizer:
    lr: {"2e-4" if answers.lora else "2e-5":<27}# the highest; adapters bear ten times more than whole models
    max_grad_norm: 1.0
  schedule:
    num_epochs: 1
    warmup_ratio: 0.03
    global_batch_size: {answers.batch:<11} # sequences of an optimizer step, on any number of ranks
    micro_batch_tokens: {answers.max_seq_length:<10} # what a rank holds at once: memory and speed only
  sft:
    # Token k of a sequence weighs w_k = (1 − γ^k) / (1 − γ); γ as gamma, half_life or horizon; 0: cross-entropy.
    {discount}: {value:.15g}
    # Σ w·l / Σ w: the gradient is as large as in plain cross-entropy: lr and max_grad_norm mean the same.
    normalize_by: weight
  control:
    seed: 42

evaluation:
{_evaluation(answers.held_out)}

output:
  save_every: 200                   # optimizer steps between checkpoints; the same command goes on from the newest

# {layout.why}
deepspeed: {_quoted(_reachable(layout.deepspeed))}
"""


def _quoted(text: str) -> str:
    """In YAML's double quotes. JSON's are not the same: they have no escape for U+1F642."""
    return yaml.safe_dump(text, default_style='"', allow_unicode=True, width=math.inf).rstrip("\n")


def _reachable(name: str) -> str:
    """As it is from the repository's root, whole from elsewhere."""
    return name if Path(name).is_file() else str(REPOSITORY / name)
