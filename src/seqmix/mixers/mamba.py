"""Mamba: a gated block around a selective state space.

    [u, z] = W_i x,   u <- silu(conv(u)),   [r, B, C] = W_x u,   delta = softplus(W_r r + b),   A = -exp(A_log)
    h_t = exp(delta_t A) h_{t-1} + delta_t u_t B_t,   y_t = W_o ((C_t . h_t + D u_t) * silu(z_t))

With `negative_eigenvalues` the transition is 2 exp(delta_t A) - 1, which reaches from -1 to 1, so that a
state can flip from token to token (parity and other groups can then be tracked).
Gu & Dao 2023 (arXiv:2312.00752), sections 3.4-3.6; Grazzi et al. 2024 (arXiv:2411.12537), section 4.3.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from seqmix.core.errors import ConfigError
from seqmix.core.numerics import widen
from seqmix.core.state import State
from seqmix.layers.convolution import ShortConvolution
from seqmix.layers.initialization import initial_step_bias
from seqmix.mixers._mixer import Mixer, MixerConfig
from seqmix.ops import OPERATORS, Case


@dataclass(frozen=True, kw_only=True)
class Config(MixerConfig):
    expansion: float = 2.0  # channels of the state space as a multiple of the width
    state_width: int = 16
    step_rank: int | None = None  # of the map to step sizes; a sixteenth of the width by default
    convolution_size: int = 4
    negative_eigenvalues: bool = False

    def __post_init__(self) -> None:
        for name in ("state_width", "convolution_size"):
            if getattr(self, name) < 1:
                raise ConfigError(f"mamba: {name}={getattr(self, name)}, wanted at least 1.")
        if self.step_rank is not None and self.step_rank < 1:
            raise ConfigError(f"mamba: step_rank={self.step_rank}, wanted at least 1, or none.")

    @property
    def channels(self) -> int:
        return max(1, round(self.width * self.expansion))

    @property
    def rank(self) -> int:
        return self.step_rank or math.ceil(self.width / 16)


class Mamba(Mixer):
    """Linear time; state [B, E, N] and the convolution's history [B, W-1, E]."""

    Config = Config
    operator = "selective_scan"
    no_weight_decay: ClassVar = ("step_bias", "A_log", "D")
    examples: ClassVar = {"negative_eigenvalues": {"negative_eigenvalues": True}}

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        if config.negative_eigenvalues:
            self.operator = "signed_selective_scan"
        channels, states, rank = config.channels, config.state_width, config.rank
        self.input = nn.Linear(config.width, 2 * channels, bias=False)
        self.convolution = ShortConvolution(channels, config.convolution_size, bias=True)
        self.selection = nn.Linear(channels, rank + 2 * states, bias=False)
        self.step_size = nn.Linear(rank, channels, bias=False)
        self.step_size.keeps_initialisation = True
        nn.init.uniform_(self.step_size.weight, -(rank**-0.5), rank**-0.5)
        self.step_bias = nn.Parameter(initial_step_bias(channels))
        rates = torch.arange(1.0, states + 1).log().repeat(channels, 1)
        self.A_log = nn.Parameter(rates)
        self.D = nn.Parameter(torch.ones(channels))
        self.output = nn.Linear(channels, config.width, bias=False)

    def initial_state(self, batch: int, like: Tensor) -> State:
        shape = (batch, self.config.channels, self.config.state_width)
        return {
            "convolution": self.convolution.initial_state(batch, like),
            "recurrent": like.new_zeros(shape).float(),
        }

    def operands(
        self, x: Tensor, state: State = None, cu_seqlens: Tensor | None = None
    ) -> tuple[dict[str, Any], State]:
        return self._operands(self.input(x).chunk(2, dim=-1)[0], state, cu_seqlens)

    def _operands(
        self, u: Tensor, state: State, cu_seqlens: Tensor | None
    ) -> tuple[dict[str, Any], State]:
        c = self.config
        history = None if state is None else state["convolution"]
        u, history = self.convolution(u, history, cu_seqlens)
        sizes = [c.rank, c.state_width, c.state_width]
        step, B, C = self.selection(u).split(sizes, dim=-1)
        A_log, D, step_bias = widen(self.A_log, self.D, self.step_bias)
        return {
            "u": u,
            "delta": self.step_size(step),
            "A": -A_log.exp(),
            "B": B,
            "C": C,
            "D": D,
            "delta_bias": step_bias,
            "delta_softplus": True,
        }, {"convolution": history}

    def forward(
        self, x: Tensor, state: State = None, *, cu_seqlens: Tensor | None = None
    ) -> tuple[Tensor, State]:
        u, z = self.input(x).chunk(2, dim=-1)
        arguments, before = self._operands(u, state, cu_seqlens)
        y, recurrent = OPERATORS.get(self.operator).function(
            **arguments,
            z=z,
            initial_state=None if state is None else state["recurrent"],
            output_final_state=True,
            cu_seqlens=cu_seqlens,
        )
        return self.output(y), {**before, "recurrent": recurrent}

    def operator_case(self, tokens: int, context: int) -> Case:
        c = self.config
        return Case("mixer", {"B": 1, "T": tokens, "E": c.channels, "N": c.state_width})


MIXER = Mamba
