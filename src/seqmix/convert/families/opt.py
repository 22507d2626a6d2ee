"""OPT: layer norms, learned positions from the third row of their table, a perceptron with ReLU.

The two rows before, which no token of a text reads, are dropped, and are zero on the way back.
Zhang et al. 2022 (arXiv:2205.01068), section 2.1.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch.nn.functional as F

from seqmix.convert.families._family import (
    SHAPE,
    Family,
    Weights,
    activation,
    block,
    channel,
    linear,
    mixer,
    refuse,
)
from seqmix.models.backbone import ModelSpec
from seqmix.models.layout import Entry, write_layout

OFFSET = 2


def spec(config: Any) -> ModelSpec:
    """The specification of an OPT configuration; not that of OPT-350m, which projects its embeddings."""
    width, heads = config.hidden_size, config.num_attention_heads
    refuse(
        config,
        {
            "word_embed_proj_dim": (width,),
            "do_layer_norm_before": (True,),
            "_remove_final_layer_norm": (False,),
            "layer_norm_elementwise_affine": (True,),
        },
    )
    bias = config.enable_bias
    options = {
        "heads": heads,
        "key_heads": heads,
        "head_width": width // heads,
        "rope_base": None,
        "bias": bias,
        "output_bias": bias,
    }
    kind = activation(config, "activation_function")
    hidden = {"hidden": config.ffn_dim, "bias": bias, "activation": kind}
    entry = Entry(mixer("attention", options, always=SHAPE), channel("mlp", hidden))
    return ModelSpec(
        layout=write_layout([entry] * config.num_hidden_layers),
        width=width,
        heads=heads,
        vocabulary=config.vocab_size,
        tied=config.tie_word_embeddings,
        norm="layer",
        norm_eps=1e-5,
        positions=config.max_position_embeddings,
    )


def weights(config: Any) -> Iterator[Weights]:
    """Where the weights of an OPT model go."""
    bias = config.enable_bias
    yield from linear("model.decoder.embed_tokens", "model.embedding")
    yield Weights(
        ("model.decoder.embed_positions.weight",),
        ("model.backbone.positions.table.weight",),
        lambda x: (x[OFFSET:],),
        lambda x: (F.pad(x, (0, 0, OFFSET, 0)),),
    )
    for index in range(config.num_hidden_layers):
        theirs, ours = f"model.decoder.layers.{index}", block(index)
        yield from linear(f"{theirs}.self_attn_layer_norm", f"{ours}.mixer_norm", bias=True)
        for old, new in (("q", "query"), ("k", "key"), ("v", "value"), ("out", "output")):
            yield from linear(f"{theirs}.self_attn.{old}_proj", f"{ours}.mixer.{new}", bias=bias)
        yield from linear(f"{theirs}.final_layer_norm", f"{ours}.channel_norm", bias=True)
        yield from linear(f"{theirs}.fc1", f"{ours}.channel.up", bias=bias)
        yield from linear(f"{theirs}.fc2", f"{ours}.channel.output", bias=bias)
    yield from linear("model.decoder.final_layer_norm", "model.backbone.norm", bias=True)
    if not config.tie_word_embeddings:
        yield from linear("lm_head", "model.head")


FAMILY = Family(("opt",), spec, weights)
