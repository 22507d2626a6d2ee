"""A language model as the engine sees it: tokens and a state in, logits and the state after them out.

Axes: B rows, T time, V vocabulary.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from seqmix.core.state import State
from seqmix.models.hf import SeqmixForCausalLM


class Reader(Protocol):
    """What reads. A state holds texts that end together (`seqmix.core.state.concatenate_rows`)."""

    vocabulary: int

    def read(self, ids: Tensor, state: State) -> tuple[Tensor, State]:
        """ids [B, T] after the texts of `state` (None for none), to the last logits [B, V] and the state after them."""
        ...


class SeqmixReader:
    """A model of this package."""

    def __init__(self, model: SeqmixForCausalLM) -> None:
        self.model = model.eval().model
        self.vocabulary = self.model.spec.vocabulary

    @torch.inference_mode()
    def read(self, ids: Tensor, state: State) -> tuple[Tensor, State]:
        features, state = self.model.backbone(self.model.embedding(ids), state)
        return self.model.logits(features[:, -1]), state
