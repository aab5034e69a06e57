"""The parameters of a decoder, module by module, from the figures of its configuration: counted without torch.

Letters: H hidden size, I intermediate size, A query heads, G key/value heads, D head dimension, V vocabulary.

    Llama and its kin    q: H → A·D    k, v: H → G·D    o: A·D → H    gate, up: H → I    down: I → H    two norms: H
    GPT-2                one projection H → 3·H, o: H → H, MLP H → 4·H → H, biases, LayerNorms of 2·H, learnt positions
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from seqaware.plan.specs import ModelFacts

_GPT2 = ("gpt2",)
# Llama's layout, but for biases on q, k and v, or norms on the heads of q and k.
_BIASED_ATTENTION = ("qwen2",)
_NORMED_HEADS = ("qwen3",)
_LLAMA_LIKE = ("llama", "mistral", *_BIASED_ATTENTION, *_NORMED_HEADS)
# What is said of a model that is not `exact`.
GUESSED = "a model type that is not known here is counted as if it were a Llama of these sizes"


@dataclass(frozen=True)
class Module:
    """A module that holds parameters itself. parameters: the number of weights of each of its parameters."""

    name: str
    parameters: tuple[int, ...]

    @property
    def size(self) -> int:
        return sum(self.parameters)


@dataclass(frozen=True)
class Decoder:
    """The shape of a causal language model.

    Attributes:
        family: gated (RMSNorm, rotary positions, gated MLP) or gpt2 (LayerNorm, learnt positions, GELU).
        biased_attention, normed_heads: what Qwen 2 and Qwen 3 add to Llama's attention.
        exact: False for a model type that is not known here and counted as if it were a Llama.
    """

    family: str
    hidden: int
    intermediate: int
    layers: int
    heads: int
    key_value_heads: int
    head_dim: int
    vocabulary: int
    positions: int
    tied: bool
    biased_attention: bool = False
    normed_heads: bool = False
    exact: bool = True

    @property
    def query_width(self) -> int:
        """A·D."""
        return self.heads * self.head_dim

    @property
    def key_width(self) -> int:
        """G·D."""
        return self.key_value_heads * self.head_dim

    @cached_property
    def embedding(self) -> tuple[Module, ...]:
        """What turns ids into hidden states."""
        tokens = Module("embedding", (self.vocabulary * self.hidden,))
        if self.family == "gpt2":
            return tokens, Module("positions", (self.positions * self.hidden,))
        return (tokens,)

    @cached_property
    def layer(self) -> tuple[Module, ...]:
        """The modules of one layer, in the order in which they compute."""
        hidden, inner, query, key = self.hidden, self.intermediate, self.query_width, self.key_width
        if self.family == "gpt2":
            return (
                Module("attention_norm", (hidden, hidden)),
                Module("qkv", (3 * hidden * hidden, 3 * hidden)),
                Module("attention_output", (hidden * hidden, hidden)),
                Module("mlp_norm", (hidden, hidden)),
                Module("up", (hidden * inner, inner)),
                Module("down", (inner * hidden, hidden)),
            )

        def projection(name: str, width: int) -> Module:
            return Module(name, (hidden * width, width) if self.biased_attention else (hidden * width,))

        head_norms = [Module(f"{of}_norm", (self.head_dim,)) for of in ("query", "key") if self.normed_heads]
        of_query, of_key = head_norms or (None, None)
        modules = (
            Module("attention_norm", (hidden,)),
            projection("query", query),
            of_query,
            projection("key", key),
            of_key,
            projection("value", key),
            Module("attention_output", (query * hidden,)),
            Module("mlp_norm", (hidden,)),
            Module("gate", (hidden * inner,)),
            Module("up", (hidden * inner,)),
            Module("down", (inner * hidden,)),
        )
        return tuple(module for module in modules if module is not None)

    @cached_property
    def final(self) -> tuple[Module, ...]:
        """The last norm, and the head that the loss reads (whose weight may be the embedding's)."""
        norm = Module("final_norm", (self.hidden,) * (2 if self.family == "gpt2" else 1))
        return norm, Module("head", (self.vocabulary * self.hidden,))

    @cached_property
    def layer_parameters(self) -> int:
        return sum(module.size for module in self.layer)

    @cached_property
    def matrix_parameters(self) -> int:
        """Weights that multiply every token: those of the layers' matrices and of the head."""
        matrices = sum(max(module.parameters) for module in self.layer if not module.name.endswith("norm"))
        return self.layers * matrices + self.vocabulary * self.hidden

    @cached_property
    def parameters(self) -> int:
        """All weights; a tied head counts once."""
        outside = sum(module.size for module in (*self.embedding, *self.final))
        shared = self.vocabulary * self.hidden if self.tied else 0
        return self.layers * self.layer_parameters + outside - shared

    @cached_property
    def largest(self) -> int:
        """Weights of the largest parameter."""
        return max(max(module.parameters) for module in (*self.embedding, *self.layer, *self.final))

    @cached_property
    def linear_widths(self) -> tuple[tuple[int, int], ...]:
        """(in, out) of every linear layer of one decoder layer: what adapters are put on."""
        hidden, inner, query, key = self.hidden, self.intermediate, self.query_width, self.key_width
        if self.family == "gpt2":
            return (hidden, 3 * hidden), (hidden, hidden), (hidden, inner), (inner, hidden)
        attention = ((hidden, query), (hidden, key), (hidden, key), (query, hidden))
        return (*attention, (hidden, inner), (hidden, inner), (inner, hidden))


def decoder_of(facts: ModelFacts | None) -> Decoder | None:
    """The shape of a model, or None where its configuration does not say enough."""
    if facts is None:
        return None
    gpt2 = facts.model_type in _GPT2
    figures = (facts.hidden_size, facts.layers, facts.heads, facts.key_value_heads, facts.head_dim, facts.vocab_size)
    hidden, layers, heads, key_value_heads, head_dim, vocabulary = (figure or 0 for figure in figures)
    inner = facts.intermediate_size or (4 * hidden if gpt2 else 0)
    positions = facts.max_positions or 0
    if not all((hidden, layers, heads, key_value_heads, head_dim, vocabulary, inner)) or (gpt2 and not positions):
        return None
    return Decoder(
        family="gpt2" if gpt2 else "gated",
        hidden=hidden,
        intermediate=inner,
        layers=layers,
        heads=heads,
        key_value_heads=key_value_heads,
        head_dim=head_dim,
        vocabulary=vocabulary,
        positions=positions,
        tied=facts.tied,
        biased_attention=facts.model_type in _BIASED_ATTENTION,
        normed_heads=facts.model_type in _NORMED_HEADS,
        exact=gpt2 or facts.model_type in _LLAMA_LIKE,
    )
