"""Start-up probes on the real model: packed documents must not attend to each other, and our head must be the model's.

Some attention paths leak between packed documents without a word, some only in rows or documents beyond a length, and
some models do more between hidden state and logits than the conventions say. All of it is found in five forwards on
every start: three of a few dozen tokens, and two of a row with a document as long as the run's longest.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import accumulate

import torch
from torch import Tensor

from seqaware.distributed.process_group import SequenceGroup
from seqaware.errors import ConfigError
from seqaware.models.attention import Documents
from seqaware.models.model import ModelInput, WeightedCausalLM, output_head

_BEFORE, _MIDDLE, _AFTER = 7, 12, 5
# Two forwards of so many tokens on each rank take less time than training one micro-batch of as many.
_MOST_TOKENS = 8192


@dataclass(frozen=True)
class IsolationProbe:
    """What the probes need to know of the run.

    Attributes:
        packed: whether rows hold several documents; a run that packs nothing is probed on a document alone.
        longest, capacity: tokens of the longest document of the run, and of a micro-batch.
        sequence: the ranks that share each row, where several do: the probes go the way of the run's batches.
    """

    backend: str
    vocabulary: int
    device: torch.device
    packed: bool
    longest: int
    capacity: int
    sequence: SequenceGroup | None = None

    @property
    def long_row(self) -> tuple[int, ...]:
        """Documents of a row as long as rows of the run, the longest between two short ones; () where short rows do."""
        ranks = 1 if self.sequence is None else self.sequence.size
        room = min(self.capacity, _MOST_TOKENS * ranks)
        longest = min(self.longest, room - (_BEFORE + _AFTER) * self.packed)
        return _around(longest, packed=self.packed) if longest > _MIDDLE else ()


@dataclass(frozen=True)
class IsolationReport:
    """Largest changes of a token's output seen, as shares of it.

    leak: of tokens that should not see those that are perturbed. packed: between a document alone and in the row.
    response: the smallest of the perturbed tokens themselves (shows that the probe can see a change at all).
    tolerance, packed_tolerance: what rounding may do to the first, and to the second. tokens: of the longest document.
    """

    leak: float
    packed: float
    response: float
    tolerance: float
    packed_tolerance: float
    tokens: int


def probe_isolation(model: WeightedCausalLM, probe: IsolationProbe) -> IsolationReport:
    """Look whether documents of a row are apart, as `measure_isolation`, and refuse a model in which they are not.

    Raises:
        ConfigError: documents leak into each other, or tokens into their own past.
    """
    report = measure_isolation(model, probe)
    if report.leak > report.tolerance or report.packed > report.packed_tolerance:
        what = "packed documents attend to each other" if probe.packed else "tokens attend to what comes after them"
        remedy = "packing.enabled: false" if probe.sequence is None else "packing.enabled: false, parallel.sequence: 1"
        raise ConfigError(
            f"{what} in this model",
            got=(
                f"relative changes of {report.leak:.1e} and {report.packed:.1e}, "
                f"rounding explains {report.tolerance:.1e} and {report.packed_tolerance:.1e}"
            ),
            do=f"write {remedy} if the model mixes tokens outside attention",
        )
    return report


@torch.no_grad()
def measure_isolation(model: WeightedCausalLM, probe: IsolationProbe) -> IsolationReport:
    """Perturb the ends of all documents of a row and watch every other token; compare a packed document with itself.

    Twice: the logits of a short row, and the last hidden states of a long one, whose logits might not fit.
    Collective under ZeRO-3: every rank must call it.
    """
    was_training = model.training
    model.eval()
    short = _around(_MIDDLE, packed=probe.packed)
    ids = _probe_ids(sum(short), probe.vocabulary, probe.device)
    leak, response = _disturbed(model.logits, short, probe)
    first = _BEFORE * probe.packed
    middle = slice(first, first + _MIDDLE)
    packed = _output(model.logits, ids, short, probe)[middle]
    # Whole on every rank: a model that mixes tokens outside attention is another one where ranks share the row.
    alone = _output(model.logits, ids[middle], (_MIDDLE,), replace(probe, sequence=None))
    if probe.long_row:
        of_long, response_of_long = _disturbed(model.hidden, probe.long_row, probe)
        leak, response = max(leak, of_long), min(response, response_of_long)
    model.train(was_training)

    eps = torch.finfo(next(model.parameters()).dtype).eps
    # What nobody touched is computed by the same kernels on the same numbers: equal, but for kernels that add in the
    # order in which threads arrive. A row of another length may take another GEMM kernel, and every layer rounds anew.
    return IsolationReport(
        leak=leak,
        packed=float(_change(alone, packed).max()),
        response=response,
        tolerance=4 * eps,
        packed_tolerance=64 * eps,
        tokens=max(probe.long_row, default=_MIDDLE),
    )


def _around(longest: int, *, packed: bool) -> tuple[int, ...]:
    return (_BEFORE, longest, _AFTER) if packed else (longest,)


def _disturbed(
    of: Callable[[ModelInput], Tensor], lengths: tuple[int, ...], probe: IsolationProbe
) -> tuple[float, float]:
    """The largest change of any token but the last of each document when these are others; the least change of these.

    The last token of a document has nothing after it that may see it: neither its own past nor another document.
    """
    ids = _probe_ids(sum(lengths), probe.vocabulary, probe.device)
    ends = torch.tensor([end - 1 for end in accumulate(lengths)], device=ids.device)
    other = ids.clone()
    other[ends] = (other[ends] + 1) % probe.vocabulary
    change = _change(_output(of, other, lengths, probe), _output(of, ids, lengths, probe))
    untouched = torch.ones_like(change, dtype=torch.bool)
    untouched[ends] = False
    return float(change[untouched].max()), float(change[ends].min())


def _change(output: Tensor, reference: Tensor) -> Tensor:
    """How far each token's output [T, …] is from a reference, as a share of the reference's norm."""
    size = reference.norm(dim=-1).clamp_min(torch.finfo(torch.float32).tiny)
    change: Tensor = (output - reference).norm(dim=-1) / size
    return change


def probe_head(model: WeightedCausalLM, probe: IsolationProbe) -> float:
    """Compare heads, as `measure_head`, and refuse a model whose head is not ours; returns the difference.

    Raises:
        ConfigError: the model does something to its logits that the fused loss does not know.
    """
    difference, tolerance = measure_head(model, probe)
    if difference > tolerance:
        raise ConfigError(
            "this model does more to its logits than the fused loss knows",
            got=f"a relative difference of {difference:.1e}, rounding explains {tolerance:.1e}",
            do="write model.loss_kernel: plain",
        )
    return difference


@torch.no_grad()
def measure_head(model: WeightedCausalLM, probe: IsolationProbe) -> tuple[float, float]:
    """The largest relative difference between the fused loss's logits and the model's own, and what rounding explains.

    Collective under ZeRO-3: every rank must call it.
    """
    was_training = model.training
    model.eval()
    inputs = _inputs(_probe_ids(_MIDDLE, probe.vocabulary, probe.device), (_MIDDLE,), probe)
    own = model.logits(inputs).float().squeeze(0)
    hidden = model.hidden(inputs).squeeze(0)
    with gathered_head(model):
        head = output_head(model.model)
        ours = hidden.to(head.weight.dtype) @ head.weight.T
        ours = ours if head.bias is None else ours + head.bias
        ours = ours.float() * head.scale
        ours = ours if head.softcap is None else torch.tanh(ours / head.softcap) * head.softcap
    model.train(was_training)
    size = own.abs().max().clamp_min(torch.finfo(torch.float32).tiny)
    difference = float((own - ours).abs().max() / size)
    return difference, 64 * torch.finfo(next(model.parameters()).dtype).eps


def gathered_head(model: WeightedCausalLM) -> torch.autograd.grad_mode.no_grad:
    """A context in which the output head is whole, also under ZeRO-3."""
    import deepspeed

    head = model.model.get_output_embeddings()
    context: torch.autograd.grad_mode.no_grad = deepspeed.zero.GatheredParameters(list(head.parameters()))
    return context


def _probe_ids(count: int, vocabulary: int, device: torch.device) -> Tensor:
    # Fixed and spread over the vocabulary: the same on every rank, without a generator.
    return (torch.arange(1, count + 1, device=device) * 7919) % vocabulary


def _inputs(ids: Tensor, lengths: tuple[int, ...], probe: IsolationProbe) -> ModelInput:
    """A row of documents; where ranks share it, this rank's columns of the row, padded to a multiple of them."""
    padding = -len(ids) % (probe.sequence.size if probe.sequence else 1)
    segments = (*lengths, padding) if padding else lengths
    borders = torch.tensor([0, *torch.tensor(segments).cumsum(0).tolist()], dtype=torch.int32, device=ids.device)
    positions = torch.cat([torch.arange(length, device=ids.device) for length in segments]).unsqueeze(0)
    row = torch.cat([ids, ids.new_zeros(padding)]).unsqueeze(0)
    if probe.sequence is not None:
        row, positions = probe.sequence.columns(row), probe.sequence.columns(positions)
    return ModelInput(row, positions, Documents(borders, segments, probe.backend, probe.sequence))


def _output(of: Callable[[ModelInput], Tensor], ids: Tensor, lengths: tuple[int, ...], probe: IsolationProbe) -> Tensor:
    """Float32 [T, …]: what the model makes of every token of a row."""
    part = of(_inputs(ids, lengths, probe)).float()
    whole = part if probe.sequence is None else probe.sequence.join(part)
    return whole.squeeze(0)[: len(ids)]
