"""Mamba-2: blocks of a state space with one decay per head, and no channel mixer.

Dao & Gu 2024 (arXiv:2405.21060), section 7.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from seqmix.convert.families._family import (
    Family,
    Weights,
    block,
    linear,
    mixer,
    refuse,
    same,
)
from seqmix.models.backbone import ModelSpec
from seqmix.models.layout import Entry, Part, write_layout


def spec(config: Any) -> ModelSpec:
    """The specification of a Mamba-2 configuration."""
    refuse(
        config,
        {
            "hidden_act": ("silu",),
            "use_bias": (False,),
            "use_conv_bias": (True,),
            "layer_norm_epsilon": (1e-5,),  # of the norms inside the mixers
            "time_step_limit": ((0.0, math.inf), [0.0, math.inf]),
        },
    )
    options = {
        "heads": config.num_heads,
        "expansion": config.num_heads * config.head_dim / config.hidden_size,
        "state_width": config.state_size,
        "groups": config.n_groups,
        "convolution_size": config.conv_kernel,
    }
    entry = Entry(mixer("mamba2", options, always=("heads",)), Part("none"))
    return ModelSpec(
        layout=write_layout([entry] * config.num_hidden_layers),
        width=config.hidden_size,
        heads=config.num_heads,
        vocabulary=config.vocab_size,
        tied=config.tie_word_embeddings,
        norm_eps=config.layer_norm_epsilon,
    )


def weights(config: Any) -> Iterator[Weights]:
    """Where the weights of a Mamba-2 model go."""
    yield from linear("backbone.embeddings", "model.embedding")
    for index in range(config.num_hidden_layers):
        theirs, ours = f"backbone.layers.{index}", block(index)
        yield from linear(f"{theirs}.norm", f"{ours}.mixer_norm")
        theirs, ours = f"{theirs}.mixer", f"{ours}.mixer"
        yield from linear(f"{theirs}.in_proj", f"{ours}.input")
        yield Weights(
            (f"{theirs}.conv1d.weight",),
            (f"{ours}.convolution.weight",),
            lambda x: (x.squeeze(1),),
            lambda x: (x.unsqueeze(1),),
        )
        yield same(f"{theirs}.conv1d.bias", f"{ours}.convolution.bias")
        yield same(f"{theirs}.dt_bias", f"{ours}.step_bias")
        yield same(f"{theirs}.A_log", f"{ours}.A_log")
        yield same(f"{theirs}.D", f"{ours}.D")
        yield same(f"{theirs}.norm.weight", f"{ours}.norm_weight")
        yield from linear(f"{theirs}.out_proj", f"{ours}.output")
    yield from linear("backbone.norm_f", "model.backbone.norm")
    if not config.tie_word_embeddings:
        yield from linear("lm_head", "model.head")


FAMILY = Family(("mamba2",), spec, weights)
