"""Gated linear attention: linear attention with a data-dependent decay per key dimension.

    g_t = logsigmoid(W_2 W_1 x_t + b) / temperature,   S_t = exp(g_t) S_{t-1} + k_t v_t^T,
    y_t = W_o (norm(S_t^T q_t) * silu(W_r x_t))

Yang et al. 2023 (arXiv:2312.06635), section 4.4: half-width keys, low-rank gate, temperature 16.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from seqmix.core.numerics import widen
from seqmix.core.state import State
from seqmix.core.tree import Tree
from seqmix.layers.norm import RMSNorm
from seqmix.mixers._mixer import HeadsConfig, Mixer
from seqmix.ops import Case
from seqmix.ops.linear_attention import linear_attention, linear_attention_on_tree


@dataclass(frozen=True, kw_only=True)
class Config(HeadsConfig):
    key_ratio: float = 0.5  # key width of all heads as a share of the width
    gate_rank: int = 16
    temperature: float = 16.0  # larger keeps decays nearer to 1

    @property
    def key_width(self) -> int:
        return max(1, int(self.width * self.key_ratio) // self.heads)


class GatedLinearAttention(Mixer):
    """Linear time; state [B, H, K, V]."""

    Config = Config
    operator = "linear_attention"

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        width, keys = config.width, config.key_width * config.heads
        self.query = nn.Linear(width, keys, bias=False)
        self.key = nn.Linear(width, keys, bias=False)
        self.value = nn.Linear(width, width, bias=False)
        self.decay = nn.Sequential(
            nn.Linear(width, config.gate_rank, bias=False), nn.Linear(config.gate_rank, keys)
        )
        self.gate = nn.Linear(width, width, bias=False)
        self.norm = RMSNorm(config.head_width, eps=1e-5)
        self.output = nn.Linear(width, width, bias=False)

    def initial_state(self, batch: int, like: Tensor) -> State:
        c = self.config
        shape = (batch, c.heads, c.key_width, c.head_width)
        return {"recurrent": like.new_zeros(shape).float()}

    def operands(
        self, x: Tensor, state: State = None, cu_seqlens: Tensor | None = None
    ) -> tuple[dict[str, Any], State]:
        heads = (self.config.heads, -1)
        decay = F.logsigmoid(widen(self.decay(x))[0]) / self.config.temperature
        return {
            "q": self.query(x).unflatten(-1, heads),
            "k": self.key(x).unflatten(-1, heads),
            "v": self.value(x).unflatten(-1, heads),
            "g": decay.unflatten(-1, heads),
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
        return self._read_out(o, x), {"recurrent": recurrent}

    def read_tree(self, x: Tensor, state: State, tree: Tree) -> tuple[Tensor, State]:
        arguments, _ = self.operands(x)
        before = None if state is None else state["recurrent"]
        o, recurrent = linear_attention_on_tree(tree, **arguments, initial_state=before)
        return self._read_out(o, x), {"recurrent": recurrent}

    def _read_out(self, o: Tensor, x: Tensor) -> Tensor:
        y: Tensor = self.output(self.norm(o).flatten(-2) * F.silu(self.gate(x)))
        return y

    def operator_case(self, tokens: int, context: int) -> Case:
        c = self.config
        sizes = {"B": 1, "T": tokens, "H": c.heads, "K": c.key_width, "V": c.head_width}
        return Case("mixer", sizes, {"gate": "vector"})


MIXER = GatedLinearAttention
