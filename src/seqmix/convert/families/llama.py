"""Llama and its kin: Llama, SmolLM2, Mistral, Qwen2, Qwen3.

RMS norms before grouped attention with rotary positions and a gated linear unit. Qwen2 has biases on queries, keys
and values, Qwen3 a norm on queries and keys; Mistral and Qwen may see a window only.
Touvron et al. 2023 (arXiv:2302.13971, 2307.09288); Jiang et al. 2023 (arXiv:2310.06825); Yang et al. 2024
(arXiv:2407.10671) and 2025 (arXiv:2505.09388).
"""

from __future__ import annotations

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


def windows(config: Any) -> list[int | None]:
    """How many tokens each block's attention sees, None for all."""
    depth = config.num_hidden_layers
    window = getattr(config, "sliding_window", None)
    if config.model_type == "mistral":
        return [window] * depth
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * depth
    return [window if kind == "sliding_attention" else None for kind in kinds]


def _biases(config: Any) -> tuple[bool, bool]:
    """Whether queries, keys and values have biases, and whether the output has one."""
    if config.model_type == "qwen2":
        return True, False
    return (getattr(config, "attention_bias", False),) * 2


def spec(config: Any) -> ModelSpec:
    """The specification of a Llama-like configuration."""
    refuse(config, {"mlp_bias": (False, None), "pretraining_tp": (1, None)})
    qk_norm = config.model_type == "qwen3"
    if qk_norm:
        refuse(config, {"rms_norm_eps": (1e-6,)})  # of the norms of queries and keys
    bias, output_bias = _biases(config)
    head_width = getattr(config, "head_dim", None)
    options = {
        "heads": config.num_attention_heads,
        "key_heads": config.num_key_value_heads,
        "head_width": head_width or config.hidden_size // config.num_attention_heads,
        **rotary(config, config.rope_parameters),
        "qk_norm": qk_norm,
        "bias": bias,
        "output_bias": output_bias,
    }
    hidden = {"hidden": config.intermediate_size, "activation": activation(config)}
    entries = [
        Entry(
            mixer("attention", options | {"window": window}, always=SHAPE), channel("glu", hidden)
        )
        for window in windows(config)
    ]
    return ModelSpec(
        layout=write_layout(entries),
        width=config.hidden_size,
        heads=config.num_attention_heads,
        vocabulary=config.vocab_size,
        tied=config.tie_word_embeddings,
        norm_eps=config.rms_norm_eps,
    )


def weights(config: Any) -> Iterator[Weights]:
    """Where the weights of a Llama-like model go."""
    bias, output_bias = _biases(config)
    yield from linear("model.embed_tokens", "model.embedding")
    for index in range(config.num_hidden_layers):
        theirs, ours = f"model.layers.{index}", block(index)
        yield from linear(f"{theirs}.input_layernorm", f"{ours}.mixer_norm")
        for old, new in (("q", "query"), ("k", "key"), ("v", "value")):
            yield from linear(f"{theirs}.self_attn.{old}_proj", f"{ours}.mixer.{new}", bias=bias)
        yield from linear(f"{theirs}.self_attn.o_proj", f"{ours}.mixer.output", bias=output_bias)
        if config.model_type == "qwen3":
            for old, new in (("q", "query"), ("k", "key")):
                yield from linear(f"{theirs}.self_attn.{old}_norm", f"{ours}.mixer.{new}_norm")
        yield from linear(f"{theirs}.post_attention_layernorm", f"{ours}.channel_norm")
        for old, new in (("gate", "gate"), ("up", "up"), ("down", "output")):
            yield from linear(f"{theirs}.mlp.{old}_proj", f"{ours}.channel.{new}")
    yield from linear("model.norm", "model.backbone.norm")
    if not config.tie_word_embeddings:
        yield from linear("lm_head", "model.head")


FAMILY = Family(("llama", "mistral", "qwen2", "qwen3"), spec, weights)
