"""Hugging Face's Trainer with the objective of seqaware, by `compute_loss_func`.

    python examples/hf_trainer.py --model gpt2 --rows rows.jsonl --gamma 0.98
    torchrun --nproc-per-node 8 examples/hf_trainer.py --model gpt2 --rows rows.jsonl --accumulation 4 --packed

rows.jsonl holds one {"question": …, "answer": …} a line. An optimizer step takes --batch of them, over all ranks and
micro-batches. TRL's SFTTrainer takes the same compute_loss_func.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    DataCollatorWithFlattening,
    Trainer,
    TrainingArguments,
)

from seqaware import TrainerLoss, Weighting


def main() -> None:
    asked = arguments()
    ranks = int(os.environ.get("WORLD_SIZE", 1))
    tokenizer = AutoTokenizer.from_pretrained(asked.model)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    model = AutoModelForCausalLM.from_pretrained(asked.model, dtype=getattr(torch, asked.dtype))
    args = TrainingArguments(
        output_dir=str(asked.out),
        per_device_train_batch_size=asked.batch // (ranks * asked.accumulation),
        gradient_accumulation_steps=asked.accumulation,
        max_steps=asked.steps,
        learning_rate=asked.rate,
        lr_scheduler_type="constant",
        weight_decay=0.01,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=not torch.cuda.is_available(),
    )
    # Several documents flattened into one row, told apart by their positions; or one to a row, padded.
    collate = DataCollatorWithFlattening() if asked.packed else DataCollatorForSeq2Seq(tokenizer)
    trainer = Trainer(
        model=model,
        args=args,
        train_dataset=Dataset.from_list(read_documents(asked.rows, tokenizer)),
        data_collator=collate,
        compute_loss_func=TrainerLoss(model, args, weighting=Weighting(gamma=asked.gamma)),
    )
    trainer.train()
    if trainer.is_world_process_zero():
        steps = [
            {key: line[key] for key in ("loss", "grad_norm")} for line in trainer.state.log_history if "loss" in line
        ]
        model.save_pretrained(asked.out)
        (asked.out / "history.json").write_text(json.dumps(steps))


def read_documents(rows: Path, tokenizer: Any) -> list[dict[str, list[int]]]:
    """Prompt and answer, tokenised apart; the answer and the end carry loss."""
    documents = []
    for line in rows.read_text().splitlines():
        row = json.loads(line)
        prompt = tokenizer.encode(f"Q: {row['question']} A:")
        answer = [*tokenizer.encode(f" {row['answer']}", add_special_tokens=False), tokenizer.eos_token_id]
        documents.append({"input_ids": prompt + answer, "labels": [-100] * len(prompt) + answer})
    return documents


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--rows", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("runs/hf-trainer"))
    parser.add_argument("--gamma", type=float, default=0.98)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--accumulation", type=int, default=1)
    parser.add_argument("--rate", type=float, default=2e-5)
    parser.add_argument("--packed", action="store_true")
    parser.add_argument("--dtype", default="float32")
    return parser.parse_args()


if __name__ == "__main__":
    main()
