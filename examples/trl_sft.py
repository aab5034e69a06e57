"""TRL's SFTTrainer with the objective of seqaware; needs `pip install trl`.

    python examples/trl_sft.py --model gpt2 --rows rows.jsonl --gamma 0.98 --packed
    torchrun --nproc-per-node 8 examples/trl_sft.py --model gpt2 --rows rows.jsonl --accumulation 4

rows.jsonl holds one {"question": …, "answer": …} a line. TRL tokenises them, prompt and completion, and packs the rows.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

from seqaware import TrainerLoss, Weighting


def main() -> None:
    asked = arguments()
    tokenizer = AutoTokenizer.from_pretrained(asked.model)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    model = AutoModelForCausalLM.from_pretrained(asked.model, dtype=getattr(torch, asked.dtype))
    args = SFTConfig(
        output_dir=str(asked.out),
        per_device_train_batch_size=asked.rows_at_once,
        gradient_accumulation_steps=asked.accumulation,
        max_steps=asked.steps,
        learning_rate=asked.rate,
        lr_scheduler_type="constant",
        weight_decay=0.01,
        completion_only_loss=True,
        packing=asked.packed,
        max_length=asked.max_length,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        bf16=False,
        gradient_checkpointing=False,
        disable_tqdm=True,
        use_cpu=not torch.cuda.is_available(),
    )
    rows = [json.loads(line) for line in asked.rows.read_text().splitlines()]
    pairs = [{"prompt": f"Q: {row['question']} A:", "completion": f" {row['answer']}"} for row in rows]
    trainer = SFTTrainer(
        model=model,
        args=args,
        train_dataset=Dataset.from_list(pairs),
        processing_class=tokenizer,
        compute_loss_func=TrainerLoss(model, args, weighting=Weighting(gamma=asked.gamma)),
    )
    trainer.train()
    if trainer.is_world_process_zero():
        steps = [
            {key: line[key] for key in ("loss", "grad_norm")} for line in trainer.state.log_history if "loss" in line
        ]
        model.save_pretrained(asked.out)
        (asked.out / "history.json").write_text(json.dumps(steps))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--rows", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("runs/trl"))
    parser.add_argument("--gamma", type=float, default=0.98)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--rows-at-once", type=int, default=1, help="rows of a micro-batch, on each rank")
    parser.add_argument("--accumulation", type=int, default=1)
    parser.add_argument("--max-length", type=int, default=2048)
    parser.add_argument("--rate", type=float, default=2e-5)
    parser.add_argument("--packed", action="store_true")
    parser.add_argument("--dtype", default="float32")
    return parser.parse_args()


if __name__ == "__main__":
    main()
