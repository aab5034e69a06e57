"""Ranks that share a row compute the attention of the whole row: checked with a thread for each rank."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from seqaware.distributed.sequence_parallel import gather_tokens, scatter_tokens
from seqaware.models.attention import Documents, attention
from tests.unit.distributed.thread_ranks import ThreadGroup, on_ranks


def documents(lengths: Sequence[int], group: ThreadGroup | None = None) -> Documents:
    borders = torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32)
    return Documents(borders, tuple(lengths), "sdpa_per_document", group)  # type: ignore[arg-type]


# Query heads, key/value heads, ranks: more of them than ranks, as many, fewer, and a number the ranks do not divide.
HEADS = [(4, 4, 2), (8, 2, 2), (8, 2, 4), (4, 1, 4), (12, 6, 4), (12, 3, 2), (6, 2, 3)]


@pytest.mark.parametrize(("heads", "key_value_heads", "ranks"), HEADS)
def test_shared_rows_have_the_attention_and_gradients_of_whole_rows(
    heads: int, key_value_heads: int, ranks: int
) -> None:
    rows, columns, head_dim = 2, 12, 8
    # Documents that lie across the cuts between the ranks; the third segment of row 0 is padding.
    lengths = [5, 6, 1, 12]
    draw = torch.Generator().manual_seed(0)
    q = torch.randn(rows, heads, columns, head_dim, generator=draw, dtype=torch.float64)
    k, v = torch.randn(2, rows, key_value_heads, columns, head_dim, generator=draw, dtype=torch.float64)
    upstream = torch.randn(rows, columns, heads, head_dim, generator=draw, dtype=torch.float64)
    module = nn.Module()

    whole = [tensor.clone().requires_grad_() for tensor in (q, k, v)]
    expected, _ = attention(module, *whole, None, documents=documents(lengths))
    expected.backward(upstream)

    def share(group: ThreadGroup) -> Tensor:
        width = columns // ranks
        mine = slice(group.index * width, (group.index + 1) * width)
        parts = [tensor[:, :, mine].clone().requires_grad_() for tensor in (q, k, v)]
        output, _ = attention(module, *parts, None, documents=documents(lengths, group))
        output.backward(upstream[:, mine])
        grads = [part.grad.transpose(1, 2).flatten(2) for part in parts]  # type: ignore[union-attr]
        return torch.cat([output.detach().flatten(2), *grads], dim=2)

    got = torch.cat(on_ranks(ranks, share), dim=1)
    grads = [tensor.grad.transpose(1, 2).flatten(2) for tensor in whole]  # type: ignore[union-attr]
    # float64; the gradient of a repeated key/value head is a sum over its copies, in another order.
    torch.testing.assert_close(got, torch.cat([expected.detach().flatten(2), *grads], dim=2), rtol=1e-12, atol=1e-12)


@settings(max_examples=20, deadline=None)
@given(
    ranks=st.integers(2, 4),
    rows=st.integers(1, 3),
    width=st.integers(1, 4),
    heads_each=st.integers(1, 3),
)
def test_there_and_back_is_where_it_was(ranks: int, rows: int, width: int, heads_each: int) -> None:
    heads, head_dim = ranks * heads_each, 2
    whole = torch.arange(rows * heads * ranks * width * head_dim, dtype=torch.float32)
    whole = whole.view(rows, heads, ranks * width, head_dim)

    def share(group: ThreadGroup) -> Tensor:
        mine = whole[:, :, group.index * width : (group.index + 1) * width]
        q, k, v = gather_tokens(mine, mine, mine, group=group)  # type: ignore[arg-type]
        run = slice(group.index * heads_each, (group.index + 1) * heads_each)
        everything = whole[:, run].transpose(1, 2).reshape(rows * ranks * width, heads_each, head_dim)
        assert torch.equal(q, everything) and torch.equal(k, everything) and torch.equal(v, everything)
        return scatter_tokens(q, rows=rows, group=group)  # type: ignore[arg-type]

    assert torch.equal(torch.cat(on_ranks(ranks, share), dim=1), whole.transpose(1, 2))
