"""A bidirectional encoder of BERT's shape, on padded rows with a mask or on packed texts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

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


def build(make: Callable[[], nn.Module], *, seed: int = 0) -> Any:
    """What `make` builds, with random weights from `seed`, for evaluation."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return make().eval()
