"""A training loop of one's own: seqaware packs the documents, weighs their tokens and computes the loss.

    python examples/plain_loop.py --model gpt2 --rows rows.jsonl --gamma 0.98 --micro-batch-tokens 4096

rows.jsonl holds one {"question": …, "answer": …} a line. Every step takes all rows, laid out in as many micro-batches
as the tokens ask for; the loss is divided by the labels of the whole step, so their number does not matter.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from seqaware import StepSums, Weighting, fused_cross_entropy, layout_step, output_head, targets_of

Document = tuple[list[int], list[int]]  # token ids, and labels: -100 where there is no loss


def main() -> None:
    asked = arguments()
    dtype = getattr(torch, asked.dtype)
    model = AutoModelForCausalLM.from_pretrained(asked.model, dtype=dtype, attn_implementation="sdpa")
    documents = read_documents(asked.rows, AutoTokenizer.from_pretrained(asked.model))
    optimizer = torch.optim.AdamW(model.parameters(), lr=asked.rate, weight_decay=0.0)
    weighting = Weighting(gamma=asked.gamma)
    model.train()
    history = []
    for step in range(1, asked.steps + 1):
        sums = accumulate(model, micro_batches(documents, asked.micro_batch_tokens), weighting)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        history.append({"loss": sums["loss"], "unweighted_loss": sums["unweighted_loss"], "grad_norm": float(norm)})
        print(f"step {step}  loss {sums['loss']:.4f}  unweighted {sums['unweighted_loss']:.4f}")
    if asked.out:
        model.save_pretrained(asked.out)
        (asked.out / "history.json").write_text(json.dumps(history))


def accumulate(model: Any, batches: list[dict[str, torch.Tensor]], weighting: Weighting) -> dict[str, float]:
    """Add the gradient of a step's loss to the parameters: Σ w·l / labels of the step, micro-batch by micro-batch."""
    targets = [targets_of(batch["labels"], position_ids=batch["position_ids"]) for batch in batches]
    denominator = sum(int((each.labels != -100).sum()) for each in targets)
    sums = StepSums.zeros()
    for batch, each in zip(batches, targets, strict=True):
        # No attention_mask and no cache: so transformers keeps the documents of a row apart, by their positions.
        hidden = model.base_model(batch["input_ids"], position_ids=batch["position_ids"], use_cache=False)[0]
        loss_sum, stats = fused_cross_entropy(
            hidden.flatten(0, 1),
            head=output_head(model),
            labels_N=each.labels.flatten(),
            weights_N=weighting.weights(each.k, each.length, each.sequence_offsets).flatten(),
        )
        (loss_sum / denominator).backward()
        sums += StepSums.of(stats, sequences=0, tokens=each.labels.numel())
    return sums.metrics("tokens")


def micro_batches(documents: list[Document], capacity: int) -> list[dict[str, torch.Tensor]]:
    """All documents in rows of at most so many tokens, best-fit decreasing; one row to a micro-batch."""
    lengths = np.array([len(tokens) for tokens, _ in documents])
    layout = layout_step(np.arange(len(documents)), lengths, capacity=capacity, ranks=1, packed=True)
    return [row_of([documents[index] for index in each.rows[0]]) for each in layout.micro_batches(0)]


def row_of(documents: list[Document]) -> dict[str, torch.Tensor]:
    return {
        "input_ids": torch.tensor([[token for tokens, _ in documents for token in tokens]]),
        "labels": torch.tensor([[label for _, labels in documents for label in labels]]),
        "position_ids": torch.tensor([[place for tokens, _ in documents for place in range(len(tokens))]]),
    }


def read_documents(rows: Path, tokenizer: Any) -> list[Document]:
    """Prompt and answer, tokenised apart; the answer and the end carry loss."""
    documents = []
    for line in rows.read_text().splitlines():
        row = json.loads(line)
        prompt = tokenizer.encode(f"Q: {row['question']} A:")
        answer = [*tokenizer.encode(f" {row['answer']}", add_special_tokens=False), tokenizer.eos_token_id]
        documents.append((prompt + answer, [-100] * len(prompt) + answer))
    return documents


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--rows", type=Path, required=True)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--gamma", type=float, default=0.98)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--rate", type=float, default=2e-5)
    parser.add_argument("--micro-batch-tokens", type=int, default=4096)
    parser.add_argument("--dtype", default="float32")
    return parser.parse_args()


if __name__ == "__main__":
    main()
