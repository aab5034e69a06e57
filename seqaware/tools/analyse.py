"""What a model does with a prompt, many times over: how sure it is at each step, and which tokens it takes.

One process and the whole model, which is how one looks at a model, not how one measures it.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from seqaware.config.schema import ModelConfig
from seqaware.data.questions import Question
from seqaware.data.tokenization import load_tokenizer
from seqaware.distributed.launch_environment import LaunchEnvironment
from seqaware.distributed.process_group import connect
from seqaware.engine.inference import AnsweringModel, bytes_per_row, in_halves, load_answering_model
from seqaware.errors import ConfigError
from seqaware.evaluation.generate import write_answers
from seqaware.evaluation.rounds import BatchSize, rounds
from seqaware.evaluation.sampling import Decoding, Trace
from seqaware.models.model import DTYPES, LoadOptions, local_or_hub
from seqaware.models.model_source import check_model_source
from seqaware.report.sample_pages import page, picture
from seqaware.tools.whole_model import whole_model
from seqaware.training.process import Say
from seqaware.training.run_directory import check_writable

_LISTED = 20


@dataclass(frozen=True)
class AnalyseRequest:
    """What the command line asks for. out: the folder of analysis.json, .png and .html."""

    model: str
    prompt: str
    samples: int
    decoding: Decoding
    dtype: str
    out: Path


@dataclass(frozen=True)
class _Sample:
    """One continuation: its text and, for each step up to its end, token, entropy in nats and probability."""

    text: str
    tokens: list[int]
    entropy: NDArray[np.float64]
    probability: NDArray[np.float64]


def analyse(request: AnalyseRequest, *, address: LaunchEnvironment, say: Say) -> dict[str, Any]:
    """Draw the samples and write what they show.

    Raises:
        CheckpointError: the checkpoint is not whole.
        ConfigError: the model or its tokenizer cannot be read, the prompt is empty, or several ranks were started.
    """
    if address.size > 1:
        raise ConfigError("analyse looks at one model in one process", got=f"{address.size} ranks", do="start it alone")
    check_writable(request.out, name="--out")
    config = ModelConfig(base_name=whole_model(request.model, say=say))
    check_model_source(config)
    tokenizer = load_tokenizer(config)
    ids = tuple(tokenizer.encode(request.prompt))
    if not ids:
        raise ConfigError("the prompt is empty", do="write some text as --prompt")
    ranks = connect(address)
    options = LoadOptions(DTYPES[request.dtype], 0.0, None, False, {})
    model = load_answering_model(local_or_hub(str(config.base_name)), options, ranks=ranks)
    samples, first = _draw(model, ids, request, tokenizer)
    found = _summary(request, samples, first, tokenizer)
    request.out.mkdir(parents=True, exist_ok=True)
    image = request.out / "analysis.png"
    picture(found, image)
    (request.out / "analysis.json").write_text(json.dumps(found, indent=1, ensure_ascii=False), encoding="utf-8")
    (request.out / "analysis.html").write_text(page(found, image), encoding="utf-8")
    cut = f"; {found['at_the_limit']} cut at {found['max_new_tokens']} tokens" if found["at_the_limit"] else ""
    say(f"samples     {len(samples)}, of which {found['distinct_texts']} differ; {found['tokens']:,} tokens{cut}")
    entropy, probability = found["mean_entropy"], found["mean_probability"]
    say(f"entropy     {entropy:.3f} nats a token; probability of the taken token {probability:.3f}")
    say(f"written     {request.out}/analysis.json, .png, .html")
    return found


def _draw(
    model: AnsweringModel, ids: tuple[int, ...], request: AnalyseRequest, tokenizer: PreTrainedTokenizerBase
) -> tuple[list[_Sample], NDArray[np.float64]]:
    """The samples, and the model's distribution of the first token, [V]."""
    from seqaware.models.attention import standard_attention

    first: list[NDArray[np.float64]] = []

    def write(together: Sequence[int]) -> list[_Sample]:
        asked = [Question(f"sample:{number}", request.prompt, ids, ()) for number in together]
        trace = Trace()
        texts = write_answers(model, asked, tokenizer=tokenizer, decoding=request.decoding, trace=trace)
        assert trace.first is not None, "there is at least one step"
        first.append(trace.first.double().numpy())
        parts = (trace.tokens, trace.entropy, trace.probability)
        steps = [torch.stack(part, dim=1).double().numpy() for part in parts]
        end = tokenizer.eos_token_id
        return [_sample(text, [each[row] for each in steps], end=end) for row, text in enumerate(texts)]

    def cost(longest: int) -> int:
        return bytes_per_row(model.model, positions=longest, new_tokens=request.decoding.max_new_tokens, logits=4)

    batch = BatchSize(model, cost, fixed=None)
    samples: list[_Sample] = []
    with standard_attention(model.model):
        for mine in rounds([len(ids)] * request.samples, batch, rank=0, size=1):
            samples += in_halves(write, mine, model=model, halved=batch.too_large)
    return samples, first[0]


def _sample(text: str, steps: Sequence[NDArray[np.float64]], *, end: int) -> _Sample:
    """Up to the end-of-sequence token, which counts: to stop is a choice too.

    Args:
        steps: tokens, entropies and probabilities, [steps] each.
    """
    tokens, entropy, probability = steps
    ends = np.flatnonzero(tokens == end)
    length = int(ends[0]) + 1 if ends.size else len(tokens)
    return _Sample(text, tokens[:length].astype(int).tolist(), entropy[:length], probability[:length])


def _summary(
    request: AnalyseRequest,
    samples: Sequence[_Sample],
    first: NDArray[np.float64],
    tokenizer: PreTrainedTokenizerBase,
) -> dict[str, Any]:
    counted = Counter(token for sample in samples for token in sample.tokens)
    total = sum(counted.values())
    likeliest = np.argsort(first)[::-1][:_LISTED]
    decoding = request.decoding
    return {
        "model": request.model,
        "prompt": request.prompt,
        "samples": len(samples),
        "temperature": decoding.temperature,
        "top_p": decoding.top_p,
        "seed": decoding.seed,
        "max_new_tokens": decoding.max_new_tokens,
        "tokens": total,
        "at_the_limit": sum(len(sample.tokens) >= decoding.max_new_tokens for sample in samples),
        "distinct_texts": len({sample.text for sample in samples}),
        "mean_entropy": float(np.concatenate([sample.entropy for sample in samples]).mean()),
        "mean_probability": float(np.concatenate([sample.probability for sample in samples]).mean()),
        "steps": _steps(samples),
        "first_token": [{"token": tokenizer.decode([int(i)]), "probability": float(first[i])} for i in likeliest],
        "token_frequencies": [
            {"token": tokenizer.decode([token]), "count": count, "share": count / total}
            for token, count in counted.most_common(_LISTED)
        ],
        "texts": [
            {
                "text": sample.text,
                "log_probability": float(np.log(np.maximum(sample.probability, 1e-45)).sum()),
                "entropy": sample.entropy.tolist(),
                "probability": sample.probability.tolist(),
            }
            for sample in samples
        ],
    }


def _steps(samples: Sequence[_Sample]) -> list[dict[str, float | int]]:
    """At each step, over the samples that have not ended: means, and the spread between samples."""
    steps = []
    for step in range(max(len(sample.tokens) for sample in samples)):
        alive = [sample for sample in samples if step < len(sample.tokens)]
        entropy = np.array([sample.entropy[step] for sample in alive])
        probability = np.array([sample.probability[step] for sample in alive])
        steps.append(
            {
                "step": step + 1,
                "samples": len(alive),
                "distinct_tokens": len({sample.tokens[step] for sample in alive}),
                "entropy": float(entropy.mean()),
                "entropy_sd": float(entropy.std()),
                "probability": float(probability.mean()),
                "probability_sd": float(probability.std()),
            }
        )
    return steps
