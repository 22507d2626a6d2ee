"""DeltaNet: linear attention whose memory replaces what it holds under a key.

    S_t = S_{t-1} + beta_t k_t (v_t - S_{t-1}^T k_t)^T,   y_t = W_o norm(S_t^T q_t),   |q| = |k| = 1

q, k, v come through a short convolution with SiLU, beta_t = sigmoid(w x_t) per head.
Yang et al. 2024 (arXiv:2406.06484), sections 2.2 and 3.3; `negative_eigenvalues`: Grazzi et al. 2024
(arXiv:2411.12537), section 4.3.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from seqmix.mixers._delta import DeltaConfig, DeltaMixer


@dataclass(frozen=True, kw_only=True)
class Config(DeltaConfig):
    pass


class DeltaNet(DeltaMixer):
    """Linear time; state [B, H, K, V] and the convolution's history."""

    Config = Config
    examples: ClassVar = {"negative_eigenvalues": {"negative_eigenvalues": True}}

    def log_decay(self, x: Tensor) -> None:
        return None

    def read_out(self, o: Tensor, x: Tensor) -> Tensor:
        return self.norm(o).flatten(-2)


MIXER = DeltaNet
