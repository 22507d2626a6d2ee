"""A frozen language model that says several tokens ahead, from mask tokens behind a text.

    x_1 ... x_n, m_1 ... m_K -> features f_n, z_1 ... z_K        m_j: masks, each with an embedding of its own
    every linear layer:  y = W x + g B A x                       g = 1 at masks, 0 at the tokens of the text
    sampler:  p(x_{n+1+j} | z_j, x_{n+j}) = softmax(U h_2),  h_i = norm(silu(L_i h_{i-1})),  h_0 = [z_j, E x_{n+j}]

W, the embedding E and the head U are those of the model and stay as they are; masks, A, B and L are trained. Gated so,
the adapters leave tokens of the text alone to the last bit: those never see a mask, which stands behind them.
Samragh et al. 2025 (arXiv:2507.11851), sections 2.1 to 2.3.

Masks that are read after a state leave it as it was, because states are values, so this goes with every causal mixer.
Axes: B rows, T time, D width, K masks, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from seqmix.channels.mixture_of_experts import MixtureOfExperts
from seqmix.core.errors import RangeError
from seqmix.core.state import State
from seqmix.models import (
    hf,
)  # the module, not names: importing transformers imports all kinds of models


class Adapter(nn.Module):
    """B A x, with A [rank, inputs] random and B [outputs, rank] zero at first."""

    def __init__(self, layer: nn.Linear, rank: int) -> None:
        super().__init__()
        like = layer.weight
        self.down = nn.Parameter(like.new_empty(rank, layer.in_features))
        self.up = nn.Parameter(like.new_zeros(layer.out_features, rank))
        nn.init.normal_(self.down, std=layer.in_features**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.linear(x, self.down), self.up)


class Sampler(nn.Module):
    """Features [..., D] of a mask and the embedding [..., D] of the token before its own, to features [..., D]."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(2 * width, width), nn.Linear(width, width)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))

    def forward(self, features: Tensor, before: Tensor) -> Tensor:
        x = torch.cat([features, before], dim=-1)
        for layer, norm in zip((self.first, self.second), self.norms, strict=True):
            x = norm(F.silu(layer(x)))
        return x


class MultiTokenModel(nn.Module):
    """`model`, which it freezes, and what is trained beside it. Weights follow torch's seed.

    Args:
        model: a causal language model of seqmix.
        masks: how many tokens it says ahead, beyond the next one.
        rank: of the adapters, one at every linear layer of the blocks that every token passes (not of experts).

    Raises:
        RangeError: for no masks, or a rank below 1.
    """

    def __init__(self, model: hf.SeqmixForCausalLM, *, masks: int = 8, rank: int = 16) -> None:
        super().__init__()
        if masks < 1 or rank < 1:
            raise RangeError(f"masks={masks}, rank={rank}, wanted at least 1 of each.")
        self.base = model.eval().requires_grad_(False)
        embedding = model.model.embedding.weight
        size = float(embedding.std())
        self.masks = nn.Parameter(size * torch.randn_like(embedding[:1].expand(masks, -1)))
        self.adapters = nn.ModuleList(Adapter(layer, rank) for layer in self._layers())
        self.sampler = Sampler(embedding.shape[1])

    def _layers(self) -> list[nn.Linear]:
        """Those that every token passes; experts read tokens of their own choice."""
        parts = [p for b in self.base.model.backbone.blocks for p in (b.mixer, b.channel) if p]
        known = [part for part in parts if not isinstance(part, MixtureOfExperts)]
        return [m for part in known for m in part.modules() if isinstance(m, nn.Linear)]

    @contextmanager
    def _adapted(self, gate: Tensor) -> Iterator[None]:
        """Inside, the adapters are at work where `gate` [B, T, 1] is 1."""
        with ExitStack() as stack:
            for layer, adapter in zip(self._layers(), self.adapters, strict=True):

                def add(
                    _: nn.Module, given: Any, y: Tensor, adapter: nn.Module = adapter
                ) -> Tensor:
                    return y + gate * adapter(given[0])

                stack.callback(layer.register_forward_hook(add).remove)
            yield

    def read(
        self, x: Tensor, state: State, gate: Tensor, *, cu_seqlens: Tensor | None = None
    ) -> tuple[Tensor, State]:
        """Features [B, T, D] of embeddings x [B, T, D], and the state after them, with adapters at `gate` [B, T, 1]."""
        with self._adapted(gate):
            features, state = self.base.model.backbone(x, state, cu_seqlens=cu_seqlens)
        return features, state

    def read_masks(self, state: State, rows: int) -> Tensor:
        """Features [B, K, D] of the masks behind texts that the model has read up to `state`, of so many rows."""
        x = self.masks.expand(rows, -1, -1)
        return self.read(x, state, torch.ones_like(x[..., :1]))[0]

    def logits(self, features: Tensor, before: Tensor) -> Tensor:
        """The sampler's logits [..., V] at masks of features [..., D], given the tokens `before` [...] theirs."""
        base = self.base.model
        return base.logits(self.sampler(features, base.embedding(before)))
