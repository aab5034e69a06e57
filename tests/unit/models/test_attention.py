"""Our attention on packed rows against each document alone through transformers' own eager attention."""

from __future__ import annotations

import pytest
import torch

from seqaware.errors import ConfigError
from seqaware.models.attention import Documents, standard_attention
from seqaware.models.attention_choice import choose_backend
from tests.unit.models.tiny_models import FAMILIES, VOCABULARY, tiny

LENGTHS = (9, 1, 14, 6)


def _packed(lengths: tuple[int, ...], backend: str) -> tuple[torch.Tensor, torch.Tensor, Documents]:
    ids = torch.randint(0, VOCABULARY, (1, sum(lengths)), generator=torch.Generator().manual_seed(1))
    positions = torch.cat([torch.arange(n) for n in lengths]).unsqueeze(0)
    borders = torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32)
    return ids, positions, Documents(borders, lengths, backend)


@pytest.mark.parametrize("backend", ["sdpa_per_document", "eager"])
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_packed_documents_are_as_if_alone(family: str, backend: str) -> None:
    ours = tiny(family, dtype=torch.float64)
    reference = tiny(family, attention="eager", dtype=torch.float64)
    reference.load_state_dict(ours.state_dict())
    ids, positions, documents = _packed(LENGTHS, backend)
    packed = ours(input_ids=ids, position_ids=positions, documents=documents, use_cache=False).logits[0]
    alone = [reference(input_ids=part, use_cache=False).logits[0] for part in ids.split(LENGTHS, dim=1)]
    # float64 but for norms and rotary tables, which transformers computes in float32: 2 layers × a few roundings.
    torch.testing.assert_close(packed, torch.cat(alone), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_gradients_are_those_of_the_documents_alone(family: str) -> None:
    ours = tiny(family, dtype=torch.float64)
    reference = tiny(family, attention="eager", dtype=torch.float64)
    reference.load_state_dict(ours.state_dict())
    ids, positions, documents = _packed(LENGTHS, "sdpa_per_document")
    ours(input_ids=ids, position_ids=positions, documents=documents, use_cache=False).logits.square().sum().backward()
    for part in ids.split(LENGTHS, dim=1):
        reference(input_ids=part, use_cache=False).logits.square().sum().backward()
    for (name, mine), theirs in zip(ours.named_parameters(), reference.parameters(), strict=True):
        assert mine.grad is not None and theirs.grad is not None, name
        scale = float(theirs.grad.abs().max())
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=0, atol=1e-5 * scale, msg=name)


def test_padded_rows_equal_packed_rows() -> None:
    model = tiny("llama", dtype=torch.float64)
    ids, positions, documents = _packed((5, 3), "sdpa_per_document")
    packed = model(input_ids=ids, position_ids=positions, documents=documents, use_cache=False).logits[0]
    rows = torch.zeros(2, 5, dtype=torch.int64)
    rows[0], rows[1, :3] = ids[0, :5], ids[0, 5:]
    places = torch.tensor([[0, 1, 2, 3, 4], [0, 1, 2, 0, 1]])
    padded = Documents(torch.tensor([0, 5, 8, 10], dtype=torch.int32), (5, 3, 2), "sdpa_per_document")
    logits = model(input_ids=rows, position_ids=places, documents=padded, use_cache=False).logits
    # The linear layers see another shape, so their kernels may sum in another order: float64 rounding.
    torch.testing.assert_close(torch.cat([logits[0], logits[1, :3]]), packed, rtol=1e-9, atol=1e-9)


def test_a_model_that_hands_no_documents_on_is_refused() -> None:
    with pytest.raises(ConfigError, match="document borders"):
        tiny("llama")(input_ids=torch.zeros(1, 4, dtype=torch.int64), use_cache=False)


def test_generation_uses_standard_attention_inside_the_context_only() -> None:
    model = tiny("llama")
    prompt = torch.tensor([[5, 6, 7]])
    with standard_attention(model):
        written = model.generate(
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=4, do_sample=False, pad_token_id=0
        )
    assert written.shape[1] > 3
    with pytest.raises(ConfigError):
        model(input_ids=prompt, use_cache=False)


def test_backends_that_cannot_run_here_are_refused() -> None:
    with pytest.raises(ConfigError, match="needs a GPU"):
        choose_backend("varlen", device="cpu", dtype=torch.bfloat16, head_dim=64)
    with pytest.raises(ConfigError, match="bfloat16 or float16"):
        choose_backend("varlen", device="cuda", dtype=torch.float32, head_dim=64)
