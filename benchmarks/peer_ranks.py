"""What every rank of benchmarks/peers.py runs: the same documents and the same small Llama, trained by us and by peers.

All run after each other in the same processes, on the same rows, under the same ZeRO stage, with torch's AdamW. Counted
are the tokens of documents, this process's CPU seconds (all threads), the wall, and how far memory rose.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
import torch.nn.functional as F
from accelerate import PartialState
from accelerate.state import AcceleratorState
from datasets import Dataset
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from seqaware.config.loading import load_config
from seqaware.data.batch_loader import StepBatches
from seqaware.distributed.process_group import connect, disconnect, find_address, prepare_environment
from seqaware.models.layers import torchs_linear
from seqaware.objective.weighting import Weighting
from seqaware.training.assembly import build_engine, row_format, world_of
from seqaware.training.prepare import Prepared, prepare

WARM, MEASURED = 2, 3
GAMMA = 0.98


class Meter:
    """Figures of the steps after the warm-up."""

    def __init__(self) -> None:
        gc.collect()
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark begins anew
        self._before = _status("VmRSS")
        self.tokens = 0  # of documents that this rank saw, where the peer chooses them itself
        self.marks: list[tuple[float, float]] = []

    def mark(self) -> None:
        """Between two steps."""
        dist.barrier()
        self.marks.append((time.perf_counter(), time.process_time()))

    def figures(self) -> dict[str, float]:
        pairs = list(zip(self.marks[WARM:], self.marks[WARM + 1 :], strict=False))
        cpu = torch.tensor([b[1] - a[1] for a, b in pairs], dtype=torch.float64)
        dist.all_reduce(cpu)
        risen = torch.tensor(float(_status("VmHWM") - self._before), dtype=torch.float64)
        dist.all_reduce(risen, op=dist.ReduceOp.MAX)
        seconds = torch.tensor([b[0] - a[0] for a, b in pairs], dtype=torch.float64)
        return {
            "cpu_seconds_per_step": round(float(cpu.median()), 3),
            "seconds_per_step": round(float(seconds.median()), 3),
            "peak_mib_above_start": round(float(risen) / 1024),
            "steps_measured": len(pairs),
        }


def _status(name: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name + ":"))
    return int(line.split()[1])


class Work:
    """The run, its documents by step, and DeepSpeed's settings."""

    def __init__(self, prepared: Prepared, asked: argparse.Namespace) -> None:
        self.prepared = prepared
        self.asked = asked
        store, order = prepared.store, prepared.order
        self.documents: list[list[tuple[list[int], list[int]]]] = []
        for step in range(1, WARM + MEASURED + 1):
            rows = [store.document(int(index)) for index in order.documents(*order.position(step))]
            self.documents.append([(each.tokens.tolist(), _labels(each)) for each in rows])

    def model(self) -> Any:
        """The peers' model: what a person loads."""
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_pretrained(self.asked.model, dtype=torch.float32, attn_implementation="sdpa")

    def zero(self) -> dict[str, Any]:
        return {"stage": self.asked.stage}


def _labels(document: Any) -> list[int]:
    pairs = zip(document.tokens.tolist(), document.supervised.tolist(), strict=True)
    return [token if carries else -100 for token, carries in pairs]


def ours(work: Work, meter: Meter, *, compiled: bool = False) -> None:
    prepared = prepared_for(work.asked, work.asked.stage, "model.compile=true") if compiled else work.prepared
    engine, batches = _engine(work, prepared)
    meter.mark()
    for coming in batches.steps(1, WARM + MEASURED):
        engine.train_step(coming.micro_batches, learning_rate=1e-4)
        meter.mark()


def bare(work: Work, meter: Meter) -> None:
    """Our micro-batches, attention and loss with nothing round them: forward, backward, all-reduce, clip, AdamW."""
    engine, batches = _engine(work, prepared_for(work.asked, 0))
    model = engine.wrapped
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    engine.deepspeed = model
    made = [batches.of_step(step) for step in range(1, WARM + MEASURED + 1)]
    meter.mark()
    for step in made:
        with torchs_linear():
            for batch in step:
                loss, _ = engine._forward(batch, engine.weights(batch))
                (loss / 1000.0).backward()
        flat = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
        dist.all_reduce(flat)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        meter.mark()


def _engine(work: Work, prepared: Prepared) -> tuple[Any, StepBatches]:
    ranks = work.asked.ranks
    engine = build_engine(prepared, work.asked.model, ranks=ranks, say=lambda text: None)
    rows = row_format(prepared.plan, prepared)
    return engine, StepBatches(prepared.store, prepared.order, rows=rows, rank=ranks.rank, size=ranks.size)


def loop_padded(work: Work, meter: Meter) -> None:
    """The loop most people write: DeepSpeed, padding to the longest, weights times the cross-entropy of all logits."""
    per_rank = work.asked.docs // work.asked.ranks.size
    micro = min(work.asked.micro, per_rank)
    model = work.model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    settings = {
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": per_rank // micro,
        "zero_optimization": work.zero(),
        "gradient_clipping": 1.0,
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 10**9,
    }
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)
    meter.mark()
    for documents in work.documents:
        mine = documents[work.asked.ranks.rank :: work.asked.ranks.size]
        for first in range(0, per_rank, micro):
            batch = _padded(mine[first : first + micro])
            logits = engine(**{k: batch[k] for k in ("input_ids", "attention_mask")}, use_cache=False).logits
            engine.backward(_weighted(logits, batch["labels"]))
            engine.step()
        meter.mark()


def _padded(rows: list[tuple[list[int], list[int]]]) -> dict[str, torch.Tensor]:
    longest = max(len(tokens) for tokens, _ in rows)
    return {
        "input_ids": torch.tensor([tokens + [0] * (longest - len(tokens)) for tokens, _ in rows]),
        "labels": torch.tensor([labels + [-100] * (longest - len(labels)) for _, labels in rows]),
        "attention_mask": torch.tensor([[1] * len(tokens) + [0] * (longest - len(tokens)) for tokens, _ in rows]),
    }


def _weighted(logits: torch.Tensor, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
    """Every row one document: k counts its labels."""
    targets = labels[:, 1:]
    carries = targets != -100
    k = carries.cumsum(1).double()
    weights = ((1 - GAMMA**k) / (1 - GAMMA) * carries).float()
    each = F.cross_entropy(logits[:, :-1].flatten(0, 1), targets.flatten(), reduction="none", ignore_index=-100)
    return (each * weights.flatten()).sum() / (num_items_in_batch or carries.sum())


class _Marks(TrainerCallback):
    def __init__(self, meter: Meter) -> None:
        self._meter = meter

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self._meter.mark()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self._meter.mark()


def trainer_padded(work: Work, meter: Meter) -> None:
    """Hugging Face's Trainer, padding to the longest of a micro-batch, its own loss."""
    settings = _arguments(work, rows=work.asked.micro)
    rows = Dataset.from_list(_rows(work))
    collate = lambda rows: _padded([(row["input_ids"], row["labels"]) for row in rows])  # noqa: E731
    _train(Trainer(work.model(), TrainingArguments(**settings), train_dataset=rows, data_collator=collate), meter)


def trl(work: Work, meter: Meter, *, packing: bool, weighted: bool = False) -> None:
    from trl import SFTConfig, SFTTrainer

    settings = _arguments(work, rows=1 if packing else work.asked.micro)
    config = SFTConfig(**settings, packing=packing, max_length=work.asked.capacity, dataset_num_proc=1)
    weigh = (lambda outputs, labels, num_items_in_batch=None: _weighted(outputs.logits, labels)) if weighted else None
    trainer = SFTTrainer(
        work.model(),
        config,
        train_dataset=Dataset.from_list(_rows(work)),
        processing_class=work.prepared.tokenizer,
        compute_loss_func=weigh,
    )
    _train(trainer, meter)


def _rows(work: Work) -> list[dict[str, list[int]]]:
    # Three times over, so that packed rows do not run out before the last step.
    return [{"input_ids": t, "labels": labels} for step in work.documents * 3 for t, labels in step]


def _arguments(work: Work, *, rows: int) -> dict[str, Any]:
    size = work.asked.ranks.size
    passes = work.asked.docs // size // rows
    if rows == 1:
        tokens = sum(len(tokens) for tokens, _ in work.documents[-1])
        passes = -(-tokens // (work.asked.capacity * size))
    AcceleratorState._reset_state()
    return {
        "output_dir": str(work.asked.folder / "peer"),
        "per_device_train_batch_size": rows,
        "gradient_accumulation_steps": max(1, passes),
        "max_steps": WARM + MEASURED,
        "learning_rate": 1e-4,
        "logging_strategy": "no",
        "save_strategy": "no",
        "report_to": [],
        "bf16": False,
        "gradient_checkpointing": False,
        "disable_tqdm": True,
        "optim": "adamw_torch",
        "dataloader_pin_memory": False,
        "remove_unused_columns": False,
        "accelerator_config": {"use_configured_state": True},
        "deepspeed": {
            "train_micro_batch_size_per_gpu": "auto",
            "gradient_accumulation_steps": "auto",
            "gradient_clipping": 1.0,
            "zero_optimization": work.zero(),
            "zero_allow_untested_optimizer": True,
        },
    }


def _train(trainer: Any, meter: Meter) -> None:
    seen = [0]
    inner = trainer.training_step

    def counted(model: Any, inputs: dict[str, Any], *rest: Any, **named: Any) -> Any:
        # What really ran, and how much of it was documents.
        assert isinstance(trainer.model_wrapped, deepspeed.DeepSpeedEngine), "DeepSpeed was silently replaced"
        ids, mask = inputs["input_ids"], inputs.get("attention_mask")
        if len(meter.marks) > WARM:
            seen[0] += int(ids.numel() if mask is None else mask.sum())
        return inner(model, inputs, *rest, **named)

    trainer.training_step = counted
    trainer.add_callback(_Marks(meter))
    trainer.train()
    # transformers goes on making every model for ZeRO-3, also for those who come next.
    unset_hf_deepspeed_config()
    meter.tokens = seen[0]


KINDS: dict[str, Callable[[Work, Meter], None]] = {
    "seqaware": ours,
    "seqaware, compiled": lambda work, meter: ours(work, meter, compiled=True),
    "bare forward, backward, AdamW": bare,
    "minimal DeepSpeed loop, padded, weighted": loop_padded,
    "Trainer, padded": trainer_padded,
    "TRL, packing": lambda work, meter: trl(work, meter, packing=True),
    "TRL, no packing": lambda work, meter: trl(work, meter, packing=False),
    "TRL, weighted compute_loss_func": lambda work, meter: trl(work, meter, packing=False, weighted=True),
}


def prepared_for(asked: argparse.Namespace, stage: int, *overrides: str) -> Prepared:
    path = Path(__file__).parent.parent / "ds_configs" / f"zero{stage}.json"
    config = load_config(asked.config, list(overrides))
    return prepare(config, world=world_of(find_address()), deepspeed_path=path, progress=None)


def main() -> None:
    parser = argparse.ArgumentParser()
    for name, kind in (("config", Path), ("model", str), ("folder", Path), ("out", Path)):
        parser.add_argument(f"--{name}", type=kind, required=True)
    for name in ("stage", "turn", "docs", "micro", "capacity"):
        parser.add_argument(f"--{name}", type=int, required=True)
    parser.add_argument("--only", nargs="*", default=list(KINDS))
    asked = parser.parse_args()
    prepare_environment()
    os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
    prepared = prepared_for(asked, asked.stage)
    asked.ranks = connect(find_address())
    PartialState(backend="gloo")
    work = Work(prepared, asked)
    tokens = sum(len(tokens) for step in work.documents[WARM:] for tokens, _ in step) / MEASURED
    assert Weighting(gamma=GAMMA).gamma == prepared.plan.config.training.sft.gamma
    results = {}
    for name in reversed(asked.only) if asked.turn % 2 else asked.only:
        meter = Meter()
        KINDS[name](work, meter)
        figures = meter.figures()
        mine = torch.tensor(float(meter.tokens), dtype=torch.float64)
        dist.all_reduce(mine)
        per_step = float(mine) / MEASURED or tokens
        figures["document_tokens_per_step"] = round(per_step)
        figures["tokens_per_cpu_second"] = round(per_step / figures["cpu_seconds_per_step"], 1)
        figures["tokens_per_second"] = round(per_step / figures["seconds_per_step"], 1)
        results[name] = figures
        if asked.ranks.is_first:
            print(name, json.dumps(figures), flush=True)
            asked.out.write_text(json.dumps(results))
    disconnect()


if __name__ == "__main__":
    main()
