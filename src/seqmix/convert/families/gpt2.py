"""GPT-2: layer norms, learned positions, fused queries, keys and values, a perceptron with biases.

Its linear layers keep their weights transposed. Radford et al. 2019 (GPT-2), section 2.3.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor

from seqmix.convert.families._family import (
    SHAPE,
    Family,
    Weights,
    activation,
    block,
    channel,
    linear,
    mixer,
    parts,
    refuse,
)
from seqmix.models.backbone import ModelSpec
from seqmix.models.layout import Entry, write_layout


def spec(config: Any) -> ModelSpec:
    """The specification of a GPT-2 configuration."""
    refuse(config, {"add_cross_attention": (False,)})
    width, heads = config.hidden_size, config.num_attention_heads
    head_width = width // heads
    attention = {
        "heads": heads,
        "key_heads": heads,
        "head_width": head_width,
        "rope_base": None,
        "bias": True,
        "output_bias": True,
    }
    hidden = {
        "hidden": config.n_inner or 4 * width,
        "bias": True,
        "activation": activation(config, "activation_function"),
    }
    entries = []
    for index in range(config.num_hidden_layers):
        scale = head_width**-0.5 if config.scale_attn_weights else 1.0
        if config.scale_attn_by_inverse_layer_idx:
            scale /= index + 1
        own = attention | {"scale": None if scale == head_width**-0.5 else scale}
        entries.append(Entry(mixer("attention", own, always=SHAPE), channel("mlp", hidden)))
    return ModelSpec(
        layout=write_layout(entries),
        width=width,
        heads=heads,
        vocabulary=config.vocab_size,
        tied=config.tie_word_embeddings,
        norm="layer",
        norm_eps=config.layer_norm_epsilon,
        positions=config.n_positions,
    )


def weights(config: Any) -> Iterator[Weights]:
    """Where the weights of a GPT-2 model go."""
    yield from linear("transformer.wte", "model.embedding")
    yield from linear("transformer.wpe", "model.backbone.positions.table")
    for index in range(config.num_hidden_layers):
        theirs, ours = f"transformer.h.{index}", block(index)
        yield from linear(f"{theirs}.ln_1", f"{ours}.mixer_norm", bias=True)
        qkv = [f"{ours}.mixer.{name}" for name in ("query", "key", "value")]
        yield parts(f"{theirs}.attn.c_attn.weight", [f"{x}.weight" for x in qkv], _turn)
        yield parts(f"{theirs}.attn.c_attn.bias", [f"{x}.bias" for x in qkv])
        yield from linear(f"{theirs}.ln_2", f"{ours}.channel_norm", bias=True)
        for old, new in (
            ("attn.c_proj", "mixer.output"),
            ("mlp.c_fc", "channel.up"),
            ("mlp.c_proj", "channel.output"),
        ):
            yield parts(f"{theirs}.{old}.weight", [f"{ours}.{new}.weight"], _turn)
            yield parts(f"{theirs}.{old}.bias", [f"{ours}.{new}.bias"])
    yield from linear("transformer.ln_f", "model.backbone.norm", bias=True)
    if not config.tie_word_embeddings:
        yield from linear("lm_head", "model.head")


def _turn(x: Tensor) -> Tensor:
    return x.t().contiguous()


FAMILY = Family(("gpt2",), spec, weights)
