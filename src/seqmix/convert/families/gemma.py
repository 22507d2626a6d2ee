"""Gemma and Gemma 3 (text): embeddings scaled by sqrt(width), norms that multiply by 1 + w, GELU units.

Gemma 3 also has norms after the mixers and on queries and keys, and rotary positions of another base where it sees a
window only. The one is added to w here and taken away on the way back, which rounds w once.
Gemma team 2024 (arXiv:2403.08295), section 2; 2025 (arXiv:2503.19786), section 2.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

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
    rotary,
)
from seqmix.models.backbone import ModelSpec
from seqmix.models.layout import Entry, write_layout

THIRD = "gemma3_text"


def spec(config: Any) -> ModelSpec:
    """The specification of a Gemma or Gemma 3 configuration."""
    refuse(
        config,
        {
            "use_bidirectional_attention": (False, None),
            "attn_logit_softcapping": (None,),
            "final_logit_softcapping": (None,),
        },
    )
    depth, third = config.num_hidden_layers, config.model_type == THIRD
    kinds = config.layer_types if third else ["full_attention"] * depth
    options = {
        "heads": config.num_attention_heads,
        "key_heads": config.num_key_value_heads,
        "head_width": config.head_dim,
        "bias": config.attention_bias,
        "output_bias": config.attention_bias,
    }
    if third:
        if not math.isclose(config.rms_norm_eps, 1e-6, rel_tol=1e-6):  # float32 in some files
            refuse(config, {"rms_norm_eps": (1e-6,)})  # of the norms of queries and keys
        scale = config.query_pre_attn_scalar**-0.5
        options |= {"qk_norm": True, "scale": None if scale == config.head_dim**-0.5 else scale}
    kind = activation(config, "hidden_activation" if third else "hidden_act")
    hidden = channel("glu", {"hidden": config.intermediate_size, "activation": kind})
    entries = []
    for name in kinds:
        turning = config.rope_parameters[name] if third else config.rope_parameters
        window = config.sliding_window if name == "sliding_attention" else None
        own = options | rotary(config, turning) | {"window": window}
        entries.append(Entry(mixer("attention", own, always=SHAPE), hidden))
    return ModelSpec(
        layout=write_layout(entries),
        width=config.hidden_size,
        heads=config.num_attention_heads,
        vocabulary=config.vocab_size,
        tied=config.tie_word_embeddings,
        norm_eps=config.rms_norm_eps,
        residual="sandwich" if third else "pre",
        embedding_scale=config.hidden_size**0.5,
    )


def _norm(theirs: str, ours: str) -> Weights:
    names = (f"{theirs}.weight",), (f"{ours}.weight",)
    return Weights(*names, lambda x: (1 + x,), lambda x: (x - 1,))


def weights(config: Any) -> Iterator[Weights]:
    """Where the weights of a Gemma model go."""
    bias, third = config.attention_bias, config.model_type == THIRD
    norms = {"input_layernorm": "mixer_norm", "post_attention_layernorm": "channel_norm"}
    if third:
        norms = {
            "input_layernorm": "mixer_norm",
            "post_attention_layernorm": "mixer_last_norm",
            "pre_feedforward_layernorm": "channel_norm",
            "post_feedforward_layernorm": "channel_last_norm",
            "self_attn.q_norm": "mixer.query_norm",
            "self_attn.k_norm": "mixer.key_norm",
        }
    yield from linear("model.embed_tokens", "model.embedding")
    for index in range(config.num_hidden_layers):
        theirs, ours = f"model.layers.{index}", block(index)
        for old, new in norms.items():
            yield _norm(f"{theirs}.{old}", f"{ours}.{new}")
        for old, new in (("q", "query"), ("k", "key"), ("v", "value"), ("o", "output")):
            yield from linear(f"{theirs}.self_attn.{old}_proj", f"{ours}.mixer.{new}", bias=bias)
        for old, new in (("gate", "gate"), ("up", "up"), ("down", "output")):
            yield from linear(f"{theirs}.mlp.{old}_proj", f"{ours}.channel.{new}")
    yield _norm("model.norm", "model.backbone.norm")
    if not config.tie_word_embeddings:
        yield from linear("lm_head", "model.head")


FAMILY = Family(("gemma", THIRD), spec, weights)
