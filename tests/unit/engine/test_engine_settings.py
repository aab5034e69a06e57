"""What the engine hands to DeepSpeed beside the plan's own settings."""

from __future__ import annotations

import pytest
import torch

from seqaware.config.loading import REPOSITORY
from seqaware.engine.engine import _with_bucket_no_larger
from tests.unit.plan.test_plan import plan


@pytest.mark.parametrize(("hidden", "expected"), [(16, 16 * 16 + 16), (20_000, 200_000_000)])
def test_the_gradient_bucket_holds_the_trained_weights_and_no_more(hidden: int, expected: int) -> None:
    with torch.device("meta"):
        model = torch.nn.Sequential(torch.nn.Linear(hidden, hidden), torch.nn.Linear(hidden, hidden))
    model[1].requires_grad_(False)
    made = plan(deepspeed_path=REPOSITORY / "ds_configs" / "zero2.json")
    settings = _with_bucket_no_larger(made, model)  # type: ignore[arg-type]
    assert settings == {**made.deepspeed["zero_optimization"], "reduce_bucket_size": expected}
