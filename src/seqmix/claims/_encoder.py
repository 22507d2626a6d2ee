"""Texts of different lengths, padded or packed, and a bidirectional encoder of BERT's shape that reads either."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from seqmix.ops.attention import attention


class EncoderLayer(nn.Module):
    """Attention in both directions and two linear layers with GELU, a norm after each (Devlin et al. 2018)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value, self.output = (nn.Linear(width, width) for _ in range(4))
        self.expand, self.contract = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.first_norm, self.second_norm = nn.LayerNorm(width), nn.LayerNorm(width)

    def forward(
        self, x: Tensor, mask: Tensor | None = None, cu_seqlens: Tensor | None = None
    ) -> Tensor:
        """x [B, T, D] with `mask` [B, 1, 1, T], True where there is a token, in PyTorch's attention; or
        [1, total, D] with `cu_seqlens` in ours.
        """
        q, k, v = (
            layer(x).unflatten(-1, (self.heads, -1)) for layer in (self.query, self.key, self.value)
        )
        if mask is None:
            o = attention(q, k, v, causal=False, cu_seqlens=cu_seqlens)
        else:
            q, k, v = (part.transpose(1, 2) for part in (q, k, v))
            o = F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)
        x = self.first_norm(x + self.output(o.flatten(-2)))
        y: Tensor = self.second_norm(x + self.contract(F.gelu(self.expand(x))))
        return y


class Texts:
    """Texts of the given lengths [B], padded at the end to the longest or packed."""

    def __init__(self, lengths: Tensor) -> None:
        self.lengths = lengths
        self.longest = int(lengths.max())
        self.cu_seqlens = F.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)
        self.there = torch.arange(self.longest) < lengths.unsqueeze(1)  # [B, T]
        self.places = self.there.flatten().nonzero().flatten()

    @classmethod
    def drawn(cls, number: int, longest: int, share: float, seed: int = 0) -> Self:
        """Random lengths of a mean share of `longest`, uniform up to it where they can be; the first is `longest`."""
        generator = torch.Generator().manual_seed(seed)
        low, high = (2 * share - 1, 1.0) if share >= 0.5 else (0.0, 2 * share)
        uniform = low + (high - low) * torch.rand(number, generator=generator)
        lengths = (uniform * longest).round().clamp(1, longest).long()
        lengths[0] = longest
        return cls(lengths)

    @property
    def share(self) -> float:
        """Tokens among all places."""
        return self.there.float().mean().item()

    def pack(self, x: Tensor) -> Tensor:
        """[B, T, ...] to [1, total, ...]."""
        return x.flatten(0, 1).index_select(0, self.places).unsqueeze(0)

    def unpack(self, x: Tensor) -> Tensor:
        """[1, total, ...] to [B, T, ...], zeros for pads."""
        padded = x.new_zeros(self.there.numel(), *x.shape[2:]).index_copy(0, self.places, x[0])
        return padded.unflatten(0, self.there.shape)


def build(make: Callable[[], nn.Module], *, seed: int = 0) -> Any:
    """What `make` builds, with random weights from `seed`, for evaluation."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return make().eval()
