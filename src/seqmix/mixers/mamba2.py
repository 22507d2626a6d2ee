"""Mamba-2: a gated block around a state space with one decay per head, computed as attention.

    [z, x', B, C, dt] = W_i x,   [x', B, C] <- silu(conv([x', B, C])),   dt <- softplus(dt + b),   A = -exp(A_log)
    h_t = exp(dt_t A) h_{t-1} + B_t (dt_t x'_t)^T,   y_t = W_o norm((h_t^T C_t + D x'_t) * silu(z_t))

With `negative_eigenvalues` the transition is 2 exp(dt_t A) - 1, which reaches from -1 to 1.
Dao & Gu 2024 (arXiv:2405.21060), section 7; Grazzi et al. 2024 (arXiv:2411.12537), section 4.3.
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
from seqmix.core.tree import Tree
from seqmix.layers.convolution import ShortConvolution
from seqmix.layers.initialization import initial_log_rate, initial_step_bias
from seqmix.layers.norm import RMSNorm
from seqmix.mixers._mixer import Mixer, MixerConfig
from seqmix.ops import Case
from seqmix.ops.state_space_dual import state_space_dual, state_space_dual_on_tree


@dataclass(frozen=True, kw_only=True)
class Config(MixerConfig):
    heads: int = 4
    expansion: float = 2.0  # channels of the state space as a multiple of the width
    state_width: int = 64  # 128 in the paper's language models
    groups: int = 1  # neighbouring heads of a group share B and C
    convolution_size: int = 4
    negative_eigenvalues: bool = False

    def __post_init__(self) -> None:
        for name in ("heads", "groups", "state_width", "convolution_size"):
            if getattr(self, name) < 1:
                raise ConfigError(f"mamba2: {name}={getattr(self, name)}, wanted at least 1.")
        if self.channels < self.heads or self.channels % self.heads:
            raise ConfigError(
                f"mamba2: width={self.width} times expansion={self.expansion} is {self.channels} channels, "
                f"wanted a multiple of heads={self.heads}. Change one of them."
            )
        if self.heads % self.groups:
            raise ConfigError(
                f"mamba2: heads={self.heads} must be a multiple of groups={self.groups}. Change one of them."
            )

    @property
    def channels(self) -> int:
        return round(self.width * self.expansion)


class Mamba2(Mixer):
    """Linear time; state [B, H, N, P] and the convolution's history [B, W-1, E + 2 G N]."""

    Config = Config
    no_weight_decay: ClassVar = ("step_bias", "A_log", "D")
    operator = "state_space_dual"
    examples: ClassVar = {
        "groups": {"heads": 4, "groups": 2},
        "negative_eigenvalues": {"negative_eigenvalues": True},
    }

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        channels, heads = config.channels, config.heads
        mixed = channels + 2 * config.groups * config.state_width
        self.input = nn.Linear(config.width, channels + mixed + heads, bias=False)
        self.convolution = ShortConvolution(mixed, config.convolution_size, bias=True)
        self.step_bias = nn.Parameter(initial_step_bias(heads))
        self.A_log = nn.Parameter(initial_log_rate(heads))
        self.D = nn.Parameter(torch.ones(heads))
        self.norm = RMSNorm(channels // config.groups, eps=1e-5, elementwise_affine=False)
        self.norm_weight = nn.Parameter(torch.ones(channels))
        self.output = nn.Linear(channels, config.width, bias=False)

    def initial_state(self, batch: int, like: Tensor) -> State:
        c = self.config
        shape = (batch, c.heads, c.state_width, c.channels // c.heads)
        return {
            "convolution": self.convolution.initial_state(batch, like),
            "recurrent": like.new_zeros(shape).float(),
        }

    def operands(
        self, x: Tensor, state: State = None, cu_seqlens: Tensor | None = None
    ) -> tuple[dict[str, Any], State]:
        _, mixed, step = self._project(x)
        history = None if state is None else state["convolution"]
        mixed, history = self.convolution(mixed, history, cu_seqlens)
        return self._arguments(mixed, step), {"convolution": history}

    def _project(self, x: Tensor) -> tuple[Tensor, ...]:
        """z, [x', B, C] before the convolution, and dt."""
        c = self.config
        mixed = c.channels + 2 * c.groups * c.state_width
        return self.input(x).split([c.channels, mixed, c.heads], dim=-1)

    def _arguments(self, mixed: Tensor, step: Tensor) -> dict[str, Any]:
        c = self.config
        maps = c.groups * c.state_width
        inner, B, C = mixed.split([c.channels, maps, maps], dim=-1)
        A_log, D, step_bias = widen(self.A_log, self.D, self.step_bias)
        return {
            "x": inner.unflatten(-1, (c.heads, -1)),
            "dt": step,
            "A": -A_log.exp(),
            "B": B.unflatten(-1, (c.groups, -1)),
            "C": C.unflatten(-1, (c.groups, -1)),
            "D": D,
            "dt_bias": step_bias,
            "dt_softplus": True,
            "negative_eigenvalues": c.negative_eigenvalues,
        }

    def forward(
        self, x: Tensor, state: State = None, *, cu_seqlens: Tensor | None = None
    ) -> tuple[Tensor, State]:
        z, mixed, step = self._project(x)
        history, before = (None, None) if state is None else _parts(state)
        mixed, history = self.convolution(mixed, history, cu_seqlens)
        y, recurrent = state_space_dual(
            **self._arguments(mixed, step),
            initial_state=before,
            output_final_state=True,
            cu_seqlens=cu_seqlens,
        )
        return self._read_out(y, z), {"convolution": history, "recurrent": recurrent}

    def read_tree(self, x: Tensor, state: State, tree: Tree) -> tuple[Tensor, State]:
        z, mixed, step = self._project(x)
        history, before = (None, None) if state is None else _parts(state)
        mixed, history = self.convolution.read_tree(mixed, history, tree)
        arguments = self._arguments(mixed, step)
        y, recurrent = state_space_dual_on_tree(tree, **arguments, initial_state=before)
        return self._read_out(y, z), {"convolution": history, "recurrent": recurrent}

    def _read_out(self, y: Tensor, z: Tensor) -> Tensor:
        y = (y.flatten(-2) * F.silu(z)).unflatten(-1, (self.config.groups, -1))
        y = self.norm(y).flatten(-2) * self.norm_weight
        return self.output(y)

    def operator_case(self, tokens: int, context: int) -> Case:
        c = self.config
        sizes = {"B": 1, "T": tokens, "H": c.heads, "G": c.groups, "N": c.state_width}
        return Case("mixer", {**sizes, "P": c.channels // c.heads})


def _parts(state: State) -> tuple[Tensor, Tensor]:
    return state["convolution"], state["recurrent"]


MIXER = Mamba2
