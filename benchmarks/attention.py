"""What does attention over packed short documents cost beside a 4-D mask over the whole row?

    python -m benchmarks.attention            a minute of one core; writes results/attention.json
    python -m benchmarks.attention --quick    small, seconds; judges nothing and writes nothing

A row of 8,192 tokens holds documents of some 190; forward and backward of causal attention inside each document, one
process, one thread on a CPU. Contestants take turns; a figure is the median of CPU seconds (on a GPU of the time
between two events). All outputs are compared with the first before anything is timed.

- per document   ours on a CPU: a loop over the documents
- varlen, flash  ours on a GPU, those that run there
- 4-D mask       scaled_dot_product_attention with a boolean mask, made beforehand: transformers' way with packed rows
- padded         every document padded to the longest, as a batch without packing has it
- flex           flex_attention, compiled, with a document mask (GPU only: it has no backward on a CPU)
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.machine import machine
from benchmarks.timing import seconds as seconds_between
from seqaware.config.packages import FLASH_MODULES
from seqaware.errors import ConfigError
from seqaware.models.attention import BACKENDS, AttentionCall, Documents
from seqaware.models.attention_choice import choose_backend

RESULTS = Path(__file__).parent / "results" / "attention.json"
LEAST_RATIO = 20.0


@dataclass(frozen=True)
class Size:
    tokens: int
    mean_length: int = 190
    heads: int = 8
    key_heads: int = 8
    head_dim: int = 64
    repeats: int = 5


FULL, QUICK = Size(8192), Size(1024, repeats=2)
ON_A_GPU = Size(16_384, heads=32, key_heads=8, head_dim=128)

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


class Problem:
    """Queries, keys and values of one packed row, and where its documents lie."""

    def __init__(self, size: Size, *, device: str = "cpu", dtype: torch.dtype = torch.float32) -> None:
        generator = torch.Generator().manual_seed(0)

        def normal(heads: int) -> Tensor:
            values = torch.randn(size.tokens, heads, size.head_dim, generator=generator)
            return values.to(device, dtype).requires_grad_()

        self.size = size
        self.leaves = (normal(size.heads), normal(size.key_heads), normal(size.key_heads))
        self.lengths = _lengths(size, generator)
        borders = torch.tensor([0, *self.lengths]).cumsum(0)
        self.documents = Documents(borders.to(device, torch.int32), self.lengths, "")
        self.document_of = torch.arange(len(self.lengths)).repeat_interleave(torch.tensor(self.lengths)).to(device)
        self.upstream = torch.randn(size.tokens, size.heads, size.head_dim, generator=generator).to(device, dtype)

    def ours(self, backend: str) -> Attend:
        call = AttentionCall(scale=self.size.head_dim**-0.5, dropout=0.0, window=None, softcap=None)
        return lambda q, k, v: BACKENDS[backend](q, k, v, self.documents, call)

    def mask_4d(self) -> Attend:
        place = torch.arange(self.size.tokens, device=self.document_of.device)
        visible = (self.document_of.unsqueeze(1) == self.document_of) & (place.unsqueeze(1) >= place)
        return partial(_sdpa, attn_mask=visible)

    def padded(self) -> Attend:
        longest = max(self.lengths)
        start = torch.tensor([0, *self.lengths[:-1]]).cumsum(0)
        place = torch.arange(self.size.tokens) - start.repeat_interleave(torch.tensor(self.lengths))
        rows, columns = self.document_of, place.to(self.document_of.device)

        def attend(*packed: Tensor) -> Tensor:
            batch = [x.new_zeros(len(self.lengths), longest, *x.shape[1:]) for x in packed]
            q, k, v = (b.index_put((rows, columns), x).transpose(1, 2) for b, x in zip(batch, packed, strict=True))
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])
            return out.transpose(1, 2)[rows, columns]

        return attend

    def flex(self) -> Attend:
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        if self.document_of.device.type == "cpu":
            raise RuntimeError("flex_attention has no backward on a CPU")
        owner, length = self.document_of, self.size.tokens
        mask = create_block_mask(
            lambda b, h, i, j: (owner[i] == owner[j]) & (i >= j), None, None, length, length, device=owner.device
        )
        compiled = torch.compile(flex_attention)

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (q, k, v))
            out: Tensor = compiled(q, k, v, block_mask=mask, enable_gqa=q.shape[1] != k.shape[1])
            return out.squeeze(0).transpose(0, 1)

        return attend

    def step(self, attend: Attend) -> Tensor:
        """Forward and backward; the output."""
        for leaf in self.leaves:
            leaf.grad = None
        output = attend(*self.leaves)
        torch.autograd.backward(output, self.upstream)
        return output.detach()

    def operations(self) -> float:
        """Of forward and backward: 2 products forward, 5 backward, each 2·A·D for half of L² pairs."""
        pairs = sum(length * (length + 1) / 2 for length in self.lengths)
        return 7 * 2 * self.size.heads * self.size.head_dim * pairs


def contestants(problem: Problem, device: str, dtype: torch.dtype) -> tuple[dict[str, Attend], dict[str, str]]:
    """Those that run here, and why the others do not."""
    running: dict[str, Attend] = {"per document": problem.ours("sdpa_per_document")}
    absent: dict[str, str] = {}
    for backend in ("varlen", *FLASH_MODULES):
        try:
            choose_backend(backend, device=device, dtype=dtype, head_dim=problem.size.head_dim)
            running[backend] = problem.ours(backend)
        except ConfigError as error:
            absent[backend] = str(error)
    running["4-D mask"] = problem.mask_4d()
    running["padded"] = problem.padded()
    try:
        running["flex"] = problem.flex()
    except (RuntimeError, TypeError, ImportError) as error:
        absent["flex"] = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
    return running, absent


def measure(size: Size, *, device: str, dtype: torch.dtype) -> dict[str, object]:
    """Seconds of forward and backward by contestant, and what kept the others away."""
    problem = Problem(size, device=device, dtype=dtype)
    running, absent = contestants(problem, device, dtype)
    reference = problem.step(running["per document"])
    for name, attend in list(running.items()):
        try:
            # Two roundings of the dtype on either side of outputs below 4: averages of normal numbers.
            difference = (problem.step(attend) - reference).abs().max().item()
            assert difference <= 16 * torch.finfo(dtype).eps, (name, difference)
        except (RuntimeError, AssertionError) as error:
            absent[name] = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
            del running[name]
    seconds: dict[str, list[float]] = {name: [] for name in running}
    for _ in range(size.repeats):
        for name, attend in running.items():
            seconds[name].append(_seconds(partial(problem.step, attend), device))
    medians = {name: statistics.median(each) for name, each in seconds.items()}
    lengths = {
        "documents": len(problem.lengths),
        "mean": statistics.mean(problem.lengths),
        "longest": max(problem.lengths),
    }
    figures: dict[str, object] = {"size": asdict(size), "lengths": lengths, "seconds": medians, "absent": absent}
    if device == "cuda":
        figures["teraflops"] = {name: problem.operations() / each / 1e12 for name, each in medians.items()}
    return figures


def _seconds(step: Callable[[], object], device: str) -> float:
    """CPU seconds, or on a GPU the time between two events."""
    if device != "cpu":
        return seconds_between(step, device)
    start = time.process_time()
    step()
    return time.process_time() - start


def _sdpa(q: Tensor, k: Tensor, v: Tensor, *, attn_mask: Tensor) -> Tensor:
    q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask, enable_gqa=q.shape[1] != k.shape[1])
    return out.squeeze(0).transpose(0, 1)


def _lengths(size: Size, generator: torch.Generator) -> tuple[int, ...]:
    """Between a third and five thirds of the mean, evenly; the last one ends with the row."""
    lengths: list[int] = []
    while (left := size.tokens - sum(lengths)) > 0:
        drawn = int(torch.randint(size.mean_length // 3, size.mean_length * 5 // 3, (1,), generator=generator))
        lengths.append(min(drawn, left))
    return tuple(lengths)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small sizes; judges nothing and writes nothing")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    figures = measure(QUICK if arguments.quick else FULL, device="cpu", dtype=torch.float32)
    seconds = figures["seconds"]
    assert isinstance(seconds, dict)
    for name, value in sorted(seconds.items(), key=lambda item: item[1]):
        print(f"{name:<20} {value:>9.3f} CPU s   {value / seconds['per document']:>7.1f} ×")
    if arguments.quick:
        return 0
    ratio = seconds["4-D mask"] / seconds["per document"]
    gate = {
        "name": "CPU s, 4-D mask / per document",
        "value": ratio,
        "least": LEAST_RATIO,
        "holds": ratio >= LEAST_RATIO,
    }
    print(json.dumps(gate))
    shown = {"machine": machine(), "threads": torch.get_num_threads(), **figures, "gates": [gate]}
    RESULTS.write_text(json.dumps(shown, indent=2) + "\n")
    return 0 if gate["holds"] else 1


if __name__ == "__main__":
    raise SystemExit(main())
