"""Whether DeepSpeed's compiled operators are there, can be built, or cannot; nothing is built to find that out."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from seqaware.compat.operators import operators_of
from seqaware.plan.plan import Plan


@dataclass(frozen=True)
class OperatorState:
    """An operator that a run needs. built: it was compiled here before, so that it loads at once."""

    name: str
    asked_by: str
    built: bool
    can_be_built: bool


def extensions_folder(variable: str | None) -> Path:
    """Where torch keeps what it compiles. variable: TORCH_EXTENSIONS_DIR."""
    return Path(variable) if variable else Path("~/.cache/torch_extensions").expanduser()


def operator_states(plan: Plan, *, folder: Path) -> list[OperatorState]:
    """The operators of a plan. Imports DeepSpeed where there are any, which takes seconds.

    Args:
        folder: of what torch has compiled.
    """
    needed = operators_of(plan)
    if not needed:
        return []
    from deepspeed.accelerator import get_accelerator

    states = []
    for name, asked_by in needed.items():
        builder = get_accelerator().create_op_builder(name)
        built = builder is not None and any(folder.rglob(f"{builder.name}/*.so"))
        compatible = built or (builder is not None and bool(builder.is_compatible(verbose=False)))
        states.append(OperatorState(name.removesuffix("Builder"), asked_by, built, compatible))
    return states
