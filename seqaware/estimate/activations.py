"""What the forward of a micro-batch keeps for its backward, and what the loss needs, in bytes on one rank.

Counted from the operations themselves: an entry is a tensor that autograd saves. Letters: t tokens on this rank,
H hidden size, I intermediate size, A·D and G·D widths of queries and keys, V vocabulary, b bytes of the dtype.

    RMSNorm            its input in float32 (4·H), the normalised input (b·H), its output (b·H), 1 / rms
    attention          q, k, v after the rotation, the output and its log-sum-exp
    gated MLP          gate, up, silu(gate) and their product: 4·b·I
    GPT-2              LayerNorm's input and output, q, k, v, and five I-wide tensors of GELU's tanh form
    compiled           what attention saves, the input and the output of each norm, gate, up and the MLP's product
    selective          each layer's input, and what its products and its attention give: all else of a layer is there
                       only while it goes backward

The fused loss (objective/fused.py) holds dW in float32, dh, and of a chunk of C rows [C, V] in float32, over which the
gradient is written. Its backward holds dW twice, the second in the model's dtype, but for a large narrow one
(objective/weight_gradient.py).
"""

from __future__ import annotations

from dataclasses import dataclass
from math import lcm

from seqaware.estimate.layout import Layout

# As objective/fused.py has them; a test compares.
CPU_CHUNK_BYTES = 64 * 2**20
GPU_CHUNK_BYTES = 1250 * 10**6
CPU_MOST_CHUNK_ROWS = 4096
GPU_MOST_CHUNK_ROWS = 8192
GPU_TILE_ROWS = 128
BACKWARD_ROWS = 16384
_FLOAT32 = 4


@dataclass(frozen=True)
class Activations:
    """Bytes on one rank.

    Attributes:
        layer: what one layer saves. kept: what all layers keep until the loss, on the device; on_host: on the CPU.
        again: what computing a layer again adds to what is kept, while it goes backward.
        outside: saved before the first and after the last layer.
        work: what the backward of a layer needs beside the saved tensors. norm: of which that of one norm.
    """

    layer: int
    kept: int
    again: int
    on_host: int
    outside: int
    work: int
    norm: int

    @property
    def at_loss(self) -> int:
        return self.kept + self.outside

    @property
    def in_backward(self) -> int:
        """While the last layer goes backward."""
        return self.kept + self.again + self.work


@dataclass(frozen=True)
class LossMemory:
    """Bytes on one rank: between forward and backward, and on top of that the most in each of them.

    weight_gradient: of the head, as the backward hands it on.
    """

    kept: int
    forward: int
    backward: int
    weight_gradient: int


def activations(layout: Layout) -> Activations:
    """Of one micro-batch."""
    decoder, t, b = layout.decoder, layout.tokens, layout.itemsize
    alone = layout.compiled and not layout.recomputed and not layout.mlp_tile_tokens and decoder.family == "gated"
    by_token = _compiled(layout) if alone else _norms(layout) + _mlp(layout)
    layer = t * (by_token + _attention(layout)) + _tile(layout)
    kept, again, on_host = _kept(layout, layer)
    rotary = 0 if decoder.family == "gpt2" else 2 * decoder.head_dim * b
    final = (_FLOAT32 if decoder.family == "gated" else b) * decoder.hidden
    final += b * decoder.hidden if decoder.family == "gated" else 0
    final += b * decoder.hidden if layout.loss_kernel == "plain" else 0
    return Activations(
        layer, kept, again, on_host, t * (rotary + final), work=t * _work(layout), norm=t * _norm_work(layout)
    )


def _kept(layout: Layout, layer: int) -> tuple[int, int, int]:
    """(on the device until the loss, more of the layer that is computed again, on the CPU)."""
    layers, entry = layout.decoder.layers, layout.tokens * layout.itemsize * layout.decoder.hidden
    match layout.checkpointing:
        case "none":
            return layer * layers, 0, 0
        case "selective":
            chosen = layout.tokens * _chosen(layout)
            # Of the layer at hand what autograd saves takes the place of what was kept, but for the input.
            return chosen * layers, layer + entry - chosen, 0
        case "full":
            return entry * layers, layer, 0
        case _:
            return entry, layer, entry * layers


def _chosen(layout: Layout) -> int:
    """What selective checkpointing keeps of a token: the layer's input, and what products and attention give."""
    decoder = layout.decoder
    products = sum(out for _, out in decoder.linear_widths) + layout.adapter_width
    return layout.itemsize * (decoder.hidden + products + decoder.query_width) + _FLOAT32 * decoder.heads


def _norms(layout: Layout) -> int:
    decoder, b = layout.decoder, layout.itemsize
    if decoder.family == "gpt2":
        return 2 * (2 * b * decoder.hidden + 2 * _FLOAT32)
    heads = decoder.query_width + decoder.key_width if decoder.normed_heads else 0
    return 2 * ((_FLOAT32 + 2 * b) * decoder.hidden + _FLOAT32) + (_FLOAT32 + b) * heads


def _compiled(layout: Layout) -> int:
    """Of norms and a gated MLP: what the products take in and give, and 1 / rms. All else is computed again."""
    decoder = layout.decoder
    return layout.itemsize * (4 * decoder.hidden + 3 * decoder.intermediate) + 2 * _FLOAT32


def _attention(layout: Layout) -> int:
    decoder, b, ranks = layout.decoder, layout.itemsize, layout.world.sequence
    # Ranks that share a sequence each need whole key heads, so that too few of them are repeated.
    keys = lcm(decoder.key_value_heads, ranks) * decoder.head_dim if ranks > 1 else decoder.key_width
    # The per-document loop of the CPU joins its pieces; ranks that share a sequence put theirs back in order.
    outputs = 2 if layout.world.device == "cpu" or ranks > 1 else 1
    if decoder.family == "gpt2" and ranks == 1:
        keys = decoder.query_width
    widths = decoder.query_width * (1 + outputs) + 2 * keys
    return b * widths + _FLOAT32 * decoder.heads


def _mlp(layout: Layout) -> int:
    if layout.mlp_tile_tokens:
        return 0
    tensors = 5 if layout.decoder.family == "gpt2" else 4
    return tensors * layout.itemsize * layout.decoder.intermediate


def _tile(layout: Layout) -> int:
    """A tile that is computed again in the backward: what the MLP saves of it, and its gradients."""
    if not layout.mlp_tile_tokens:
        return 0
    return min(layout.mlp_tile_tokens, layout.tokens) * 6 * layout.itemsize * layout.decoder.intermediate


def _work(layout: Layout) -> int:
    """Gradients of one token that are there at once in the backward of a layer, at the fullest of its three places.

    In the MLP: the residual's, and those of two tensors of width I (the third takes the place of the saved product). In
    attention: the residual's, the output's, those of q, k, v, and three copies on their way between ranks. In a norm
    see `_norm_work`. What the MLP saved is gone when the other two have their turn.
    """
    decoder, b, ranks = layout.decoder, layout.itemsize, layout.world.sequence
    keys = lcm(decoder.key_value_heads, ranks) * decoder.head_dim
    exchanged = (decoder.query_width + 2 * keys) * (3 if ranks > 1 else 1)
    attention = b * (decoder.hidden + decoder.query_width + exchanged)
    freed = _mlp(layout)
    in_mlp = b * (decoder.hidden + (0 if layout.mlp_tile_tokens else 2 * decoder.intermediate))
    return max(in_mlp, attention - freed, _norm_work(layout) - freed)


def _norm_work(layout: Layout) -> int:
    """The residual's gradient, and four float32 tensors of width H: the gradient, its two branches and their sum."""
    return layout.decoder.hidden * (layout.itemsize + 4 * _FLOAT32)


def loss_memory(layout: Layout) -> LossMemory:
    """Of head and loss over the tokens of a micro-batch, all of which carry loss."""
    decoder, t, b = layout.decoder, layout.tokens, layout.itemsize
    V, H = decoder.vocabulary, decoder.hidden
    weight = V * H if layout.trains_head else 0
    gradient = b * weight
    if layout.loss_kernel == "plain":
        logits = t * V
        narrow = b * logits if layout.narrow else 0
        return LossMemory(_FLOAT32 * logits, narrow + 2 * _FLOAT32 * logits, narrow + 2 * _FLOAT32 * logits, gradient)
    chunk = chunk_rows(layout)
    # A CPU without bfloat16 arithmetic widens the head; the plan takes every CPU for one of those.
    widened = layout.narrow and layout.world.device == "cpu"
    operand = _FLOAT32 if widened else b
    buffers = chunk * V * _FLOAT32 + chunk * H * operand + t * b * H
    buffers += V * H * _FLOAT32 + chunk * H * _FLOAT32 if widened else 0
    held = _FLOAT32 if layout.dtype == "float16" else b
    kept = t * H * held + _FLOAT32 * weight
    # The gradient beside its float32 sum, but that a large narrow one lies where its sum was; then, with the sum gone,
    # the hidden states' gradient is brought to its places.
    handed_on = 0 if layout.narrow and gradient > GPU_CHUNK_BYTES else gradient
    placing = t * H * b + min(t, BACKWARD_ROWS) * H * b + gradient - _FLOAT32 * weight
    return LossMemory(kept, buffers, max(handed_on, placing), gradient)


def chunk_rows(layout: Layout) -> int:
    """Rows of the head that the fused loss works on at once."""
    decoder = layout.decoder
    if layout.world.device == "cpu":
        most = max(CPU_CHUNK_BYTES // (_FLOAT32 * decoder.vocabulary), min(decoder.hidden, CPU_MOST_CHUNK_ROWS), 1)
        return _even_rows(layout.tokens, most, tile=1)
    rows = min(GPU_CHUNK_BYTES // (_FLOAT32 * decoder.vocabulary), GPU_MOST_CHUNK_ROWS)
    most = max(GPU_TILE_ROWS, rows // GPU_TILE_ROWS * GPU_TILE_ROWS)
    return _even_rows(layout.tokens, most, tile=GPU_TILE_ROWS)


def _even_rows(tokens: int, most: int, *, tile: int) -> int:
    chunks = max(1, -(-tokens // most))
    even = -(-tokens // chunks)
    return max(1, min(tokens, -(-even // tile) * tile))
