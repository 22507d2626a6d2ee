"""Gated short convolution: a data gate on either side of a causal convolution over a few tokens.

    [b_t, c_t, v_t] = W_i x_t,   y_t = W_o (c_t * conv(b * v)_t)

The cheapest mixer there is: it sees `size` tokens only, and hybrids use it between layers that see far.
Liquid AI 2025 (arXiv:2511.23404, LFM2), section 2; the gates as in H3, Fu et al. 2022 (arXiv:2212.14052).
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from seqmix.core.errors import ConfigError
from seqmix.core.state import State
from seqmix.core.tree import Tree
from seqmix.layers.convolution import ShortConvolution
from seqmix.mixers._mixer import Mixer, MixerConfig
from seqmix.ops import Case


@dataclass(frozen=True, kw_only=True)
class Config(MixerConfig):
    size: int = 3  # tokens that the convolution sees, the current one included

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ConfigError(f"short_convolution: size={self.size}, wanted at least 1.")


class GatedShortConvolution(Mixer):
    """Linear time; state [B, W-1, D]."""

    Config = Config
    operator = "short_convolution"

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        width = config.width
        self.input = nn.Linear(width, 3 * width, bias=False)
        self.convolution = ShortConvolution(width, config.size, activation=None)
        self.output = nn.Linear(width, width, bias=False)

    def initial_state(self, batch: int, like: Tensor) -> State:
        return {"convolution": self.convolution.initial_state(batch, like)}

    def forward(
        self, x: Tensor, state: State = None, *, cu_seqlens: Tensor | None = None
    ) -> tuple[Tensor, State]:
        before, after, value = self.input(x).chunk(3, dim=-1)
        history = None if state is None else state["convolution"]
        y, history = self.convolution(before * value, history, cu_seqlens)
        return self.output(after * y), {"convolution": history}

    def read_tree(self, x: Tensor, state: State, tree: Tree) -> tuple[Tensor, State]:
        before, after, value = self.input(x).chunk(3, dim=-1)
        history = None if state is None else state["convolution"]
        y, history = self.convolution.read_tree(before * value, history, tree)
        return self.output(after * y), {"convolution": history}

    def operator_case(self, tokens: int, context: int) -> Case:
        return Case("mixer", {"B": 1, "T": tokens, "D": self.config.width, "W": self.config.size})


MIXER = GatedShortConvolution
