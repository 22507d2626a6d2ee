"""Queries, keys and values as attention makes them, for every mixer that can take over the weights of attention.

Axes: B batch (N rows of packed texts), T time, H heads, G key heads, K head width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from seqmix.core.errors import ConfigError
from seqmix.layers.norm import RMSNorm
from seqmix.layers.positions import Stretch, rotate
from seqmix.mixers._mixer import HeadsConfig, Mixer
from seqmix.ops._packing import Packing


@dataclass(frozen=True, kw_only=True)
class ProjectionConfig(HeadsConfig):
    """How queries, keys and values are made from x, in attention and in what takes its place."""

    key_heads: int | None = None  # as many as heads if none; fewer are shared by neighbouring heads
    rope_base: float | None = 10000.0  # none: no positions
    rotary: float = 1.0  # share of a head's channels that turn
    rope_factor: float = 1.0  # frequencies are divided by it; see `Stretch`
    rope_original: int | None = None  # only those with few turns in so many tokens are
    qk_norm: bool = False  # an RMS norm per head on queries and keys
    head_width: int | None = None  # width / heads if none
    bias: bool = False  # of queries, keys and values
    output_bias: bool = False

    def __post_init__(self) -> None:
        if self.head_width is None:
            super().__post_init__()
            object.__setattr__(self, "head_width", self.width // self.heads)
        elif min(self.heads, self.head_width) < 1:
            raise ConfigError(
                f"heads={self.heads}, head_width={self.head_width}, wanted at least 1 of each."
            )
        groups = self.heads if self.key_heads is None else self.key_heads
        if groups < 1 or self.heads % groups:
            raise ConfigError(
                f"key_heads={groups} must divide heads={self.heads}. Change one of them, or leave out key_heads."
            )
        if self.rope_base is not None and self.rope_base <= 0:
            raise ConfigError(
                f"rope_base={self.rope_base}, wanted more than 0, or none for no positions."
            )
        if not 0 < self.rotary <= 1 or self.rope_factor <= 0:
            raise ConfigError(
                f"rotary={self.rotary}, rope_factor={self.rope_factor}, wanted a share above 0 and at most 1, "
                "and a factor above 0."
            )
        if self.rope_base is not None and self.turning % 2:
            raise ConfigError(
                f"width={self.width} and heads={self.heads} make heads with {self.turning} channels that turn, "
                "which rotary positions cannot pair. Change the heads, or set rope_base=none."
            )

    @property
    def turning(self) -> int:
        """Channels of each head that turn with the position."""
        return int(self.rotary * (self.head_width or 0))

    @property
    def groups(self) -> int:
        return self.key_heads or self.heads


class ProjectionMixer(Mixer):
    """Queries, keys and values of a pretrained attention layer under their names there, and what turns them."""

    def __init__(self, config: ProjectionConfig) -> None:
        super().__init__(config)
        width, bias = config.width, config.bias
        queries, keys = (n * config.head_width for n in (config.heads, config.groups))
        self.query = nn.Linear(width, queries, bias=bias)
        self.key = nn.Linear(width, keys, bias=bias)
        self.value = nn.Linear(width, keys, bias=bias)
        self.query_norm = RMSNorm(config.head_width, eps=1e-6) if config.qk_norm else None
        self.key_norm = RMSNorm(config.head_width, eps=1e-6) if config.qk_norm else None
        self.output = nn.Linear(queries, width, bias=config.output_bias)
        self.stretch = Stretch(config.rope_factor, config.rope_original)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q [B, T, H, K], k and v [B, T, G, K] of x, before they turn."""
        c = self.config
        q = self.query(x).unflatten(-1, (c.heads, -1))
        k = self.key(x).unflatten(-1, (c.groups, -1))
        v = self.value(x).unflatten(-1, (c.groups, -1))
        if self.query_norm is not None and self.key_norm is not None:
            q, k = self.query_norm(q), self.key_norm(k)
        return q, k, v

    def turn(self, q: Tensor, k: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Both turned by their positions, [T] or [B, T]."""
        c = self.config
        if c.rope_base is None:
            return q, k
        options = {"channels": c.turning, "stretch": self.stretch}
        return (
            rotate(q, positions, c.rope_base, **options),
            rotate(k, positions, c.rope_base, **options),
        )


def lengths_of(x: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """How many tokens of x [B, T, ...] each text has, [B], or [N] where texts are packed."""
    if cu_seqlens is None:
        return torch.full((x.shape[0],), x.shape[1], dtype=torch.long, device=x.device)
    return Packing("positions", cu_seqlens, x).lengths.to(x.device)


def positions_of(x: Tensor, seen: Tensor | None = None, cu_seqlens: Tensor | None = None) -> Tensor:
    """The place of every token of x in its text, [T] or [B, T], after `seen` [B] earlier ones."""
    places = torch.arange(x.shape[1], device=x.device)
    if cu_seqlens is None:
        return places if seen is None else seen.unsqueeze(-1) + places
    lengths = lengths_of(x, cu_seqlens)
    shift = lengths - lengths.cumsum(0) if seen is None else seen + lengths - lengths.cumsum(0)
    return (places + torch.repeat_interleave(shift, lengths)).unsqueeze(0)
