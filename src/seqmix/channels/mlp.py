"""Multi-layer perceptron with one hidden layer: y = W_o f(W_u x), f = GELU, ReLU or SiLU.

Vaswani et al. 2017 (arXiv:1706.03762), section 3.3; without biases, as in later models.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from seqmix.channels._channel import Channel, ChannelConfig
from seqmix.core.errors import ConfigError

ACTIVATIONS = {"gelu": F.gelu, "relu": F.relu, "silu": F.silu}


@dataclass(frozen=True, kw_only=True)
class Config(ChannelConfig):
    activation: str = "gelu"

    def __post_init__(self) -> None:
        if self.activation not in ACTIVATIONS:
            raise ConfigError(
                f"mlp: activation={self.activation!r}, wanted one of {', '.join(ACTIVATIONS)}."
            )


class MultiLayerPerceptron(Channel):
    """Two matrices."""

    Config = Config
    examples: ClassVar = {"relu": {"activation": "relu"}, "silu": {"activation": "silu"}}

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.up = nn.Linear(config.width, config.hidden, bias=False)
        self.output = nn.Linear(config.hidden, config.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.output(ACTIVATIONS[self.config.activation](self.up(x)))


CHANNEL = MultiLayerPerceptron
