"""The keys of zero_optimization: the same as the installed DeepSpeed's, and refused before DeepSpeed is asked."""

from __future__ import annotations

from typing import Any, Union, get_args, get_origin

import pytest
from pydantic import BaseModel

from seqaware.errors import ConfigError
from seqaware.plan.deepspeed_config import check_owned_keys
from seqaware.plan.zero_schema import (
    COMMUNICATION_BLOCKS,
    DEPRECATED,
    NULLABLE_BLOCKS,
    ZERO_BLOCKS,
    ZERO_VALUES,
    Value,
    check_zero_keys,
)


def fields_of(model: type[BaseModel]) -> dict[str, Any]:
    """Every name a field may be written by -> the field."""
    fields: dict[str, Any] = {}
    for name, field in model.model_fields.items():
        fields |= {name: field} | ({field.alias: field} if field.alias else {})
    return fields


def value_of(field: Any) -> Value:
    """What a field of DeepSpeed's takes, in our words."""
    options = get_args(field.annotation) if get_origin(field.annotation) is Union else (field.annotation,)
    written = [kind for kind in options if kind is not type(None)]
    # Paths and enumerations are text in JSON.
    kinds = {kind if kind in (bool, int, float) else get_origin(kind) or str for kind in written}
    bounds = {type(bound).__name__.lower(): getattr(bound, type(bound).__name__.lower()) for bound in field.metadata}
    return Value(
        tuple(sorted(kinds, key=str)),
        low=bounds.get("gt", bounds.get("ge")),
        high=bounds.get("lt", bounds.get("le")),
        exclusive="gt" in bounds or "lt" in bounds,
        nullable=type(None) in options,
    )


def sort_types(value: Value) -> Value:
    return Value(tuple(sorted(value.types, key=str)), value.low, value.high, value.exclusive, value.nullable)


def test_the_tables_are_those_of_the_installed_deepspeed() -> None:
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    fields = fields_of(DeepSpeedZeroConfig)
    assert set(fields) == {*ZERO_VALUES, *ZERO_BLOCKS, *DEPRECATED}
    assert {name for name, field in fields.items() if (field.json_schema_extra or {}).get("deprecated")} == {
        *DEPRECATED
    }
    for name, value in ZERO_VALUES.items():
        # The stage is an enumeration there.
        assert name == "stage" or sort_types(value) == value_of(fields[name]), name
    for name, block in ZERO_BLOCKS.items():
        options = get_args(fields[name].annotation) or (fields[name].annotation,)
        assert (type(None) in options) == (name in NULLABLE_BLOCKS), name
        inner = fields_of(options[0])
        assert {key: sort_types(value) for key, value in block.items()} == {k: value_of(f) for k, f in inner.items()}


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"stage": 1, "stgae": 3}, "stgae: unknown key; did you mean stage?"),
    ({"xyz": 3}, "xyz: unknown key; the keys are stage"),
    ({"offload_optimiser": {"device": "cpu"}}, "did you mean offload_optimizer?"),
    (
        {"reduce_bucket_size": "many"},
        "is not what DeepSpeed takes; got 'many' (a string); write a whole number, more than 0",
    ),
    ({"reduce_bucket_size": 0}, "write a whole number, more than 0"),
    ({"reduce_bucket_size": 1.5}, "got 1.5 (a number); write a whole number"),
    ({"reduce_bucket_size": float("inf")}, "write a whole number"),
    ({"reduce_bucket_size": True}, "write a whole number"),
    ({"sub_group_size": -1}, "write a whole number, at least 0"),
    ({"contiguous_gradients": "yes"}, "got 'yes' (a string); write true or false"),
    ({"contiguous_gradients": 1}, "write true or false"),
    ({"contiguous_gradients": None}, "write true or false"),
    ({"overlap_comm": 3}, "write true or false or null"),
    ({"cpu_offload": True}, 'deprecated in DeepSpeed; write offload_optimizer: {"device": "cpu"}'),
    ({"max_live_parameters": 1, "stage3_max_live_parameters": 2}, "are the same key; keep one of them"),
    ({"offload_param": "cpu"}, "offload_param must be an object; got 'cpu' (a string); its keys are device"),
    ({"leaf_module": None}, "leaf_module must be an object"),
    ({"leaf_module": {"names": [1]}}, "got [1] (a list); write a list of names"),
    ({"offload_param": {"devise": "cpu"}}, "zero_optimization.offload_param.devise: unknown key; did you mean device?"),
    ({"offload_optimizer": {"ratio": 2}}, "got 2 (a whole number); write a number, from 0 to 1"),
    ({"zenflow": {"topk_ratio": 1}}, "write a number, more than 0 and less than 1"),
]


@pytest.mark.parametrize(("zero", "words"), REFUSED)
def test_what_deepspeed_would_refuse_is_refused_by_name(zero: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        check_owned_keys({"zero_optimization": zero}, origin="mine.json")
    assert "mine.json: zero_optimization." in str(caught.value)
    assert words in str(caught.value)


def test_what_deepspeed_takes_is_let_through() -> None:
    check_zero_keys(
        {
            "stage": 3,
            "reduce_bucket_size": 5e8,
            "overlap_comm": None,
            "module_granularity_threshold": -1,
            "stage3_max_live_parameters": 0,
            "offload_param": None,
            "offload_optimizer": {"device": "nvme", "nvme_path": "/tmp", "ratio": 1},
            "zenflow": {"select_interval": 3, "update_interval": "auto", "steps_per_epoch": None},
            "leaf_module": {"classes": ["Block"]},
        },
        origin="mine.json",
    )


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        ({"gradient_predivide_factor": 0}, "gradient_predivide_factor is not what DeepSpeed takes"),
        ({"prescale_gradients": "yes"}, "write true or false"),
        ({"communication_data_type": "fp12"}, "communication_data_type must be one of fp32, fp16, bf16"),
        ({"communication_data_type": 16}, "write a string or null"),
        ({"comms_logger": 5}, "comms_logger must be an object"),
        ({"comms_logger": {"prof_op": []}}, "comms_logger.prof_op: unknown key; did you mean prof_ops?"),
        ({"flops_profiler": {"profile_step": "one"}}, "flops_profiler.profile_step is not what DeepSpeed takes"),
        ({"memory_breakdown": None}, "write true or false"),
        ({"zero_optimization": {"sub_group_size": 2**63}}, "sub_group_size is too large"),
        ({"aio": {"block_size": 10**300}}, "aio.block_size is too large"),
    ],
)
def test_values_beside_zero_are_checked_too(raw: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        check_owned_keys(raw, origin="mine.json")
    assert words in str(caught.value)


def test_the_keys_beside_zero_are_those_of_the_installed_deepspeed() -> None:
    from deepspeed.comm.config import CommsLoggerConfig
    from deepspeed.profiling.config import DeepSpeedFlopsProfilerConfig

    blocks = COMMUNICATION_BLOCKS
    assert set(blocks["comms_logger"]) == set(CommsLoggerConfig.model_fields)
    assert set(blocks["flops_profiler"]) == set(vars(DeepSpeedFlopsProfilerConfig({})))
    known = {"communication_data_type": "bf16", "gradient_predivide_factor": 2, "comms_logger": {"prof_ops": ["x"]}}
    check_owned_keys({**known, "flops_profiler": {"module_depth": -1, "output_file": None}}, origin="mine.json")
