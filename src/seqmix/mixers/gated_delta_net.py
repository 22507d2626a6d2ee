"""Gated DeltaNet: the delta rule in a memory that also fades.

    S <- exp(g_t) S_{t-1},   S_t = S + beta_t k_t (v_t - S^T k_t)^T,   y_t = W_o (norm(S_t^T q_t) * silu(W_r x_t))

g_t = -exp(A_log) softplus(w_a x_t + dt_bias) per head; q, k, v as in DeltaNet.
Yang et al. 2024 (arXiv:2412.06464), section 3; keys of 3/4 of the width and values twice as wide, which
makes 6 width**2 parameters.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from seqmix.mixers._delta import DecayRate, DeltaConfig, DeltaMixer


@dataclass(frozen=True, kw_only=True)
class Config(DeltaConfig):
    key_ratio: float = 0.75
    value_expansion: float = 2.0


class GatedDeltaNet(DeltaMixer):
    """Linear time; state [B, H, K, V] and the convolution's history."""

    Config = Config
    examples: ClassVar = {"negative_eigenvalues": {"negative_eigenvalues": True}}

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.decay = nn.Linear(config.width, config.heads, bias=False)
        self.decay_rate = DecayRate(config.heads)
        self.gate = nn.Linear(config.width, config.heads * config.value_width, bias=False)

    def log_decay(self, x: Tensor) -> Tensor:
        return self.decay_rate(self.decay(x))

    def read_out(self, o: Tensor, x: Tensor) -> Tensor:
        return self.norm(o).flatten(-2) * F.silu(self.gate(x))


MIXER = GatedDeltaNet
