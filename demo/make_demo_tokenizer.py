"""Train the demo's tokenizer: a byte-level BPE of at most 460 entries on the demo's own training rows.

A small vocabulary that fits the text gives short sequences, which is why a model of under a million parameters learns
the task in about a minute. Byte level means that any other text can be written with it as well, only at greater length.
"""

import argparse
import json
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

VOCABULARY = 460
EOS, PAD = "<|end|>", "<|pad|>"
# The texts are tokenised as the trainer will see them: the prompt's frame must be in the vocabulary too.
FRAME = "Question: {question}\nAnswer: {answer}"


def train_tokenizer(rows_file: Path) -> PreTrainedTokenizerFast:
    """Train on every row of `rows_file` (jsonl with question and answer). The result depends on the rows alone."""
    rows = [json.loads(line) for line in rows_file.read_text(encoding="utf-8").splitlines()]
    tokenizer = Tokenizer(models.BPE())
    # Digits one by one would make 12 two tokens; whole numbers (at most 27 here) keep an equation at one token a term.
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[PAD, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((FRAME.format(**row) for row in rows), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=EOS,
        pad_token=PAD,
        model_max_length=256,
        clean_up_tokenization_spaces=False,
    )


def main() -> None:
    here = Path(__file__).parent
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rows", type=Path, default=here / "train.jsonl", help="jsonl with question and answer")
    parser.add_argument("--out", type=Path, default=here / "tokenizer", help="folder to write")
    arguments = parser.parse_args()
    train_tokenizer(arguments.rows).save_pretrained(str(arguments.out))


if __name__ == "__main__":
    main()
