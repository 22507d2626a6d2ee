"""RWKV-4 channel mixing: a squared ReLU with a gate, on every token blended with the one before.

    x^c_t = mu_c * x_t + (1 - mu_c) * x_{t-1}   for c = k, r
    y_t = sigmoid(W_r x^r_t) * W_v max(0, W_k x^k_t)^2

It looks one token back, so it is a token mixer here, with no channel mixer beside it (`rwkv4_channel/none`).
Peng et al. 2023 (arXiv:2305.13048), section 3.1 and eq. 19-21.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from seqmix.core.errors import ConfigError
from seqmix.core.state import State
from seqmix.mixers._mixer import Mixer, MixerConfig
from seqmix.mixers._token_shift import token_before


@dataclass(frozen=True, kw_only=True)
class Config(MixerConfig):
    hidden: int | None = None  # four times the width if none

    def __post_init__(self) -> None:
        if self.hidden is None:
            object.__setattr__(self, "hidden", 4 * self.width)
        elif self.hidden < 1:
            raise ConfigError(f"rwkv4_channel: hidden={self.hidden}, wanted at least 1, or none.")


class RWKV4Channel(Mixer):
    """Three matrices; state: the token before, [B, 1, D]."""

    Config = Config
    no_weight_decay: ClassVar = ("mix",)
    examples: ClassVar = {"narrow": {"hidden": 24}}

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        width = config.width
        place = torch.arange(width) / width
        self.mix = nn.Parameter(place.sqrt().repeat(2, 1))  # the paper's, for the middle layer
        self.key = nn.Linear(width, config.hidden, bias=False)
        self.receptance = nn.Linear(width, width, bias=False)
        self.output = nn.Linear(config.hidden, width, bias=False)

    def initial_state(self, batch: int, like: Tensor) -> State:
        return {"previous": like.new_zeros(batch, 1, self.config.width).float()}

    def forward(
        self, x: Tensor, state: State = None, *, cu_seqlens: Tensor | None = None
    ) -> tuple[Tensor, State]:
        before, last = token_before(x, None if state is None else state["previous"], cu_seqlens)
        for_key, for_gate = before + self.mix[:, None, None].to(x.dtype) * (x - before)
        value = self.output(F.relu(self.key(for_key)).square())
        return self.receptance(for_gate).sigmoid() * value, {"previous": last}


MIXER = RWKV4Channel
