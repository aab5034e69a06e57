"""Attention that keeps the documents of a row apart, whatever the backend.

The batch says where documents begin (`Documents`); every backend gets that and nothing else: no mask is ever built,
nothing is inferred from position ids. Registered with transformers under NAME, so that every model that follows
its attention interface uses it.

Letters: R rows, T columns, N = R·T tokens, A query heads, G key/value heads, D head dimension.
"""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel

from seqaware.config.packages import FLASH_MODULES
from seqaware.distributed.process_group import SequenceGroup
from seqaware.distributed.sequence_parallel import gather_tokens, scatter_tokens
from seqaware.errors import ConfigError
from seqaware.models.attention_trial import Trial

NAME = "seqaware"


# Not frozen: torch 2.11's compiler looks into a frozen one, and compiled anew for every number of documents.
@dataclass(eq=False)
class Documents:
    """Where the documents of a batch lie in its flattened R·T tokens. Never changed.

    Attributes:
        cu_seqlens: int32 [S + 1] on the device, from 0 to R·T; padding is a segment of its own.
        lengths: the S lengths on the host, so that no backend has to ask the device.
        backend: one of BACKENDS.
        sequence: the ranks that share these rows, each with its run of columns; None where every rank has its own.
            The borders are those of the whole rows.
    """

    cu_seqlens: Tensor
    lengths: tuple[int, ...]
    backend: str
    sequence: SequenceGroup | None = None

    @property
    def longest(self) -> int:
        return max(self.lengths)


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Causal attention inside each document: the function transformers calls in every layer.

    Args:
        query: [R, A, T, D]; key, value: [R, G, T, D]. T is this rank's columns where ranks share the rows.
        attention_mask: must be None: what may see what is told by `documents` alone.
        options: transformers' (scaling, dropout, sliding_window, softcap, …) and our `documents`.

    Returns:
        [R, T, A, D] and no attention weights.
    """
    documents: Documents | None = options.get("documents")
    if documents is None:
        raise ConfigError(
            "this model does not hand the batch's document borders to its attention layers",
            got=type(module).__name__,
            do="use a model of transformers that passes keyword arguments on to its attention",
        )
    assert attention_mask is None, "a mask reached the document attention"
    if options.get("s_aux") is not None:
        raise ConfigError("attention sinks are not supported", got=type(module).__name__)
    rows, heads, columns, head_dim = query.shape
    call = AttentionCall(
        scale=options.get("scaling") or head_dim**-0.5,
        dropout=options.get("dropout", 0.0) if module.training else 0.0,
        window=options.get("sliding_window"),
        softcap=options.get("softcap"),
    )
    backend = documents.backend
    if call.softcap is not None and backend in ("sdpa_per_document", "varlen"):
        backend = "eager"  # neither kernel caps its scores
    if documents.sequence is not None:
        q, k, v = gather_tokens(query, key, value, group=documents.sequence)
        output_NAD = BACKENDS[backend](q, k, v, documents, call)
        return scatter_tokens(output_NAD, rows=rows, group=documents.sequence), None
    # [R, A, T, D] -> [N, A, D]: one flat run of tokens, cut by cu_seqlens.
    q, k, v = (tensor.transpose(1, 2).reshape(rows * columns, -1, head_dim) for tensor in (query, key, value))
    output_NAD = BACKENDS[backend](q, k, v, documents, call)
    return output_NAD.view(rows, columns, heads, -1), None


@dataclass(frozen=True)
class AttentionCall:
    """What one layer asks of the kernel: score scale, dropout, sliding window (tokens), score soft-cap."""

    scale: float
    dropout: float
    window: int | None
    softcap: float | None


Backend = Callable[[Tensor, Tensor, Tensor, Documents, AttentionCall], Tensor]


def _sdpa_per_document(
    q_NAD: Tensor, k_NGD: Tensor, v_NGD: Tensor, documents: Documents, call: AttentionCall
) -> Tensor:
    grouped = q_NAD.shape[1] != k_NGD.shape[1]
    outputs = []
    lengths = list(documents.lengths)
    parts = zip(q_NAD.split(lengths), k_NGD.split(lengths), v_NGD.split(lengths), strict=True)
    for q, k, v in parts:
        length = q.shape[0]
        band = _band_mask(length, call.window, q.device) if call.window is not None and length > call.window else None
        out = F.scaled_dot_product_attention(
            q.transpose(0, 1).unsqueeze(0),
            k.transpose(0, 1).unsqueeze(0),
            v.transpose(0, 1).unsqueeze(0),
            attn_mask=band,
            dropout_p=call.dropout,
            is_causal=band is None,
            scale=call.scale,
            enable_gqa=grouped,
        )
        outputs.append(out.squeeze(0).transpose(0, 1))
    return torch.cat(outputs)


def _eager(q_NAD: Tensor, k_NGD: Tensor, v_NGD: Tensor, documents: Documents, call: AttentionCall) -> Tensor:
    """Softmax written out, document by document, in the inputs' dtype with a float32 softmax or better."""
    groups = q_NAD.shape[1] // k_NGD.shape[1]
    outputs = []
    lengths = list(documents.lengths)
    parts = zip(q_NAD.split(lengths), k_NGD.split(lengths), v_NGD.split(lengths), strict=True)
    for q, k, v in parts:
        k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
        scores = torch.einsum("qad,kad->aqk", q, k) * call.scale
        if call.softcap is not None:
            scores = torch.tanh(scores / call.softcap) * call.softcap
        visible = _band_mask(q.shape[0], call.window, q.device)
        scores = scores.masked_fill(~visible, -torch.inf)
        softmax_dtype = torch.promote_types(scores.dtype, torch.float32)
        probabilities = torch.softmax(scores, dim=-1, dtype=softmax_dtype).to(v.dtype)
        probabilities = F.dropout(probabilities, p=call.dropout)
        outputs.append(torch.einsum("aqk,kad->qad", probabilities, v))
    return torch.cat(outputs)


def _band_mask(length: int, window: int | None, device: torch.device) -> Tensor:
    """bool [length, length]: True where query i may see key j, that is i − window < j ≤ i."""
    query = torch.arange(length, device=device).unsqueeze(1)
    key = torch.arange(length, device=device).unsqueeze(0)
    visible = key <= query
    return visible if window is None else visible & (key > query - window)


def _varlen(q_NAD: Tensor, k_NGD: Tensor, v_NGD: Tensor, documents: Documents, call: AttentionCall) -> Tensor:
    if call.dropout > 0:
        raise _no_dropout("varlen attention")
    grouped = q_NAD.shape[1] != k_NGD.shape[1]
    if grouped and not takes_grouped_heads(q_NAD.device, q_NAD.dtype):
        return _varlen_repeating_heads(q_NAD, k_NGD, v_NGD, documents, call)
    return _varlen_call(q_NAD, k_NGD, v_NGD, documents, call)


def _varlen_repeating_heads(
    q_NAD: Tensor, k_NGD: Tensor, v_NGD: Tensor, documents: Documents, call: AttentionCall
) -> Tensor:
    groups = q_NAD.shape[1] // k_NGD.shape[1]
    k_NAD, v_NAD = k_NGD.repeat_interleave(groups, dim=1), v_NGD.repeat_interleave(groups, dim=1)
    return _varlen_call(q_NAD, k_NAD, v_NAD, documents, call)


def _varlen_call(q_NAD: Tensor, k_NGD: Tensor, v_NGD: Tensor, documents: Documents, call: AttentionCall) -> Tensor:
    """torch's varlen_attn as it is; (W, 0) lets a token see itself and W before it."""
    varlen_attn, options = varlen_function()
    arguments: dict[str, Any] = {"enable_gqa": True} if "enable_gqa" in options else {}
    arguments["window_size"] = (-1 if call.window is None else call.window - 1, 0)
    borders, longest = documents.cu_seqlens, documents.longest
    output: Tensor = varlen_attn(q_NAD, k_NGD, v_NGD, borders, borders, longest, longest, scale=call.scale, **arguments)
    return output


@cache
def varlen_function() -> tuple[Callable[..., Any], frozenset[str]]:
    """varlen_attn and the names of its parameters, which grow from version to version (enable_gqa is not in 2.11)."""
    from torch.nn.attention.varlen import varlen_attn

    return varlen_attn, frozenset(inspect.signature(varlen_attn).parameters)


@cache
def takes_grouped_heads(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether varlen_attn takes fewer key heads than query heads, forward and backward. Asked by trying.

    Its kernels do; whether the function in front of them lets such tensors through differs between versions. Ask before
    the first layer: one that is recomputed in the backward must not do anything at first that it does not do again.
    """
    trial = Trial((4, 2, 64), (5, 3), device, dtype)
    call = AttentionCall(scale=0.125, dropout=0.0, window=None, softcap=None)
    return difference(_varlen_call, _varlen_repeating_heads, trial=trial, call=call) is None


def difference(tried: Backend, known: Backend, *, trial: Trial, call: AttentionCall) -> str | None:
    """In what a backend differs from one that is known to be right on the trial's documents; None if in nothing."""
    options: dict[str, Any] = {"documents": Documents(trial.borders(), trial.lengths, "tried"), "call": call}
    return trial.difference(partial(tried, **options), partial(known, **options))


def _flash(module: str) -> Backend:
    def flash(q_NAD: Tensor, k_NGD: Tensor, v_NGD: Tensor, documents: Documents, call: AttentionCall) -> Tensor:
        function = importlib.import_module(module).flash_attn_varlen_func
        arguments: dict[str, Any] = {"causal": True, "softmax_scale": call.scale}
        if call.dropout > 0:
            if "dropout_p" not in inspect.signature(function).parameters:
                raise _no_dropout(module)
            arguments["dropout_p"] = call.dropout
        if call.window is not None:
            arguments["window_size"] = (call.window - 1, 0)
        if call.softcap is not None:
            arguments["softcap"] = call.softcap
        arguments |= dict.fromkeys(("cu_seqlens_q", "cu_seqlens_k"), documents.cu_seqlens)
        arguments |= dict.fromkeys(("max_seqlen_q", "max_seqlen_k"), documents.longest)
        output = function(q_NAD, k_NGD, v_NGD, **arguments)
        first: Tensor = output[0] if isinstance(output, tuple) else output
        return first

    return flash


def _no_dropout(what: str) -> ConfigError:
    return ConfigError(f"{what} has no dropout", do="set model.dropout: 0 or model.attention: eager")


BACKENDS: dict[str, Backend] = {
    "sdpa_per_document": _sdpa_per_document,
    "eager": _eager,
    "varlen": _varlen,
    **{version: _flash(module) for version, module in FLASH_MODULES.items()},
}

# No mask function is registered beside it: transformers then builds no mask at all for this attention.
AttentionInterface.register(NAME, attention)


@contextmanager
def standard_attention(model: PreTrainedModel) -> Iterator[None]:
    """Inside, the model uses torch's SDPA with ordinary masks, as generation with a cache needs, uncompiled."""
    model.set_attn_implementation("sdpa")
    # A cache that grows with every token would be compiled for again and again. Asking imports the compiler.
    compiling = "torch._dynamo" in sys.modules
    try:
        with torch.compiler.set_stance("force_eager") if compiling else nullcontext():
            yield
    finally:
        model.set_attn_implementation(NAME)
