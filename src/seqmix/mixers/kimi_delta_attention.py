"""Kimi Delta Attention: the gated delta rule with a decay of its own for every key dimension.

    S <- diag(exp(g_t)) S_{t-1},   S_t = S + beta_t k_t (v_t - S^T k_t)^T
    y_t = W_o (norm(S_t^T q_t) * sigmoid(W_2 W_1 x_t + b))

g_t = -exp(A_log) softplus(U_2 U_1 x_t + dt_bias), A_log per head; q, k, v as in DeltaNet.
Kimi Team 2025 (arXiv:2510.26692), section 3 and eq. 1; both gates have the rank of a head's width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from seqmix.core.errors import ConfigError
from seqmix.mixers._delta import DecayRate, DeltaConfig, DeltaMixer


@dataclass(frozen=True, kw_only=True)
class Config(DeltaConfig):
    gate_rank: int | None = (
        None  # of the decay and of the output gate; the value width of a head if none
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.gate_rank is not None and self.gate_rank < 1:
            raise ConfigError(f"gate_rank={self.gate_rank}, wanted at least 1, or none.")


class KimiDeltaAttention(DeltaMixer):
    """Linear time; state [B, H, K, V] and the convolution's history."""

    Config = Config
    examples: ClassVar = {
        "wide_values": {"value_expansion": 1.5, "gate_rank": 4},
        "negative_eigenvalues": {"negative_eigenvalues": True},
    }

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        rank = config.gate_rank or config.value_width
        keys, values = config.heads * config.key_width, config.heads * config.value_width
        self.decay = nn.Sequential(
            nn.Linear(config.width, rank, bias=False), nn.Linear(rank, keys, bias=False)
        )
        self.decay_rate = DecayRate(config.heads, config.key_width)
        self.gate = nn.Sequential(
            nn.Linear(config.width, rank, bias=False), nn.Linear(rank, values)
        )

    def log_decay(self, x: Tensor) -> Tensor:
        return self.decay_rate(self.decay(x).unflatten(-1, (self.config.heads, -1)))

    def read_out(self, o: Tensor, x: Tensor) -> Tensor:
        return self.norm(o).flatten(-2) * self.gate(x).sigmoid()


MIXER = KimiDeltaAttention
