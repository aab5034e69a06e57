"""What a DeepSpeed JSON may hold besides the plan's own keys, as DeepSpeed 0.19 reads it, but known without torch.

DeepSpeed checks its keys too, with a traceback, after the model is loaded. A test compares the tables with DeepSpeed's.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from seqaware.config.messages import nearest, show
from seqaware.errors import ConfigError


@dataclass(frozen=True)
class Value:
    """What may stand behind a key.

    Attributes:
        types: of JSON: bool, int, float, str, list (of strings). low, high: bounds, inclusive unless `exclusive`.
        nullable: null may stand there too.
    """

    types: tuple[type, ...]
    low: float | None = None
    high: float | None = None
    exclusive: bool = False
    nullable: bool = False

    def words(self) -> str:
        """What to write, for a person."""
        kinds = " or ".join(_WORDS[kind] for kind in self.types)
        return kinds + self._bounds() + (" or null" if self.nullable else "")

    def _bounds(self) -> str:
        if self.low is None:
            return ""
        if self.high is None:
            return f", {'more than' if self.exclusive else 'at least'} {self.low:g}"
        within = "more than {:g} and less than {:g}" if self.exclusive else "from {:g} to {:g}"
        return ", " + within.format(self.low, self.high)

    def takes(self, value: object) -> bool:
        """Whether DeepSpeed would read `value` as what it says."""
        if value is None:
            return self.nullable
        if isinstance(value, bool):
            return bool in self.types
        if isinstance(value, int | float):
            return self._takes_number(value)
        if isinstance(value, list):
            return list in self.types and all(isinstance(item, str) for item in value)
        return type(value) in self.types

    def _takes_number(self, value: float) -> bool:
        if abs(value) > LARGEST:
            return False
        # 5e8 is a whole number to DeepSpeed, although JSON reads it as a float.
        whole = math.isfinite(value) and value == int(value)
        if not (float in self.types and math.isfinite(value)) and not (int in self.types and whole):
            return False
        if self.exclusive:
            return (self.low is None or value > self.low) and (self.high is None or value < self.high)
        return (self.low is None or value >= self.low) and (self.high is None or value <= self.high)


_WORDS: Mapping[type, str] = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "a string",
    list: "a list of names",
}
LARGEST = 2**63 - 1
"""Of every number: sizes are int64 in torch, and sys.maxsize is DeepSpeed's own default of one of them."""
_BOOL = Value((bool,))
_INT = Value((int,))
_COUNT = Value((int,), low=0)
_SHARE = Value((float,), low=0, high=1)
_NAMES = Value((list,))
_INTERVAL = Value((str, int))
_PATH = Value((str,), nullable=True)

# Written with or without `stage3_` in front.
_STAGE3: Mapping[str, Value] = {
    "prefetch_bucket_size": _COUNT,
    "param_persistence_threshold": _COUNT,
    "model_persistence_threshold": _COUNT,
    "max_live_parameters": _COUNT,
    "max_reuse_distance": _COUNT,
    "gather_16bit_weights_on_model_save": _BOOL,
    "module_granularity_threshold": _INT,
    "use_all_reduce_for_fetch_params": _BOOL,
    "allgather_sequential": _BOOL,
}
ZERO_VALUES: Mapping[str, Value] = {
    "stage": Value((int,), low=0, high=3),
    "contiguous_gradients": _BOOL,
    "reduce_scatter": _BOOL,
    "reduce_bucket_size": Value((int,), low=0, exclusive=True),
    "use_multi_rank_bucket_allreduce": _BOOL,
    "allgather_partitions": _BOOL,
    "allgather_bucket_size": _COUNT,
    "overlap_comm": Value((bool,), nullable=True),
    "compute_grad_norm": _BOOL,
    "load_from_fp32_weights": _BOOL,
    "elastic_checkpoint": _BOOL,
    "sub_group_size": _COUNT,
    **_STAGE3,
    **{f"stage3_{name}": value for name, value in _STAGE3.items()},
    "ignore_unused_parameters": _BOOL,
    "legacy_stage1": _BOOL,
    "round_robin_gradients": _BOOL,
    "parameter_alignment": _BOOL,
    "zero_hpz_partition_size": _COUNT,
    "zero_quantized_weights": _BOOL,
    "zero_quantized_nontrainable_weights": _BOOL,
    "zero_quantized_gradients": _BOOL,
    "memory_efficient_linear": _BOOL,
    "pipeline_loading_checkpoint": _BOOL,
    "override_module_apply": _BOOL,
    "log_trace_cache_warnings": _BOOL,
    "enable_sanity_checks": _BOOL,
    "save_muon_momentum_buffer_in_memory": _BOOL,
}
ZERO_BLOCKS: Mapping[str, Mapping[str, Value]] = {
    "offload_param": {
        "device": Value((str,)),
        "nvme_path": _PATH,
        "buffer_count": _COUNT,
        "buffer_size": _COUNT,
        "max_in_cpu": _COUNT,
        "pin_memory": _BOOL,
    },
    "offload_optimizer": {
        "device": Value((str,)),
        "nvme_path": _PATH,
        "buffer_count": _COUNT,
        "pin_memory": _BOOL,
        "pipeline_read": _BOOL,
        "pipeline_write": _BOOL,
        "fast_init": _BOOL,
        "ratio": _SHARE,
        "super_offload": _BOOL,
        "cpuadam_cores_perc": _SHARE,
    },
    "zenflow": {
        "topk_ratio": Value((float,), low=0, high=1, exclusive=True),
        "select_strategy": Value((str,)),
        "select_interval": _INTERVAL,
        "update_interval": _INTERVAL,
        "overlap_step": _BOOL,
        "offload": _BOOL,
        "auto_ratio": _SHARE,
        "full_warm_up_rounds": _INT,
        "pt_reserved_cores_perc": _SHARE,
        "steps_per_epoch": Value((int,), nullable=True),
    },
    "leaf_module": {"classes": _NAMES, "names": _NAMES, "name_suffixes": _NAMES},
}
# A block that null turns off.
NULLABLE_BLOCKS = ("offload_param", "offload_optimizer", "zenflow")
# DeepSpeed still reads these, but turns them into others behind the plan's back.
DEPRECATED: Mapping[str, str] = {
    "cpu_offload": 'offload_optimizer: {"device": "cpu"}',
    "cpu_offload_param": 'offload_param: {"device": "cpu"}',
    "cpu_offload_use_pin_memory": "pin_memory in offload_optimizer and offload_param",
    "stage3_gather_fp16_weights_on_model_save": "stage3_gather_16bit_weights_on_model_save",
}
# Keys of older releases: DeepSpeed 0.19 refuses them too, but after the model is loaded.
_NO_MICS = "MiCS is no longer in DeepSpeed"
_HPZ_INSTEAD = "delete it; zero_hpz_partition_size (ds_configs/zero_hpz.json) gathers weights within a node too"
REMOVED: Mapping[str, tuple[str, str]] = {
    "mics_shard_size": (_NO_MICS, _HPZ_INSTEAD),
    "mics_hierarchical_params_gather": (_NO_MICS, _HPZ_INSTEAD),
    "zeropp_loco_param": ("LoCo is no longer in DeepSpeed", "delete it"),
}
AIO_VALUES: Mapping[str, Value] = {
    "block_size": Value((int,), low=0, exclusive=True),
    "queue_depth": Value((int,), low=0, exclusive=True),
    "intra_op_parallelism": Value((int,), low=0, exclusive=True),
    "single_submit": _BOOL,
    "overlap_events": _BOOL,
    "use_gds": _BOOL,
}


COMMUNICATION_TYPES = ("fp32", "fp16", "bf16")
COMMUNICATION_VALUES: Mapping[str, Value] = {
    "communication_data_type": Value((str,), nullable=True),
    "prescale_gradients": _BOOL,
    "gradient_predivide_factor": Value((float,), low=0, exclusive=True),
    "memory_breakdown": _BOOL,
}
COMMUNICATION_BLOCKS: Mapping[str, Mapping[str, Value]] = {
    "comms_logger": {"enabled": _BOOL, "prof_all": _BOOL, "prof_ops": _NAMES, "verbose": _BOOL, "debug": _BOOL},
    "flops_profiler": {
        "enabled": _BOOL,
        "recompute_fwd_factor": Value((float,)),
        "profile_step": _INT,
        "module_depth": _INT,
        "top_modules": _INT,
        "detailed": _BOOL,
        "output_file": _PATH,
    },
    "aio": AIO_VALUES,
}


def check_communication_keys(raw: Mapping[str, Any], *, origin: str) -> None:
    """Refuse values outside of `zero_optimization` that DeepSpeed would refuse, after the model is loaded, or ignore.

    Raises:
        ConfigError: names the first such key.
    """
    for name, value in raw.items():
        if name in COMMUNICATION_BLOCKS:
            _check_block(COMMUNICATION_BLOCKS[name], value, key=f"{origin}: {name}")
        elif name in COMMUNICATION_VALUES:
            _check_value(name, value, COMMUNICATION_VALUES, key=f"{origin}: {name}", others=())
    dtype = raw.get("communication_data_type")
    if dtype is not None and dtype.lower() not in COMMUNICATION_TYPES:
        words = ", ".join(COMMUNICATION_TYPES)
        raise ConfigError(f"{origin}: communication_data_type must be one of {words}", got=show(dtype))


def check_zero_keys(zero: Mapping[str, Any], *, origin: str) -> None:
    """Refuse what DeepSpeed's ZeRO would refuse: unknown and doubled keys, wrong types, values out of bounds.

    Raises:
        ConfigError: names the first such key.
    """
    for name, value in zero.items():
        key = f"{origin}: zero_optimization.{name}"
        if name in DEPRECATED:
            raise ConfigError(f"{key} is deprecated in DeepSpeed", do=f"write {DEPRECATED[name]}")
        if name in REMOVED:
            why, instead = REMOVED[name]
            raise ConfigError(f"{key}: {why}", do=instead)
        if name in ZERO_BLOCKS:
            if value is not None or name not in NULLABLE_BLOCKS:
                _check_block(ZERO_BLOCKS[name], value, key=key)
            continue
        _check_value(name, value, ZERO_VALUES, key=key, others=tuple(ZERO_BLOCKS))
        if name in _STAGE3 and f"stage3_{name}" in zero:
            raise ConfigError(f"{key} and zero_optimization.stage3_{name} are the same key", do="keep one of them")


def _check_block(known: Mapping[str, Value], block: object, *, key: str) -> None:
    if not isinstance(block, Mapping):
        raise ConfigError(f"{key} must be an object", got=show(block), do=f"its keys are {', '.join(known)}")
    for inner, value in block.items():
        _check_value(inner, value, known, key=f"{key}.{inner}", others=())


def _check_value(name: str, value: object, known: Mapping[str, Value], *, key: str, others: tuple[str, ...]) -> None:
    names = (*known, *others)
    if name not in known:
        raise ConfigError(f"{key}: unknown key", do=nearest(name, names) or f"the keys are {', '.join(names)}")
    if isinstance(value, int | float) and LARGEST < abs(value) < math.inf:
        raise ConfigError(f"{key} is too large", got=show(value), do="write at most 2^63 - 1")
    if not known[name].takes(value):
        raise ConfigError(f"{key} is not what DeepSpeed takes", got=show(value), do=f"write {known[name].words()}")
