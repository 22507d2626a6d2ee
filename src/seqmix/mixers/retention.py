"""Retention: linear attention whose heads forget at fixed rates, with rotated queries and keys.

    S_t = (1 - 2^(-5-h)) R S_{t-1} + k_t v_t^T,   y_t = W_o (norm(S_t^T q_t) * silu(W_g x_t))

R turns the dimensions pairwise, by angles that fall geometrically from 1 to 1/10000. It is applied to
queries and keys according to their places, as rotary positions are; the state is kept in the frame of the
last token, so that it holds no position and any text may go on from it.
Sun et al. 2023 (arXiv:2307.08621), eq. 5-8: values of twice the width; without the growth of xPos, which
the decay of the heads makes needless.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from seqmix.core.errors import ConfigError
from seqmix.core.numerics import widen
from seqmix.core.state import State
from seqmix.layers.norm import RMSNorm
from seqmix.mixers._mixer import HeadsConfig, Mixer
from seqmix.ops import Case
from seqmix.ops._packing import Packing, in_rows
from seqmix.ops.linear_attention import linear_attention


@dataclass(frozen=True, kw_only=True)
class Config(HeadsConfig):
    value_ratio: float = 2.0  # value width of all heads as a multiple of the width
    rotary: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rotary and self.head_width % 2:
            raise ConfigError(
                f"retention: width={self.width} over heads={self.heads} gives heads of odd width "
                f"{self.head_width}, which cannot be turned in pairs. Change one of them, or pass rotary=False."
            )

    @property
    def value_width(self) -> int:
        return max(1, round(self.head_width * self.value_ratio))


class Retention(Mixer):
    """Linear time; state [B, H, K, V]."""

    Config = Config
    operator = "linear_attention"
    examples: ClassVar = {"not_turned": {"rotary": False, "value_ratio": 1.0}}

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        width, values = config.width, config.value_width * config.heads
        self.query = nn.Linear(width, width, bias=False)
        self.key = nn.Linear(width, width, bias=False)
        self.value = nn.Linear(width, values, bias=False)
        self.gate = nn.Linear(width, values, bias=False)
        self.norm = RMSNorm(config.value_width, eps=1e-5)
        self.output = nn.Linear(values, width, bias=False)

    def initial_state(self, batch: int, like: Tensor) -> State:
        c = self.config
        shape = (batch, c.heads, c.head_width, c.value_width)
        return {"recurrent": like.new_zeros(shape).float()}

    def operands(
        self, x: Tensor, state: State = None, cu_seqlens: Tensor | None = None
    ) -> tuple[dict[str, Any], State]:
        heads = (self.config.heads, -1)
        q, k = self.query(x).unflatten(-1, heads), self.key(x).unflatten(-1, heads)
        if self.config.rotary:
            angles = turning_angles(self.config.head_width, x.device)
            angles = places(x, cu_seqlens)[:, None, None] * angles  # [T, 1, K/2]
            q, k = turn(q, angles), turn(k, angles)
        head = torch.arange(self.config.heads, device=x.device)
        decay = torch.log1p(-torch.exp2(-5.0 - head))
        return {
            "q": q,
            "k": k,
            "v": self.value(x).unflatten(-1, heads),
            "g": decay.expand(*x.shape[:2], -1),
        }, None

    def forward(
        self, x: Tensor, state: State = None, *, cu_seqlens: Tensor | None = None
    ) -> tuple[Tensor, State]:
        arguments, _ = self.operands(x, state, cu_seqlens)
        o, recurrent = linear_attention(
            **arguments,
            initial_state=None if state is None else state["recurrent"],
            output_final_state=True,
            cu_seqlens=cu_seqlens,
        )
        y = self.output(self.norm(o).flatten(-2) * F.silu(self.gate(x)))
        return y, {"recurrent": self._to_last_token(recurrent, x, cu_seqlens)}

    def _to_last_token(self, recurrent: Tensor, x: Tensor, cu_seqlens: Tensor | None) -> Tensor:
        """The state [B, H, K, V], seen from the last token instead of from the one before the first."""
        if not self.config.rotary:
            return recurrent
        lengths = in_rows("retention", cu_seqlens, x).lengths
        angles = turning_angles(self.config.head_width, x.device)
        angles = lengths[:, None, None, None] * angles  # [B, 1, 1, K/2]
        return turn(recurrent.transpose(-1, -2), -angles).transpose(-1, -2)

    def operator_case(self, tokens: int, context: int) -> Case:
        c = self.config
        sizes = {"B": 1, "T": tokens, "H": c.heads, "K": c.head_width, "V": c.value_width}
        return Case("mixer", sizes, {"gate": "scalar"})


def turning_angles(width: int, device: torch.device) -> Tensor:
    """How far each of the width / 2 pairs of dimensions turns per token, in radians, float64."""
    return 10000.0 ** -torch.linspace(0, 1, width // 2, dtype=torch.float64, device=device)


def places(x: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """The place of every token in its text [T], counted from 1: the state stands at place 0."""
    place = torch.arange(1, x.shape[1] + 1, device=x.device)
    if cu_seqlens is None:
        return place
    lengths = Packing("retention", cu_seqlens, x).lengths
    return place - (lengths.cumsum(0) - lengths).repeat_interleave(lengths)


def turn(x: Tensor, angles: Tensor) -> Tensor:
    """x [..., K] with its pairs (i, i + K/2) turned by `angles [..., K/2]`, which keep double precision.

    Unlike in attention, turns by parts of a text must add up exactly to the turn by the whole.
    """
    (wide,) = widen(x)
    cosine, sine = angles.cos().to(wide.dtype), angles.sin().to(wide.dtype)
    first, second = wide.chunk(2, dim=-1)
    turned = torch.cat([first * cosine - second * sine, second * cosine + first * sine], dim=-1)
    return turned.to(x.dtype)


MIXER = Retention
