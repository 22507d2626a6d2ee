"""Masked language modelling through a decoder that exists during pretraining only.

    loss = -mean_{t in M} log softmax(E f_t)      f_t = decoder(encoder(x))_t or encoder(x)_t, at random

The decoder is a few blocks behind the encoder. In its first block other tokens may attend to only some of the hidden
places, drawn at random; in every later block to more of them, in the last to all: what stands there has become a
better guess by then (gradual unmasking). At every place it is drawn whether the decoder's or the encoder's features go
to the head, so that the encoder learns to predict by itself too. Afterwards the decoder is dropped, and the encoder
costs what it did. Liang and Liang 2024 (DrBERT, later BPDec; arXiv:2401.15861), section 3.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from seqmix.core.errors import ConfigError
from seqmix.data.packing import IGNORED
from seqmix.mixers.bidirectional_attention import BidirectionalAttention
from seqmix.models.backbone import Backbone, ModelSpec
from seqmix.objectives._objective import Inputs, check_shares
from seqmix.objectives.masked import Config as MaskedConfig
from seqmix.objectives.masked import Masked


@dataclass(frozen=True, kw_only=True)
class Config(MaskedConfig):
    blocks: int = 2  # of the decoder
    decoded: float = 0.5  # share of the places whose features come from the decoder

    def __post_init__(self) -> None:
        super().__post_init__()
        check_shares("masked_with_decoder", decoded=self.decoded)
        if self.blocks < 1:
            raise ConfigError(f"masked_with_decoder: blocks={self.blocks}, wanted at least 1.")


class PartlyHidden(BidirectionalAttention):
    """Bidirectional attention in which nobody attends to the places that `hidden` [B, T] marks."""

    hidden: Tensor | None = None

    def _visibility(self) -> dict[str, Any]:
        if self.hidden is None:
            return super()._visibility()
        weight = self.query.weight
        bias = weight.new_zeros(self.hidden.shape).masked_fill(self.hidden, -torch.inf)
        return super()._visibility() | {"bias": bias[:, None, None]}


class MaskedWithDecoder(Masked):
    """`attached` builds the decoder at the encoder's width and takes it away again."""

    Config: ClassVar = Config

    def inputs(self, ids: Tensor, generator: Generator) -> Inputs:
        inputs = super().inputs(ids, generator)
        c = self.config
        scored = inputs["labels"] != IGNORED
        revealed = torch.rand(ids.shape, generator=generator)
        # Block k of n hides the share 1 - k / n of the scored places, the last one (k = n) none.
        hidden = [scored & (revealed >= k / c.blocks) for k in range(1, c.blocks + 1)]
        decoded = torch.rand(ids.shape, generator=generator) < c.decoded
        return inputs | {"hidden": torch.stack(hidden), "decoded": decoded}

    def loss(self, model: Any, inputs: Inputs) -> Tensor:
        """The mean cross-entropy in nats; raises `ConfigError` for a model that nothing is attached to."""
        decoder = getattr(model, "pretraining_decoder", None)
        if decoder is None:
            raise ConfigError("masked_with_decoder: train inside `with objective.attached(model)`.")
        for block, hidden in zip(decoder.blocks, inputs["hidden"], strict=True):
            block.mixer.hidden = hidden
        features = model.features(inputs["input_ids"])
        decoded, _ = decoder(features)
        mixed = torch.where(inputs["decoded"].unsqueeze(-1), decoded, features)
        logits = model.model.logits(mixed)
        labels = inputs["labels"].flatten()
        return F.cross_entropy(logits.flatten(0, 1).float(), labels, ignore_index=IGNORED)

    @contextmanager
    def attached(self, model: Any) -> Iterator[None]:
        model.pretraining_decoder = self.build(model.config.to_spec()).to(model.device)
        try:
            yield
        finally:
            del model.pretraining_decoder

    def build(self, spec: ModelSpec) -> Backbone:
        """A decoder for an encoder of this specification; weights follow torch's seed."""
        layout, depth = "bidirectional_attention", self.config.blocks
        own = ModelSpec(
            layout=layout, depth=depth, width=spec.width, heads=spec.heads, channel=spec.channel
        )
        decoder = Backbone(own)
        for block in decoder.blocks:
            block.mixer = PartlyHidden(block.mixer.config)
        decoder.initialise()
        return decoder


OBJECTIVE = MaskedWithDecoder
