"""How the decoder's layers run: recomputed in the backward, in tiles of tokens, compiled; what they compute stays.

Activation checkpointing is torch's, without re-entrance, a layer at a time: `full` keeps each layer's input, `offload`
keeps it in CPU memory, `selective` (selective.py) keeps products and attention too. Tiles cut an MLP's largest tensor,
[tokens, intermediate size], which no sharding of weights makes smaller: each tile is computed by itself and again in
the backward.

Compiled is all of a layer but the attention itself, whose loop over documents depends on their lengths: a few graphs
for all layers, with rotations, norms, activations and sums fused between the products. ZeRO-3's hooks would break a
layer's graph, and so would checkpoints and tiles: there its norms and its MLP are compiled each by itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from seqaware.config.model_config import ModelConfig
from seqaware.errors import ConfigError
from seqaware.models.attention import NAME, attention
from seqaware.models.selective_checkpointing import recompute_selected

# What families call the part of a layer that treats every token by itself.
_MLP_NAMES = ("mlp", "feed_forward", "ffn")


def arrange_layers(model: PreTrainedModel, config: ModelConfig, *, sharded: bool) -> None:
    """Set checkpointing, tiles and compilation of a model's layers as the config asks, once `check_layers` has agreed.

    Args:
        sharded: ZeRO-3 holds the parameters; an MLP in tiles is then gathered once for all its tiles.
    """
    if config.activation_checkpointing != "none":
        recompute = _RECOMPUTING[config.activation_checkpointing]
        for layer in decoder_layers(model):
            layer.gradient_checkpointing = True
            # In training a layer calls it as function(forward, *inputs).
            layer._gradient_checkpointing_func = recompute  # type: ignore[assignment]
    mlps, tiles = list(_mlps(model)), config.mlp_tile_tokens
    if config.compile:
        whole = not sharded and tiles is None and config.activation_checkpointing == "none"
        _compile(decoder_layers(model) if whole else [*mlps, *_norms(model)])
        for mlp in mlps if sharded else ():
            mlp.forward = _by_torchs_linear(mlp.forward)
    if tiles is not None:
        for mlp in mlps:
            mlp.forward = _in_tiles(mlp.forward, tiles)
    if sharded and (config.compile or tiles is not None):
        from deepspeed.utils import set_z3_leaf_modules

        # Gathered as one, on entering and on leaving: not anew for every linear layer of every tile, and no hook
        # of a linear layer breaks the graph.
        set_z3_leaf_modules(model, list({type(mlp) for mlp in mlps}))


def _compile(modules: Iterable[nn.Module]) -> None:
    # Of a function only so many variants are compiled, those of earlier models in this process among them; beyond that
    # it runs as it is, and a layer that is computed again must not run otherwise than at first.
    torch.compiler.reset()
    # Called as it is, in the middle of a graph. Said here, because saying it imports the compiler.
    AttentionInterface.register(NAME, torch.compiler.disable(attention))
    for module in modules:
        module.forward = torch.compile(module.forward, dynamic=True)


@contextmanager
def torchs_linear() -> Iterator[None]:
    """Inside, `F.linear` is torch's own: ZeRO-3 puts a function of DeepSpeed's in its place for the whole process."""
    everywhere, F.linear = F.linear, torch._C._nn.linear
    try:
        yield
    finally:
        F.linear = everywhere


def _by_torchs_linear(compiled: Callable[..., Any]) -> Callable[..., Any]:
    """The same function, multiplying by torch's own linear function.

    DeepSpeed's is there lest autograd keep gathered weights for the backward. It asks every weight for its number, and
    torch 2.11 compiles anew for each. A compiled function keeps the parameter itself, whose gathered weights are given
    back meanwhile.
    """

    def forward(*inputs: Any) -> Any:
        with torchs_linear():
            return compiled(*inputs)

    return forward


def decoder_layers(model: nn.Module) -> list[GradientCheckpointingLayer]:
    """The layers of a transformers model."""
    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]


def check_layers(model: nn.Module, config: ModelConfig) -> None:
    """Refuse what the layers of a model on the meta device do not offer.

    Raises:
        ConfigError: no layers that can be recomputed, no MLPs, or MLPs that tiles would break.
    """
    kind = type(model).__name__
    recomputes = bool(decoder_layers(model)) and getattr(model, "supports_gradient_checkpointing", False)
    if config.activation_checkpointing != "none" and not recomputes:
        raise ConfigError(
            "model.activation_checkpointing: this model cannot recompute its layers",
            got=kind,
            do="write model.activation_checkpointing: none",
        )
    wanting = [name for name in ("compile", "mlp_tile_tokens") if getattr(config, name)]
    if wanting and not list(_mlps(model)):
        raise ConfigError(
            f"model.{wanting[0]}: no decoder layer of this model has an MLP called {', '.join(_MLP_NAMES)}",
            got=kind,
            do="write model.compile: false and model.mlp_tile_tokens: null",
        )
    if config.mlp_tile_tokens is not None and not all(_takes_tokens_alone(mlp, model) for mlp in _mlps(model)):
        raise ConfigError(
            "model.mlp_tile_tokens: an MLP of this model does more than to map hidden states to hidden states",
            got=kind,
            do="write model.mlp_tile_tokens: null",
        )


def _takes_tokens_alone(mlp: nn.Module, model: nn.Module) -> bool:
    """Whether it maps [R, T, H] to [R, T, H] and wants nothing else; tried on the meta device, without memory."""
    hidden: int = model.config.get_text_config().hidden_size  # type: ignore[union-attr, operator]
    tokens = torch.empty(1, 2, hidden, device="meta")
    try:
        output = mlp(tokens)
    except (TypeError, AttributeError, ValueError, RuntimeError):
        return False
    return isinstance(output, Tensor) and output.shape == tokens.shape


def _recompute(function: Callable[..., Any], *inputs: Any) -> Any:
    return checkpoint(function, *inputs, use_reentrant=False)


def _recompute_offloaded(function: Callable[..., Any], *inputs: Any) -> Any:
    with torch.autograd.graph.save_on_cpu(pin_memory=torch.cuda.is_available()):
        return checkpoint(function, *inputs, use_reentrant=False)


_RECOMPUTING = {"full": _recompute, "selective": recompute_selected, "offload": _recompute_offloaded}


def _mlps(model: nn.Module) -> Iterator[nn.Module]:
    for layer in decoder_layers(model):
        yield from (child for name, child in layer.named_children() if name in _MLP_NAMES)


def _norms(model: nn.Module) -> Iterator[nn.Module]:
    for layer in decoder_layers(model):
        yield from (child for child in layer.children() if "norm" in type(child).__name__.lower())


def _in_tiles(whole: Callable[[Tensor], Tensor], tokens: int) -> Callable[[Tensor], Tensor]:
    """The same function of [R, T, H], `tokens` tokens at a time."""

    def forward(hidden_RTH: Tensor) -> Tensor:
        tiles = hidden_RTH.flatten(0, 1).split(tokens)
        if len(tiles) == 1:
            return whole(hidden_RTH)
        done = [_recompute(whole, tile.unsqueeze(0)).squeeze(0) for tile in tiles]
        return torch.cat(done).view_as(hidden_RTH)

    return forward
