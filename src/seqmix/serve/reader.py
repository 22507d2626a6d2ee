"""A language model as the engine sees it: tokens and a state in, logits and the state after them out.

Axes: B rows, T time, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, chain
from typing import Protocol

import torch
from torch import Tensor

from seqmix.core.state import State, concatenate_rows, select_rows
from seqmix.models._halves import KnownBlocks
from seqmix.models.hf import SeqmixForCausalLM

Texts = Sequence[Sequence[int]]


class Reader(Protocol):
    """What reads. States are values, of several texts in rows; None is that of a text before its first token."""

    vocabulary: int

    def read(self, texts: Texts, state: State) -> tuple[Tensor, State]:
        """Tokens of B texts, maybe of several lengths, after `state`, to the last logits [B, V] and the state after."""
        ...

    def advance(self, texts: Texts, state: State) -> State:
        """The state after these tokens, whose logits nobody wants."""
        ...

    def join(self, states: Sequence[State]) -> State:
        """One state with the rows of all; a None among them is one row."""
        ...

    def select(self, state: State, rows: Sequence[int]) -> State:
        """These rows; a row may repeat."""
        ...


class SeqmixReader:
    """A model of this package. Texts of several lengths are read as one, packed; in a state they end together.

    Its blocks are looked at once: after a change to the model that is more than other values of weights, make another.
    """

    def __init__(self, model: SeqmixForCausalLM) -> None:
        self.known = KnownBlocks()
        self.model = model.eval().model
        self.vocabulary = self.model.spec.vocabulary

    @torch.inference_mode()
    def read(self, texts: Texts, state: State) -> tuple[Tensor, State]:
        features, ends, state = self._features(texts, state)
        if ends is not None:
            features = features[0, ends[1:] - 1].unsqueeze(1)
        return self.model.logits(features[:, -1:])[:, 0], state

    @torch.inference_mode()
    def advance(self, texts: Texts, state: State) -> State:
        return self._features(texts, state)[-1]

    def _features(self, texts: Texts, state: State) -> tuple[Tensor, Tensor | None, State]:
        """Features [B, T, D], or [1, total, D] with the texts' boundaries, and the state after them."""
        backbone, lengths = self.model.backbone, [len(text) for text in texts]
        if len({*lengths}) == 1:
            embedded = self.model.embedding(torch.tensor(texts))
            features, state = backbone(embedded, state, known=self.known)
            return features, None, state
        ends = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)
        packed = self.model.embedding(torch.tensor([[*chain.from_iterable(texts)]]))
        features, state = backbone(packed, state, cu_seqlens=ends, known=self.known)
        return features, ends, state

    @torch.inference_mode()
    def join(self, states: Sequence[State]) -> State:
        if len(states) == 1 or all(state is None for state in states):
            return states[0]
        first = self.model.initial_state(1)
        return concatenate_rows([first if state is None else state for state in states])

    def select(self, state: State, rows: Sequence[int]) -> State:
        return select_rows(state, rows)
