"""torch's varlen_attn and flash-attn's function as their versions have them, in plain arithmetic for a CPU.

Each has the signature of its version and refuses what that version refuses.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def banded(q_NAD: Tensor, k_NGD: Tensor, v_NGD: Tensor, borders: Tensor, *, scale: float, left: int) -> Tensor:
    """Each document alone: token i sees itself and `left` tokens before it; all of them at −1."""
    groups = q_NAD.shape[1] // k_NGD.shape[1]
    outputs = []
    for start, end in zip(borders.tolist()[:-1], borders.tolist()[1:], strict=True):
        q, k, v = q_NAD[start:end], k_NGD[start:end], v_NGD[start:end]
        k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
        scores = torch.einsum("iad,jad->aij", q, k) * scale
        distance = torch.arange(end - start).unsqueeze(1) - torch.arange(end - start)
        hidden = (distance < 0) | ((distance > left) if left >= 0 else torch.zeros_like(distance, dtype=torch.bool))
        outputs.append(torch.einsum("aij,jad->iad", torch.softmax(scores.masked_fill(hidden, -torch.inf), -1), v))
    return torch.cat(outputs)


def _checked(borders: Tensor, longest: int) -> None:
    assert borders.dtype == torch.int32 and longest == int(borders.diff().max())


def torch_2_13(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor | None,
    max_q: int,
    max_k: int,
    *,
    return_aux: Any = None,
    scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    enable_gqa: bool = False,
    seqused_k: Tensor | None = None,
    block_table: Tensor | None = None,
    num_splits: int | None = None,
) -> Tensor:
    if not enable_gqa and query.size(1) != key.size(1):
        raise ValueError("Expect query and key/value to have the same number of heads")
    return torch_2_11(query, key, value, cu_seq_q, cu_seq_q, max_q, max_k, scale=scale, window_size=window_size)


def torch_2_11(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor,
    max_q: int,
    max_k: int,
    *,
    return_aux: Any = None,
    scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
) -> Tensor:
    _checked(cu_seq_q, max_q)
    assert scale is not None and window_size[1] == 0, "not causal"
    return banded(query, key, value, cu_seq_q, scale=scale, left=window_size[0])


def torch_2_11_strict(*tensors: Any, scale: float | None = None, window_size: tuple[int, int] = (-1, -1)) -> Tensor:
    """As if its kernels did not group heads."""
    if tensors[0].size(1) != tensors[1].size(1):
        raise RuntimeError("Number of heads in key/value must be that of the query")
    return torch_2_11(*tensors, scale=scale, window_size=window_size)


def torch_2_11_wrong(*tensors: Any, scale: float | None = None, window_size: tuple[int, int] = (-1, -1)) -> Tensor:
    """As if it took grouped heads in another order than everyone else."""
    query, key, value, *rest = tensors
    times = query.size(1) // key.size(1)
    key, value = (tensor.repeat(1, times, 1) for tensor in (key, value))
    return torch_2_11(query, key, value, *rest, scale=scale, window_size=window_size)


def flash_attn_4_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    qv: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int | None, int | None] = (None, None),
    softcap: float = 0.0,
) -> tuple[Tensor, None]:
    """Of flash_attn.cute: other defaults, no dropout, and the log-sum-exp beside the result."""
    assert qv is None and cu_seqlens_q is not None and max_seqlen_q is not None and softcap == 0.0
    _checked(cu_seqlens_q, max_seqlen_q)
    assert causal and softmax_scale is not None and window_size in ((None, None), (3, 0))
    left = -1 if window_size[0] is None else window_size[0]
    return banded(q, k, v, cu_seqlens_q, scale=softmax_scale, left=left), None


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
) -> Tensor:
    _checked(cu_seqlens_q, max_seqlen_q)
    assert causal and dropout_p == 0.0 and softcap == 0.0 and softmax_scale is not None
    return banded(q, k, v, cu_seqlens_q, scale=softmax_scale, left=window_size[0])
