"""Start-up probes on the real model: documents of one row must not see each other, and our head must be the model's.

Some attention paths leak between packed documents without a word, and some models do more between hidden state and
logits than the conventions say. Both are found in two forwards of a few dozen tokens, on every start.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from seqaware.engine.attention import Documents
from seqaware.engine.model import ModelInput, WeightedCausalLM, output_head
from seqaware.errors import ConfigError

_PACKED = (7, 12, 5)
_ALONE = (12,)


@dataclass(frozen=True)
class Probe:
    """What the probes need to know of the run.

    Attributes:
        packed: whether rows hold several documents; a run that packs nothing is probed on a document alone.
    """

    backend: str
    vocabulary: int
    device: torch.device
    packed: bool


@dataclass(frozen=True)
class ProbeReport:
    """Largest changes of logits seen, relative to the largest logit.

    leak: of other documents when one is perturbed. packed: between a document alone and in the row.
    response: of the perturbed document itself (shows that the probe can see a change at all).
    tolerance: what rounding may do to the first two.
    """

    leak: float
    packed: float
    response: float
    tolerance: float


@torch.no_grad()
def probe_isolation(model: WeightedCausalLM, probe: Probe) -> ProbeReport:
    """Perturb one document of a row and watch the others; compare a packed document with itself alone.

    Collective under ZeRO-3: every rank must call it.

    Raises:
        ConfigError: documents leak into each other, or tokens into their own past.
    """
    was_training = model.training
    model.eval()
    lengths = _PACKED if probe.packed else _ALONE
    vocabulary, backend = probe.vocabulary, probe.backend
    ids = _probe_ids(sum(lengths), vocabulary, probe.device)
    first = lengths[0] if probe.packed else 0
    middle = slice(first, first + _ALONE[0])
    logits = _logits(model, ids, lengths, backend)
    perturbed = ids.clone()
    # The last token of the middle document: nothing else in the row may move, its own past included.
    perturbed[middle.stop - 1] = (perturbed[middle.stop - 1] + 1) % vocabulary
    moved = _logits(model, perturbed, lengths, backend)
    alone = _logits(model, ids[middle], _ALONE, backend)
    model.train(was_training)

    size = logits.abs().max().clamp_min(torch.finfo(torch.float32).tiny)
    change = (moved - logits).abs().amax(dim=-1) / size
    untouched = torch.ones_like(change, dtype=torch.bool)
    untouched[middle.stop - 1] = False
    # A row of another length may take another GEMM kernel: rounding of the dtype times a small multiple, no more.
    report = ProbeReport(
        leak=float(change[untouched].max()),
        packed=float((alone - logits[middle]).abs().max() / size),
        response=float(change[~untouched].max()),
        tolerance=64 * torch.finfo(next(model.parameters()).dtype).eps,
    )
    if report.leak > report.tolerance or report.packed > report.tolerance:
        what = "documents of one row see each other" if probe.packed else "tokens see what comes after them"
        raise ConfigError(
            f"{what} in this model",
            got=f"a change of {max(report.leak, report.packed):.1e} relative, rounding explains {report.tolerance:.1e}",
            do="write packing.enabled: false if the model mixes tokens outside attention" if probe.packed else None,
        )
    return report


@torch.no_grad()
def probe_head(model: WeightedCausalLM, probe: Probe) -> float:
    """Compare the fused loss's head with the model's own logits; returns the largest relative difference.

    Raises:
        ConfigError: the model does something to its logits that the fused loss does not know.
    """
    was_training = model.training
    model.eval()
    inputs = _inputs(_probe_ids(_ALONE[0], probe.vocabulary, probe.device), _ALONE, probe.backend)
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
    tolerance = 64 * torch.finfo(next(model.parameters()).dtype).eps
    if difference > tolerance:
        raise ConfigError(
            "this model does more to its logits than the fused loss knows",
            got=f"a relative difference of {difference:.1e}, rounding explains {tolerance:.1e}",
            do="write model.loss_kernel: plain",
        )
    return difference


def gathered_head(model: WeightedCausalLM) -> torch.autograd.grad_mode.no_grad:
    """A context in which the output head is whole, also under ZeRO-3."""
    import deepspeed

    head = model.model.get_output_embeddings()
    context: torch.autograd.grad_mode.no_grad = deepspeed.zero.GatheredParameters(list(head.parameters()))
    return context


def _probe_ids(count: int, vocabulary: int, device: torch.device) -> Tensor:
    # Fixed and spread over the vocabulary: the same on every rank, without a generator.
    return (torch.arange(1, count + 1, device=device) * 7919) % vocabulary


def _inputs(ids: Tensor, lengths: tuple[int, ...], backend: str) -> ModelInput:
    borders = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32, device=ids.device)
    positions = torch.cat([torch.arange(length, device=ids.device) for length in lengths])
    return ModelInput(ids.unsqueeze(0), positions.unsqueeze(0), Documents(borders, lengths, backend))


def _logits(model: WeightedCausalLM, ids: Tensor, lengths: tuple[int, ...], backend: str) -> Tensor:
    return model.logits(_inputs(ids, lengths, backend)).float().squeeze(0)
