"""k and length from labels, against counting by hand, and what is refused."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from seqaware.errors import ConfigError, DataError
from seqaware.library.targets import Targets, targets_of

# One document: which of its tokens carry loss. The first is never predicted.
documents = st.lists(st.booleans(), min_size=1, max_size=7).map(lambda flags: [False, *flags[1:]])


def counted(flags: list[bool], positions: str) -> list[tuple[int, int, int]]:
    """(label, k, length) of every place of a document whose token i has the label 10 + i, counted one by one."""
    counts = [i > 0 and (flag or positions == "sequence") for i, flag in enumerate(flags)]
    places = [(10 + i, sum(counts[: i + 1]), sum(counts)) if flags[i] else (-100, 0, 0) for i in range(1, len(flags))]
    return [*places, (-100, 0, 0)]


def shown(targets: Targets) -> list[tuple[int, int, int]]:
    columns = (targets.labels.flatten(), targets.k.flatten(), targets.length.flatten())
    return list(zip(*(column.tolist() for column in columns), strict=True))


@given(row=st.lists(documents, min_size=1, max_size=5), positions=st.sampled_from(["supervised", "sequence"]))
@settings(deadline=None, max_examples=40)
def test_a_packed_row_counts_as_its_documents_do(row: list[list[bool]], positions: str) -> None:
    labels = torch.tensor([[10 + i if flag else -100 for flags in row for i, flag in enumerate(flags)]])
    places = torch.tensor([[i for flags in row for i in range(len(flags))]])
    targets = targets_of(labels, position_ids=places, positions=positions)
    assert shown(targets) == [place for flags in row for place in counted(flags, positions)]
    ends = torch.tensor([len(flags) for flags in row]).cumsum(0).tolist()
    assert targets.sequence_offsets.tolist() == [0, *ends]


@given(
    row=documents, padding=st.integers(0, 4), left=st.booleans(), positions=st.sampled_from(["supervised", "sequence"])
)
@settings(deadline=None, max_examples=40)
def test_padding_on_either_side_never_counts(row: list[bool], padding: int, left: bool, positions: str) -> None:
    def padded(values: list[int], empty: int) -> torch.Tensor:
        return torch.tensor([[empty] * padding + values if left else values + [empty] * padding])

    labels = padded([10 + i if flag else -100 for i, flag in enumerate(row)], -100)
    targets = targets_of(labels, attention_mask=padded([1] * len(row), 0), positions=positions)
    nothing = [(-100, 0, 0)] * padding
    own = counted(row, positions)
    assert shown(targets) == (nothing + own if left else own + nothing)


def test_the_first_column_has_no_predecessor_whatever_its_label() -> None:
    assert shown(targets_of(torch.tensor([[10, 11, 12]]))) == [(11, 1, 2), (12, 2, 2), (-100, 0, 0)]


@pytest.mark.parametrize(
    ("positions", "mask"),
    [([[0, 1, 0, 1]], None), (None, [[1, 1, 0, 0]]), (None, [[0, 0, 1, 1]])],
    ids=["first token of a packed document", "trailing padding", "first token after padding"],
)
def test_a_label_that_nothing_predicts_is_refused(
    positions: list[list[int]] | None, mask: list[list[int]] | None
) -> None:
    given = {
        "position_ids": None if positions is None else torch.tensor(positions),
        "attention_mask": None if mask is None else torch.tensor(mask),
    }
    with pytest.raises(DataError, match=r"labels\[0, 2\] = 12"):
        targets_of(torch.tensor([[-100, -100, 12, -100]]), **given)


def test_what_is_no_mask_of_padding_is_refused() -> None:
    labels = torch.tensor([[-100, 11]])
    with pytest.raises(ConfigError, match="0 and 1"):
        targets_of(labels, attention_mask=torch.tensor([[1, 2]]))
    with pytest.raises(ConfigError, match="0 and 1"):
        targets_of(labels, attention_mask=torch.ones(1, 1, 2, 2))
    with pytest.raises(ConfigError, match="supervised or sequence"):
        targets_of(labels, positions="turn")  # type: ignore[arg-type]
