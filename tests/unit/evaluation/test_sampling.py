"""Draws: from the right distribution, and of the row alone."""

from __future__ import annotations

import torch

from seqaware.evaluation.sampling import Decoding, Draw, Trace

LOGITS = torch.log(torch.tensor([0.5, 0.3, 0.15, 0.05]))
IDS = torch.zeros(1, 1, dtype=torch.int64)


def drawn(decoding: Decoding, count: int) -> torch.Tensor:
    """Shares of the tokens in so many draws of one row."""
    draw = Draw(decoding, ["row"])
    tokens = torch.stack([draw(IDS, LOGITS[None]).argmax(-1)[0] for _ in range(count)])
    return torch.bincount(tokens, minlength=4) / count


def test_shares_are_the_probabilities() -> None:
    # A share of 4,000 draws has a standard error of at most 0.008: within five of them.
    torch.testing.assert_close(drawn(Decoding(1, temperature=1.0), 4000), LOGITS.exp(), atol=0.04, rtol=0)
    sharper = torch.softmax(LOGITS / 0.5, -1)
    torch.testing.assert_close(drawn(Decoding(1, temperature=0.5), 4000), sharper, atol=0.04, rtol=0)


def test_top_p_keeps_the_token_that_crosses_the_share_and_no_more() -> None:
    shares = drawn(Decoding(1, temperature=1.0, top_p=0.7), 2000)
    assert shares[2] == shares[3] == 0 and shares[1] > 0.3
    assert drawn(Decoding(1, temperature=1.0, top_p=0.01), 50)[0] == 1


def test_a_row_draws_the_same_in_any_batch_and_another_with_another_seed() -> None:
    scores = torch.randn(3, 50, generator=torch.Generator().manual_seed(0))
    decoding = Decoding(1, temperature=1.0, seed=3)

    def steps(draw: Draw, rows: list[int]) -> list[list[int]]:
        return [draw(IDS, scores[rows]).argmax(-1).tolist() for _ in range(20)]

    together = steps(Draw(decoding, ["a", "b", "c"]), [0, 1, 2])
    turned = steps(Draw(decoding, ["c", "b"]), [2, 1])
    assert [[row[2], row[1]] for row in together] == turned
    assert steps(Draw(Decoding(1, temperature=1.0, seed=4), ["c", "b"]), [2, 1]) != turned


def test_greedy_leaves_the_scores_and_a_trace_hears_the_distribution() -> None:
    trace = Trace()
    assert Draw(Decoding(1), ["row"], trace=trace)(IDS, LOGITS[None] + 7).argmax(-1).item() == 0
    entropy = -(LOGITS.exp() * LOGITS).sum()
    torch.testing.assert_close(trace.entropy[0], entropy[None])
    torch.testing.assert_close(trace.probability[0], torch.tensor([0.5]))
