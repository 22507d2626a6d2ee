"""RWKV-4: a block of time mixing and one of channel mixing for each layer of theirs, and a norm of the embeddings.

In evaluation mode transformers halves the residual stream every `rescale_every` layers, and the weights that write to
it with it, for the range of float16. Here nothing is halved, as in its training mode; the norms' eps makes the logits
differ by as much as it weighs. Peng et al. 2023 (arXiv:2305.13048), section 3.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from seqmix.convert.families._family import (
    Family,
    Tensors,
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
    """The specification of an RWKV-4 configuration."""
    width = config.hidden_size
    refuse(config, {"layer_norm_epsilon": (1e-5,)})  # that of the last norm
    refuse(config, {"attention_hidden_size": (width,)})  # others break the library's own caches
    hidden = mixer("rwkv4_channel", {"hidden": config.intermediate_size}, always=("hidden",))
    layer = [Entry(part, Part("none")) for part in (Part("rwkv4"), hidden)]
    return ModelSpec(
        layout=write_layout(layer * config.num_hidden_layers),
        width=width,
        vocabulary=config.vocab_size,
        tied=config.tie_word_embeddings,
        norm="layer",
        norm_eps=1e-5,
        embedding_norm=True,
    )


def weights(config: Any) -> Iterator[Weights]:
    """Where the weights of an RWKV-4 model go."""
    yield from linear("rwkv.embeddings", "model.embedding")
    yield from linear("rwkv.blocks.0.pre_ln", "model.backbone.embedding_norm", bias=True)
    for index in range(config.num_hidden_layers):
        theirs, time, hidden = f"rwkv.blocks.{index}", block(2 * index), block(2 * index + 1)
        yield from linear(f"{theirs}.ln1", f"{time}.mixer_norm", bias=True)
        attention = f"{theirs}.attention"
        yield _mixes(attention, ("key", "value", "receptance"), f"{time}.mixer.mix")
        yield same(f"{attention}.time_decay", f"{time}.mixer.decay")
        yield same(f"{attention}.time_first", f"{time}.mixer.bonus")
        for name in ("key", "value", "receptance", "output"):
            yield from linear(f"{attention}.{name}", f"{time}.mixer.{name}")
        yield from linear(f"{theirs}.ln2", f"{hidden}.mixer_norm", bias=True)
        forward = f"{theirs}.feed_forward"
        yield _mixes(forward, ("key", "receptance"), f"{hidden}.mixer.mix")
        for old, new in (("key", "key"), ("receptance", "receptance"), ("value", "output")):
            yield from linear(f"{forward}.{old}", f"{hidden}.mixer.{new}")
    yield from linear("rwkv.ln_out", "model.backbone.norm", bias=True)
    if not config.tie_word_embeddings:
        yield from linear("head", "model.head")


def tensors(model: PreTrainedModel) -> dict[str, Tensor]:
    """The weights as they are stored, also where a call in evaluation mode has halved some (exactly)."""
    found = model.state_dict()
    if model.rwkv.layers_are_rescaled and model.config.rescale_every > 0:
        for index in range(model.config.num_hidden_layers):
            for name in ("attention.output", "feed_forward.value"):
                place = f"rwkv.blocks.{index}.{name}.weight"
                found[place] = found[place] * 2 ** (index // model.config.rescale_every)
    return found


def _mixes(theirs: str, names: tuple[str, ...], ours: str) -> Weights:
    def save(mix: Tensor) -> Tensors:
        return tuple(row.view(1, 1, -1) for row in mix)

    olds = tuple(f"{theirs}.time_mix_{name}" for name in names)
    return Weights(olds, (ours,), lambda *x: (torch.cat(x).squeeze(1),), save)


FAMILY = Family(("rwkv",), spec, weights, tensors=tensors)
