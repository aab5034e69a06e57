"""Sequence parallelism after Ulysses (Jacobs et al. 2023): ranks share each row by tokens, and its attention by heads.

Outside attention every token is on its own, so a rank computes its columns of the row and nothing else. Attention
needs whole documents: one all-to-all turns [my tokens, all heads] into [all tokens, my heads], and one turns it back.
Positions, labels and weights are made for the whole row and cut afterwards, so a document may lie across a cut.

DeepSpeed need not know of it. The loss of a step is a sum over tokens, and the backward of an all-to-all is an
all-to-all, so the gradients of all ranks add up to that sum's gradient whether a rank holds documents or parts of them.

Letters: n ranks of a group, R rows, T columns, t = T / n, N = R·T, A query heads, G key/value heads, D head dimension.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from seqaware.distributed.process_group import SequenceGroup


def gather_tokens(query: Tensor, key: Tensor, value: Tensor, *, group: SequenceGroup) -> tuple[Tensor, Tensor, Tensor]:
    """From this rank's tokens of all heads to all tokens of this rank's heads, in one exchange.

    Fewer key/value heads than ranks (or a number that the ranks do not divide) are repeated as often as is needed, so
    that each rank's query heads find theirs.

    Args:
        query: [R, A, t, D] with A a multiple of n; key, value: [R, G, t, D].

    Returns:
        query [N, A/n, D]; key, value [N, G'/n, D] where G' = lcm(G, n).
    """
    heads = math.lcm(key.shape[1], group.size)
    assert query.shape[1] % heads == 0, "the plan lets a number of ranks through only if it divides the heads"
    repeats = heads // key.shape[1]
    if repeats > 1:
        key, value = key.repeat_interleave(repeats, dim=1), value.repeat_interleave(repeats, dim=1)
    parts = [_by_rank(tensor, group.size) for tensor in (query, key, value)]
    mine = _exchange(torch.cat(parts, dim=2), group)
    rows, columns, head_dim = query.shape[0], query.shape[2] * group.size, query.shape[3]
    # [n, R, heads/n, t, D] -> [R, n, t, heads/n, D] -> [N, heads/n, D]: the shards in the order of the columns.
    flat = mine.permute(1, 0, 3, 2, 4).reshape(rows * columns, -1, head_dim)
    q, k, v = flat.split([part.shape[2] for part in parts], dim=1)
    return q, k, v


def scatter_tokens(output_NAD: Tensor, *, rows: int, group: SequenceGroup) -> Tensor:
    """From all tokens of this rank's heads back to this rank's tokens of all heads.

    Args:
        output_NAD: [N, A/n, D].

    Returns:
        [R, t, A, D].
    """
    tokens, heads, head_dim = output_NAD.shape
    columns = tokens // rows // group.size
    by_rank = output_NAD.view(rows, group.size, columns, heads, head_dim).transpose(0, 1)
    mine = _exchange(by_rank, group)
    # [n, R, t, A/n, D] -> [R, t, n, A/n, D]: rank s computed the s-th run of heads.
    return mine.permute(1, 2, 0, 3, 4).reshape(rows, columns, group.size * heads, head_dim)


def _by_rank(tensor: Tensor, ranks: int) -> Tensor:
    """[R, heads, t, D] -> [n, R, heads/n, t, D]."""
    rows, heads, columns, head_dim = tensor.shape
    return tensor.view(rows, ranks, heads // ranks, columns, head_dim).transpose(0, 1)


def _exchange(tensor: Tensor, group: SequenceGroup) -> Tensor:
    """[n, …]: slice i goes to rank i of the group, and slice i of the result came from there."""
    exchanged: Tensor = _Exchange.apply(tensor, group)  # type: ignore[no-untyped-call]
    return exchanged


class _Exchange(torch.autograd.Function):
    """An all-to-all of equal slices transposes (sender, slice); as a linear map it is its own adjoint."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: SequenceGroup) -> Tensor:
        ctx.group = group
        return group.exchange(tensor)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.group.exchange(grad), None
