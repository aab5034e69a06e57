"""Everything a run needs before its ranks meet: tokenizer, tokenised data, model facts, and the Plan.

Each rank comes to the same by itself; a file lock sees to it that a host tokenises once. No process group exists yet,
so a long tokenising runs into no collective's timeout, and every contradiction is found before a model loads.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoConfig, PreTrainedModel, PreTrainedTokenizerFast

from seqaware.compat.operators import check_operators
from seqaware.config.schema import Config, ModelConfig
from seqaware.data.chat import InferenceTokenizer
from seqaware.data.questions import Question, check_lengths, read_questions
from seqaware.data.sampler import StepSampler
from seqaware.data.store.store_specs import data_facts, step_order
from seqaware.data.store.token_store import TokenStore
from seqaware.data.tokenization import load_tokenizer, prepare_store, refuse_custom_code
from seqaware.errors import ConfigError
from seqaware.estimate.layout import BYTES
from seqaware.models.layers import check_layers
from seqaware.models.lora_targets import find_targets
from seqaware.models.model import (
    CONFIG_ERRORS,
    check_new_are_trained,
    check_vocabulary,
    empty_causal_lm,
    initial_config,
    local_or_hub,
)
from seqaware.models.model_source import check_model_source, refuse_adapter
from seqaware.models.model_weights import check_weights
from seqaware.objective.weighting import Weighting
from seqaware.plan.batches import max_seq_length
from seqaware.plan.offload import SwapSizes, check_swap_space
from seqaware.plan.plan import Plan, make_plan
from seqaware.plan.specs import World, facts_from_dict

Progress = Callable[[int], None]


@dataclass(frozen=True)
class Prepared:
    """What is known before the ranks meet.

    Attributes:
        plan: with the data's figures. order: which documents a step holds.
        held_out: the tokenised evaluation rows, or None. questions: their prompts, where answers are asked for.
        inference: the tokenizer as the trained model is saved with it.
        parameters: number of the model's weights. trained_parameters: of those that are trained, adapters or all.
    """

    plan: Plan
    tokenizer: PreTrainedTokenizerFast
    store: TokenStore
    order: StepSampler
    held_out: TokenStore | None
    questions: list[Question]
    weighting: Weighting
    inference: InferenceTokenizer
    parameters: int
    trained_parameters: int


def prepare(config: Config, *, world: World, deepspeed_path: Path | None, progress: Progress | None) -> Prepared:
    """Check the model and tokenizer, tokenise what is not tokenised yet, and make the Plan.

    Raises:
        ConfigError, DataError: anything that would stop the run later.
    """
    weighting = build_weighting(config)
    check_model_source(config.model)
    tokenizer = load_tokenizer(config.model)
    model_config = resolve_model_config(config.model, tokenizer)
    empty = empty_causal_lm(model_config, trust_remote_code=config.model.trust_remote_code)
    check_layers(empty, config.model)
    parameters = sum(parameter.numel() for parameter in empty.parameters())
    trained = parameters
    if config.lora is not None:
        trained = find_targets(config.lora, empty, loss_kernel=config.model.loss_kernel).trained
    model = facts_from_dict(model_config.to_dict())
    if model.vocab_size is not None:
        check_vocabulary(model.vocab_size, tokenizer)
    draft = make_plan(config, world=world, deepspeed_path=deepspeed_path, model=model, data=None)
    check_operators(draft)
    largest = max(parameter.numel() for parameter in empty.parameters())
    sizes = SwapSizes(parameters, trained=trained, largest=largest, itemsize=BYTES[draft.dtype])
    check_swap_space(draft.deepspeed["zero_optimization"], sizes, world=world)
    _check_local_weights(config, empty)
    store = _tokenised(config, draft, tokenizer, training=True, progress=progress)
    held_out = (
        _tokenised(config, draft, tokenizer, training=False, progress=progress) if config.evaluation.dataset else None
    )
    order = step_order(store, draft)
    facts = data_facts(store, order, config.training.schedule)
    plan = make_plan(config, world=world, deepspeed_path=deepspeed_path, model=model, data=facts)
    questions: list[Question] = []
    if config.evaluation.metric != "none":
        questions = read_questions(config, tokenizer=tokenizer, max_seq_length=draft.batches.max_seq_length)
        check_lengths(questions, config, max_positions=model.max_positions)
    return Prepared(
        plan,
        tokenizer=tokenizer,
        store=store,
        order=order,
        held_out=held_out,
        questions=questions,
        weighting=weighting,
        inference=InferenceTokenizer.of(tokenizer, config.format.chat_template),
        parameters=parameters,
        trained_parameters=trained,
    )


def _check_local_weights(config: Config, empty: PreTrainedModel) -> None:
    """Before data is tokenised; of a model on the hub when its files are here, as it loads."""
    if config.model.base_name is None or not Path(source := local_or_hub(config.model.base_name)).is_dir():
        return
    new = check_weights(source, empty, allow_missing=config.model.allow_missing)
    if config.lora is not None:
        check_new_are_trained(new, config.lora, empty)


def prepare_data(config: Config, *, progress: Progress | None) -> list[Path]:
    """Tokenise the training rows and the held-out rows, if that is not done; returns the stores.

    Raises:
        ConfigError, DataError: as `prepare`.
    """
    tokenizer, length = tokenizer_and_length(config)
    datasets = [(config.dataset, True), (config.evaluation.dataset, False)]
    return [
        prepare_store(
            dataset, config=config, tokenizer=tokenizer, max_seq_length=length, training=training, progress=progress
        )
        for dataset, training in datasets
        if dataset is not None
    ]


def tokenizer_and_length(config: Config) -> tuple[PreTrainedTokenizerFast, int]:
    """The tokenizer and the longest document, in tokens: what decides a store besides its rows.

    Raises:
        ConfigError: the model, its config or the tokenizer cannot be read.
    """
    check_model_source(config.model)
    tokenizer = load_tokenizer(config.model)
    model = facts_from_dict(resolve_model_config(config.model, tokenizer).to_dict())
    length, _ = max_seq_length(config.training.parameters, model)
    return tokenizer, length


def build_weighting(config: Config) -> Weighting:
    """The objective's weights from `training.sft`.

    Raises:
        ConfigError: the user's own scheme cannot be imported, or the scale does not fit γ.
    """
    sft = config.training.sft
    try:
        return Weighting(gamma=sft.discount, scheme=sft.weighting, scale=sft.scale)
    except ValueError as error:
        raise ConfigError(f"training.sft: {error}") from error


def resolve_model_config(model: ModelConfig, tokenizer: PreTrainedTokenizerFast) -> Any:
    """The transformers config of the run's model, wherever it comes from."""
    if model.from_scratch is not None:
        return initial_config(model.from_scratch, tokenizer)
    assert model.base_name is not None
    try:
        return AutoConfig.from_pretrained(
            local_or_hub(model.base_name), revision=model.revision, trust_remote_code=model.trust_remote_code
        )
    except (OSError, *CONFIG_ERRORS) as error:
        refuse_custom_code(error, f"the model {model.base_name}")
        refuse_adapter(local_or_hub(model.base_name), model.revision)
        first_line = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise ConfigError("model.base_name: the model's config cannot be read", got=first_line) from error


def _tokenised(
    config: Config, draft: Plan, tokenizer: PreTrainedTokenizerFast, *, training: bool, progress: Progress | None
) -> TokenStore:
    dataset = config.dataset if training else config.evaluation.dataset
    assert dataset is not None
    path = prepare_store(
        dataset,
        config=config,
        tokenizer=tokenizer,
        max_seq_length=draft.batches.max_seq_length,
        training=training,
        progress=progress,
    )
    return TokenStore.open(path)
