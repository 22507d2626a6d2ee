"""BERT, MiniLM: attention in both directions with the norms after the residuals, learned positions, exact GELU.

Every token is of the first type here: the embedding of that type is added to the positions. The other types' and the
pooler (a layer on the first token) are not taken along; a model goes back with zeros for all types and without a
pooler. Devlin et al. 2019 (arXiv:1810.04805), section 3; Wang et al. 2020 (arXiv:2002.10957).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor
from transformers import BertForMaskedLM, BertModel, PreTrainedModel

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
    refuse,
    same,
)
from seqmix.models.backbone import ModelSpec
from seqmix.models.encoder import SeqmixEncoder, SeqmixForMaskedLM
from seqmix.models.layout import Entry, write_layout


def spec(config: Any) -> ModelSpec:
    """The specification of a BERT configuration."""
    refuse(config, {"is_decoder": (False,), "add_cross_attention": (False,)})
    masked = _is_masked(config)
    if masked:  # the layer before the head
        refuse(config, {"hidden_act": ("gelu",), "tie_word_embeddings": (True,)})
    width, heads = config.hidden_size, config.num_attention_heads
    options = {
        "heads": heads,
        "key_heads": heads,
        "head_width": width // heads,
        "rope_base": None,
        "bias": True,
        "output_bias": True,
    }
    hidden = {
        "hidden": config.intermediate_size,
        "bias": True,
        "activation": activation(config),
    }
    attention = mixer("bidirectional_attention", options, always=SHAPE)
    entry = Entry(attention, channel("mlp", hidden))
    return ModelSpec(
        layout=write_layout([entry] * config.num_hidden_layers),
        width=width,
        heads=heads,
        vocabulary=config.vocab_size,
        head="transformed" if masked else "linear",
        norm="layer",
        norm_eps=config.layer_norm_eps,
        residual="post",
        positions=config.max_position_embeddings,
        embedding_norm=True,
    )


def weights(config: Any) -> Iterator[Weights]:
    """Where the weights of a BERT model go."""
    masked = _is_masked(config)
    base = "bert." if masked else ""
    embeddings, types = f"{base}embeddings", config.type_vocab_size

    def unfolded(x: Tensor) -> Tensors:
        return x, x.new_zeros(types, x.shape[1])

    yield from linear(f"{embeddings}.word_embeddings", "model.embedding")
    yield Weights(
        (f"{embeddings}.position_embeddings.weight", f"{embeddings}.token_type_embeddings.weight"),
        ("model.backbone.positions.table.weight",),
        lambda position, kind: (position + kind[0],),
        unfolded,
    )
    yield from linear(f"{embeddings}.LayerNorm", "model.backbone.embedding_norm", bias=True)
    for index in range(config.num_hidden_layers):
        theirs, ours = f"{base}encoder.layer.{index}", block(index)
        for old, new in (
            ("attention.self.query", "mixer.query"),
            ("attention.self.key", "mixer.key"),
            ("attention.self.value", "mixer.value"),
            ("attention.output.dense", "mixer.output"),
            ("attention.output.LayerNorm", "mixer_norm"),
            ("intermediate.dense", "channel.up"),
            ("output.dense", "channel.output"),
            ("output.LayerNorm", "channel_norm"),
        ):
            yield from linear(f"{theirs}.{old}", f"{ours}.{new}", bias=True)
    if masked:
        head = "cls.predictions"
        yield from linear(f"{head}.transform.dense", "model.transform.dense", bias=True)
        yield from linear(f"{head}.transform.LayerNorm", "model.transform.norm", bias=True)
        yield same(f"{head}.bias", "model.head.bias")


def tensors(model: PreTrainedModel) -> dict[str, Tensor]:
    """All weights but the pooler's."""
    return {k: x for k, x in model.state_dict().items() if not k.startswith("pooler.")}


def build(config: Any) -> PreTrainedModel:
    """The library's model, without a pooler."""
    return (
        BertForMaskedLM(config)
        if _is_masked(config)
        else BertModel(config, add_pooling_layer=False)
    )


def _is_masked(config: Any) -> bool:
    return config.architectures[0] == "BertForMaskedLM"


KINDS = {"BertModel": SeqmixEncoder, "BertForMaskedLM": SeqmixForMaskedLM}
FAMILY = Family(("bert",), spec, weights, KINDS, tensors, build)
