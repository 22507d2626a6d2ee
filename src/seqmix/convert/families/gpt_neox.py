"""GPT-NeoX and Pythia: attention and perceptron side by side, a share of the channels turning.

Queries, keys and values are fused head by head. Black et al. 2022 (arXiv:2204.06745), section 2.1; Biderman et al.
2023 (arXiv:2304.01373).
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from seqmix.convert.families._family import (
    SHAPE,
    Family,
    Tensors,
    Weights,
    activation,
    block,
    channel,
    linear,
    mixer,
    rotary,
)
from seqmix.models.backbone import ModelSpec
from seqmix.models.layout import Entry, write_layout


def spec(config: Any) -> ModelSpec:
    """The specification of a GPT-NeoX configuration."""
    heads, bias = config.num_attention_heads, config.attention_bias
    options = {
        "heads": heads,
        "key_heads": heads,
        "head_width": config.hidden_size // heads,
        **rotary(config, config.rope_parameters),
        "rotary": config.rope_parameters.get("partial_rotary_factor", 1.0),
        "bias": bias,
        "output_bias": bias,
    }
    hidden = {"hidden": config.intermediate_size, "bias": True, "activation": activation(config)}
    entry = Entry(mixer("attention", options, always=SHAPE), channel("mlp", hidden))
    return ModelSpec(
        layout=write_layout([entry] * config.num_hidden_layers),
        width=config.hidden_size,
        heads=heads,
        vocabulary=config.vocab_size,
        tied=config.tie_word_embeddings,
        norm="layer",
        norm_eps=config.layer_norm_eps,
        residual="parallel" if config.use_parallel_residual else "pre",
    )


def weights(config: Any) -> Iterator[Weights]:
    """Where the weights of a GPT-NeoX model go."""
    bias, heads = config.attention_bias, config.num_attention_heads
    yield from linear("gpt_neox.embed_in", "model.embedding")
    for index in range(config.num_hidden_layers):
        theirs, ours = f"gpt_neox.layers.{index}", block(index)
        yield from linear(f"{theirs}.input_layernorm", f"{ours}.mixer_norm", bias=True)
        for leaf in ("weight", "bias") if bias else ("weight",):
            yield Weights(
                (f"{theirs}.attention.query_key_value.{leaf}",),
                tuple(f"{ours}.mixer.{name}.{leaf}" for name in ("query", "key", "value")),
                partial(_by_head, heads),
                partial(_fused, heads),
            )
        yield from linear(f"{theirs}.attention.dense", f"{ours}.mixer.output", bias=bias)
        yield from linear(f"{theirs}.post_attention_layernorm", f"{ours}.channel_norm", bias=True)
        yield from linear(f"{theirs}.mlp.dense_h_to_4h", f"{ours}.channel.up", bias=True)
        yield from linear(f"{theirs}.mlp.dense_4h_to_h", f"{ours}.channel.output", bias=True)
    yield from linear("gpt_neox.final_layer_norm", "model.backbone.norm", bias=True)
    if not config.tie_word_embeddings:
        yield from linear("lm_head", "model.head")


def _by_head(heads: int, x: Tensor) -> Tensors:
    """[H * 3 * K, ...] to three of [H * K, ...]."""
    return tuple(part.flatten(0, 1) for part in x.unflatten(0, (heads, 3, -1)).unbind(1))


def _fused(heads: int, *parts: Tensor) -> Tensors:
    split = [part.unflatten(0, (heads, -1)) for part in parts]
    return (torch.stack(split, dim=1).flatten(0, 2),)


FAMILY = Family(("gpt_neox",), spec, weights)
