"""DeltaProduct: several delta-rule steps per token, so that a transition is a product of Householder matrices.

    S <- exp(g_t) S_{t-1},   then for i = 1 ... n   S <- S + beta_{t,i} k_{t,i} (v_{t,i} - S^T k_{t,i})^T
    y_t = W_o (norm(S^T q_t) * silu(W_r x_t))

Every step has keys, values and strengths of its own. g_t as in Gated DeltaNet, or none.
Siems et al. 2025 (arXiv:2502.10297), section 3. With `negative_eigenvalues`, n steps reach any orthogonal
transition that n reflections make.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from seqmix.core.errors import ConfigError
from seqmix.mixers._delta import DecayRate, DeltaConfig, DeltaMixer


@dataclass(frozen=True, kw_only=True)
class Config(DeltaConfig):
    steps: int = 2  # Householder steps per token
    forget: bool = True  # a decay per head and token; without it this is DeltaProduct ungated

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.steps < 1:
            raise ConfigError(f"delta_product: steps={self.steps}, wanted at least 1.")


class DeltaProduct(DeltaMixer):
    """Linear time, `steps` times the work of Gated DeltaNet; state [B, H, K, V] and the convolution's history."""

    Config = Config
    examples: ClassVar = {
        "three_steps": {"steps": 3, "negative_eigenvalues": True},
        "not_gated": {"forget": False, "negative_eigenvalues": True},
    }

    def __init__(self, config: Config) -> None:
        super().__init__(config, steps=config.steps)
        self.decay = nn.Linear(config.width, config.heads, bias=False) if config.forget else None
        self.decay_rate = DecayRate(config.heads) if config.forget else None
        self.gate = nn.Linear(config.width, config.heads * config.value_width, bias=False)

    def log_decay(self, x: Tensor) -> Tensor | None:
        if self.decay is None or self.decay_rate is None:
            return None
        return self.decay_rate(self.decay(x))

    def read_out(self, o: Tensor, x: Tensor) -> Tensor:
        return self.norm(o).flatten(-2) * F.silu(self.gate(x))


MIXER = DeltaProduct
