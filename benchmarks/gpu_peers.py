"""What others do with the same model and rows on one GPU, for gpu.py: a minimal DeepSpeed loop, and TRL's trainer.

Both get transformers' own attention and, of our data pipeline, at most the packed rows. Each is judged by tokens of
documents in a second, as we are.
"""

from __future__ import annotations

import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM

from benchmarks.gpu_training import WARM_UP, Found, Work, batches_of, make_rows, measured, peak_flops


def minimal_loop(work: Work, found: Found, *, attention: str = "sdpa") -> None:
    """deepspeed.initialize, transformers' attention with its mask for packed rows, weighted naive cross-entropy."""
    import deepspeed

    from seqaware.distributed.process_group import connect, find_address

    ranks = connect(find_address())
    settings = json.loads((Path(__file__).parent.parent / "ds_configs" / f"zero{work.stage}.json").read_text())
    settings |= {"train_micro_batch_size_per_gpu": 1, "bf16": {"enabled": True}, "gradient_clipping": 1.0}
    settings["gradient_accumulation_steps"] = work.step_tokens // work.rows[0]
    model = AutoModelForCausalLM.from_pretrained(work.model, dtype=torch.bfloat16, attn_implementation=attention)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=work.device == "cuda")
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)
    engine.train()

    def step(batches: list[Any]) -> None:
        for batch in (each.to(ranks.device) for each in batches):
            logits = engine(batch.input_ids, position_ids=batch.position_ids, use_cache=False).logits
            losses = F.cross_entropy(logits.flatten(0, 1).float(), batch.labels.flatten(), reduction="none")
            weights = (1.0 - 0.98 ** batch.k.flatten().float()) / 0.02
            engine.backward((losses * weights).sum() / batch.supervised_tokens)
            engine.step()

    for row in work.rows[:1]:
        until = time.monotonic() + work.seconds
        _, batches = batches_of(work, row)
        found(
            {
                "who": f"minimal DeepSpeed loop, {attention}",
                **measured(work, row, batches=batches, step=step, until=until),
            }
        )


def trl(work: Work, found: Found) -> None:
    """TRL's SFTTrainer with packing and DeepSpeed; its own loss, which weighs no token."""
    import accelerate
    import trl as trl_package
    from datasets import load_dataset

    on_gpu = work.device == "cuda"
    accelerate.PartialState(backend="nccl" if on_gpu else "gloo")
    row = work.rows[0]
    zero = json.loads((Path(__file__).parent.parent / "ds_configs" / f"zero{work.stage}.json").read_text())
    zero |= {
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "bf16": {"enabled": on_gpu},
    }
    arguments = trl_package.SFTConfig(
        output_dir=str(work.folder / "trl"),
        packing=True,
        max_length=row,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=work.step_tokens // row,
        max_steps=WARM_UP + 3,
        learning_rate=1e-5,
        bf16=on_gpu,
        gradient_checkpointing=False,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        deepspeed=zero,
        accelerator_config={"use_configured_state": True},
        model_init_kwargs={"dtype": "bfloat16" if on_gpu else "float32", "attn_implementation": "sdpa"},
    )
    rows = load_dataset("json", data_files=str(make_rows(work, row)), split="train")
    clock = _clock()
    trainer = trl_package.SFTTrainer(model=str(work.model), args=arguments, train_dataset=rows, callbacks=[clock])
    trainer.train()
    assert type(trainer.model_wrapped).__name__ == "DeepSpeedEngine", type(trainer.model_wrapped)
    spent = clock.seconds[WARM_UP:]
    seconds = statistics.median(spent)
    packed: Any = trainer.train_dataset
    lengths = _packed_lengths(packed)
    tokens = work.step_tokens * sum(lengths) / (row * len(packed))
    scale = tokens / sum(lengths)
    found(
        {
            "who": "TRL SFTTrainer, DeepSpeed, packing, sdpa; its unweighted loss",
            "row": row,
            "steps": len(spent),
            "step_seconds": seconds,
            "tokens_per_second": tokens / seconds,
            "mfu": work.shape.operations(work.layers, lengths) * scale / seconds / peak_flops(work.device),
            "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if work.device == "cuda" else None,
        }
    )


def _packed_lengths(rows: Any) -> list[int]:
    return [length for row in rows["seq_lengths"] for length in row]


def _clock() -> Any:
    from transformers import TrainerCallback

    class Clock(TrainerCallback):
        """Seconds of each optimizer step."""

        def __init__(self) -> None:
            self.seconds: list[float] = []

        def on_step_begin(self, *given: Any, **named: Any) -> None:
            self._start = self._now()

        def on_step_end(self, args: Any, state: Any, control: Any, **named: Any) -> None:
            self.seconds.append(self._now() - self._start)

        @staticmethod
        def _now() -> float:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            return time.perf_counter()

    return Clock()
