"""A trained model, evaluated on its own: `evaluation` of a config, on any number of ranks, sharded or not."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from seqaware import __version__
from seqaware.checkpoint.manifest import write_durably
from seqaware.config.schema import Config
from seqaware.data.questions import check_lengths, read_questions
from seqaware.data.tokenization import load_tokenizer
from seqaware.distributed.launch_environment import LaunchEnvironment
from seqaware.distributed.process_group import connect
from seqaware.engine.inference import load_answering_model
from seqaware.engine.versions import git_revision, versions
from seqaware.errors import ConfigError
from seqaware.evaluation.measure import answer_questions, write_answers_file
from seqaware.evaluation.scores import scores
from seqaware.models.model import DTYPES, LoadOptions, check_vocabulary, local_or_hub
from seqaware.models.model_source import check_model_source
from seqaware.plan.plan import Plan, make_plan
from seqaware.plan.specs import facts_from_dict
from seqaware.tools.evaluation_source import default_folder, with_model
from seqaware.tools.whole_model import whole_model
from seqaware.training.assembly import world_of
from seqaware.training.prepare import resolve_model_config
from seqaware.training.process import Say
from seqaware.training.run_directory import check_writable

ANSWERS, RESULTS = "answers.jsonl", "results.json"
_PATIENCE_MINUTES = 24 * 60.0


@dataclass(frozen=True)
class EvaluateRequest:
    """What the command line asks for.

    Attributes:
        model: a hub id, or the folder of a model, an adapter, a checkpoint or a run.
        out: where results go; None: beside the model.
    """

    config: Config
    model: str
    deepspeed_path: Path | None = None
    out: Path | None = None


def evaluate(request: EvaluateRequest, *, address: LaunchEnvironment, say: Say) -> dict[str, Any]:
    """Answer every held-out question once; returns the scores, on every rank. Every rank calls it.

    Raises:
        ConfigError, CheckpointError, DataError: the config asks for no answers, or model or rows cannot be used.
    """
    asked = request.config.evaluation
    if asked.dataset is None or asked.metric == "none":
        do = "write evaluation.dataset and evaluation.metric (exact_match, squad, choice or choice_likelihood)"
        raise ConfigError("the config has no held-out rows, or no metric to judge answers by", do=do)
    if request.out is not None:
        check_writable(request.out, name="--out")
    config = with_model(request.config, whole_model(request.model, say=say))
    check_model_source(config.model)
    tokenizer = load_tokenizer(config.model)
    facts = facts_from_dict(resolve_model_config(config.model, tokenizer).to_dict())
    if facts.vocab_size is not None:
        check_vocabulary(facts.vocab_size, tokenizer)
    plan = make_plan(config, world=world_of(address), deepspeed_path=request.deepspeed_path, model=facts)
    questions = read_questions(config, tokenizer=tokenizer, max_seq_length=plan.batches.max_seq_length)
    check_lengths(questions, config, max_positions=facts.max_positions)
    say(f"questions   {len(questions):,}, {config.evaluation.metric.replace('_', ' ')}, from {_data(config)}")
    ranks = connect(address, timeout_minutes=_PATIENCE_MINUTES)
    model = load_answering_model(local_or_hub(str(config.model.base_name)), _options(plan), ranks=ranks)
    started = time.monotonic()
    answers = answer_questions(model, questions, tokenizer=tokenizer, config=config.evaluation, leaving=lambda: False)
    assert answers is not None, "nobody asked it to leave"
    found = scores(answers, config.evaluation.metric)
    seconds = time.monotonic() - started
    if ranks.is_first:
        out = request.out or default_folder(request.model)
        out.mkdir(parents=True, exist_ok=True)
        write_answers_file(answers, out / ANSWERS)
        content = {**found, **_circumstances(request, plan, address), "seconds": round(seconds, 1)}
        write_durably(out / RESULTS, json.dumps(content, indent=1, ensure_ascii=False))
        for line in [*_told(found), f"took        {seconds:.1f} s", f"written     {out / RESULTS}, {out / ANSWERS}"]:
            say(line)
    ranks.barrier()
    return dict(found)


def _options(plan: Plan) -> LoadOptions:
    model = plan.config.model
    return LoadOptions(DTYPES[plan.dtype], 0.0, model.revision, model.trust_remote_code, plan.deepspeed)


def _data(config: Config) -> str:
    dataset = config.evaluation.dataset
    assert dataset is not None
    return dataset.name or ", ".join(part.name for part in dataset.mixture or [])


def _told(found: dict[str, float | int]) -> list[str]:
    shares = [name for name in found if f"{name}_low" in found]
    lines = [
        f"{name:<27} {found[name]:6.1%}   (95 %: {found[f'{name}_low']:.1%} to {found[f'{name}_high']:.1%})"
        for name in shares
    ]
    if "coverage" in found:
        lines.append(f"{'coverage':<27} {found['coverage']:6.1%}   of the answers name one that the pattern finds")
    return lines


def _circumstances(request: EvaluateRequest, plan: Plan, address: LaunchEnvironment) -> dict[str, Any]:
    """What made these figures: enough to make them again."""
    config = plan.config
    return {
        "model": request.model,
        "evaluation": config.evaluation.model_dump(mode="json"),
        "format": config.format.model_dump(mode="json"),
        "dtype": plan.dtype,
        "topology": {"ranks": address.size, "launcher": address.launcher, "zero_stage": plan.zero_stage},
        "seqaware": __version__,
        "git_revision": git_revision(),
        "versions": versions(),
    }
