"""Write the rows of the demo: small stories of adding and taking away, in GSM8K's schema.

Every row is {"question", "answer"}. The answer works the problem out one line a step, each with a calculator note
<<a+b=c>>, and ends in the line '#### N'. No question occurs twice, in the training rows and the held-out rows together,
so exact match on the held-out rows measures arithmetic that was learnt and not lines that were remembered.

The files are a function of the seed alone; a test makes them again and compares them byte by byte.
"""

import argparse
import json
import random
from dataclasses import dataclass
from pathlib import Path

SEED = 20
TRAIN_ROWS = 6400
HELDOUT_ROWS = 300
STEPS = 2
LARGEST_OPERAND = 9

PEOPLE = (
    "Ada",
    "Bo",
    "Carl",
    "Dina",
    "Emil",
    "Fay",
    "Gus",
    "Hana",
    "Ian",
    "June",
    "Kofi",
    "Lea",
    "Milo",
    "Nora",
    "Otto",
    "Pia",
)
THINGS = ("pears", "plums", "stones", "shirts", "keys", "lamps", "maps", "nuts", "pens", "cups", "kites", "beads")

OPENINGS = (
    "{who} owns {a} {things}.",
    "At first {who} has {a} {things}.",
    "In a bag of {who} lie {a} {things}.",
)
ADDITIONS = (
    "{who} picks up {b} more.",
    "Grandma brings {b} more.",
    "{b} new ones arrive.",
)
REMOVALS = (
    "{who} uses up {b}.",
    "A neighbour borrows {b}.",
    "{b} of them break.",
)
QUESTIONS = (
    "How many {things} are left?",
    "How many {things} is that now?",
)
WORKED = {
    "+": "Adding {b} gives {a}+{b}=<<{a}+{b}={c}>>{c} {things}.",
    "-": "Without {b} there are {a}-{b}=<<{a}-{b}={c}>>{c} {things}.",
}


@dataclass(frozen=True)
class Row:
    """One problem and its worked answer."""

    question: str
    answer: str

    def to_json(self) -> str:
        return json.dumps({"question": self.question, "answer": self.answer})


def make_row(draw: random.Random, *, steps: int = STEPS, largest: int = LARGEST_OPERAND) -> Row:
    """Draw one problem of `steps` operations; operands lie in 1..largest and no amount falls below zero."""
    who, things = draw.choice(PEOPLE), draw.choice(THINGS)
    amount = draw.randint(1, largest)
    story = [draw.choice(OPENINGS).format(who=who, a=amount, things=things)]
    worked = []
    for _ in range(steps):
        # Nothing can be taken away from nothing.
        operation = draw.choice("+-") if amount > 0 else "+"
        if operation == "+":
            operand = draw.randint(1, largest)
            result, sentence = amount + operand, draw.choice(ADDITIONS)
        else:
            operand = draw.randint(1, min(amount, largest))
            result, sentence = amount - operand, draw.choice(REMOVALS)
        story.append(sentence.format(who=who, b=operand))
        worked.append(WORKED[operation].format(a=amount, b=operand, c=result, things=things))
        amount = result
    story.append(draw.choice(QUESTIONS).format(things=things))
    return Row(question=" ".join(story), answer="\n".join(worked) + f"\n#### {amount}")


def make_rows(count: int, *, seed: int = SEED) -> list[Row]:
    """`count` rows with `count` different questions, in an order fixed by the seed."""
    draw = random.Random(seed)
    rows: dict[str, Row] = {}
    while len(rows) < count:
        row = make_row(draw)
        rows.setdefault(row.question, row)
    return list(rows.values())


def write_demo(
    folder: Path, *, train_rows: int = TRAIN_ROWS, heldout_rows: int = HELDOUT_ROWS, seed: int = SEED
) -> None:
    """Write train.jsonl and heldout.jsonl into `folder`."""
    rows = make_rows(train_rows + heldout_rows, seed=seed)
    folder.mkdir(parents=True, exist_ok=True)
    for name, part in (("train.jsonl", rows[:train_rows]), ("heldout.jsonl", rows[train_rows:])):
        (folder / name).write_text("".join(row.to_json() + "\n" for row in part), encoding="utf-8", newline="\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="folder to write into")
    write_demo(parser.parse_args().out)


if __name__ == "__main__":
    main()
