"""Gated linear unit: y = W_o (f(W_g x) * W_u x), f = SiLU (SwiGLU), GELU (GEGLU), ReLU (ReGLU), sigmoid (GLU).

Shazeer 2020 (arXiv:2002.05202), eq. 5-6. An expansion of 8/3 gives the parameters of a plain MLP with 4.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from seqmix.channels._channel import ACTIVATIONS, Channel, ChannelConfig, check_activation


@dataclass(frozen=True, kw_only=True)
class Config(ChannelConfig):
    expansion: float = 8 / 3
    activation: str = "silu"
    bias: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_activation("glu", self.activation)


class GatedLinearUnit(Channel):
    """Three matrices; the parameters of an MLP at 2/3 of its expansion."""

    Config = Config
    examples: ClassVar = {
        **{name: {"activation": name} for name in ("gelu", "relu", "sigmoid")},
        "biases": {"bias": True},
    }

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.gate = nn.Linear(config.width, config.hidden, bias=config.bias)
        self.up = nn.Linear(config.width, config.hidden, bias=config.bias)
        self.output = nn.Linear(config.hidden, config.width, bias=config.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.output(ACTIVATIONS[self.config.activation](self.gate(x)) * self.up(x))


CHANNEL = GatedLinearUnit
