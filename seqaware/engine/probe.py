"""Start-up probes on the real model: documents of one row must not see each other, and our head must be the model's.

Some attention paths leak between packed documents without a word, and some models do more between hidden state and
logits than the conventions say. Both are found in two forwards of a few dozen tokens, on every start.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from seqaware.engine.attention import Documents
from seqaware.engine.model import ModelInput, WeightedCausalLM, output_head
from seqaware.engine.ranks import SequenceGroup
from seqaware.errors import ConfigError

_PACKED = (7, 12, 5)
_ALONE = (12,)


@dataclass(frozen=True)
class Probe:
    """What the probes need to know of the run.

    Attributes:
        packed: whether rows hold several documents; a run that packs nothing is probed on a document alone.
        sequence: the ranks that share each row, where several do: the probes go the way of the run's batches.
    """

    backend: str
    vocabulary: int
    device: torch.device
    packed: bool
    sequence: SequenceGroup | None = None


@dataclass(frozen=True)
class ProbeReport:
    """Largest changes of logits seen, relative to the largest logit.

    leak: of other documents when one is perturbed. packed: between a document alone and in the row.
    response: of the perturbed document itself (shows that the probe can see a change at all).
    tolerance, packed_tolerance: what rounding may do to the first, and to the second.
    """

    leak: float
    packed: float
    response: float
    tolerance: float
    packed_tolerance: float


def probe_isolation(model: WeightedCausalLM, probe: Probe) -> ProbeReport:
    """Look whether documents of a row are apart, as `measure_isolation`, and refuse a model in which they are not.

    Raises:
        ConfigError: documents leak into each other, or tokens into their own past.
    """
    report = measure_isolation(model, probe)
    if report.leak > report.tolerance or report.packed > report.packed_tolerance:
        what = "documents of one row see each other" if probe.packed else "tokens see what comes after them"
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
def measure_isolation(model: WeightedCausalLM, probe: Probe) -> ProbeReport:
    """Perturb one document of a row and watch the others; compare a packed document with itself alone.

    Collective under ZeRO-3: every rank must call it.
    """
    was_training = model.training
    model.eval()
    lengths = _PACKED if probe.packed else _ALONE
    vocabulary = probe.vocabulary
    ids = _probe_ids(sum(lengths), vocabulary, probe.device)
    first = lengths[0] if probe.packed else 0
    middle = slice(first, first + _ALONE[0])
    logits = _logits(model, ids, lengths, probe)
    perturbed = ids.clone()
    # The last token of the middle document: nothing else in the row may move, its own past included.
    perturbed[middle.stop - 1] = (perturbed[middle.stop - 1] + 1) % vocabulary
    moved = _logits(model, perturbed, lengths, probe)
    # Whole on every rank: a model that mixes tokens outside attention is another one where ranks share the row.
    alone = _logits(model, ids[middle], _ALONE, replace(probe, sequence=None))
    model.train(was_training)

    size = logits.abs().max().clamp_min(torch.finfo(torch.float32).tiny)
    change = (moved - logits).abs().amax(dim=-1) / size
    untouched = torch.ones_like(change, dtype=torch.bool)
    untouched[middle.stop - 1] = False
    eps = torch.finfo(next(model.parameters()).dtype).eps
    # What nobody touched is computed by the same kernels on the same numbers: equal, but for kernels that add in the
    # order in which threads arrive. A row of another length may take another GEMM kernel, and every layer rounds anew.
    return ProbeReport(
        leak=float(change[untouched].max()),
        packed=float((alone - logits[middle]).abs().max() / size),
        response=float(change[~untouched].max()),
        tolerance=4 * eps,
        packed_tolerance=64 * eps,
    )


def probe_head(model: WeightedCausalLM, probe: Probe) -> float:
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
def measure_head(model: WeightedCausalLM, probe: Probe) -> tuple[float, float]:
    """The largest relative difference between the fused loss's logits and the model's own, and what rounding explains.

    Collective under ZeRO-3: every rank must call it.
    """
    was_training = model.training
    model.eval()
    inputs = _inputs(_probe_ids(_ALONE[0], probe.vocabulary, probe.device), _ALONE, probe)
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


def _inputs(ids: Tensor, lengths: tuple[int, ...], probe: Probe) -> ModelInput:
    """A row of documents; where ranks share it, this rank's columns of the row, padded to a multiple of them."""
    padding = -len(ids) % (probe.sequence.size if probe.sequence else 1)
    segments = (*lengths, padding) if padding else lengths
    borders = torch.tensor([0, *torch.tensor(segments).cumsum(0).tolist()], dtype=torch.int32, device=ids.device)
    positions = torch.cat([torch.arange(length, device=ids.device) for length in segments]).unsqueeze(0)
    row = torch.cat([ids, ids.new_zeros(padding)]).unsqueeze(0)
    if probe.sequence is not None:
        row, positions = probe.sequence.columns(row), probe.sequence.columns(positions)
    return ModelInput(row, positions, Documents(borders, segments, probe.backend, probe.sequence))


def _logits(model: WeightedCausalLM, ids: Tensor, lengths: tuple[int, ...], probe: Probe) -> Tensor:
    logits = model.logits(_inputs(ids, lengths, probe)).float()
    whole = logits if probe.sequence is None else probe.sequence.join(logits)
    return whole.squeeze(0)[: len(ids)]
