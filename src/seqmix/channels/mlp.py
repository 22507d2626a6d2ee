"""Multi-layer perceptron with one hidden layer: y = W_o f(W_u x + b_u) + b_o, f = GELU, ReLU or SiLU.

Vaswani et al. 2017 (arXiv:1706.03762), section 3.3; without biases by default, as in later models.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from seqmix.channels._channel import ACTIVATIONS, Channel, ChannelConfig, check_activation


@dataclass(frozen=True, kw_only=True)
class Config(ChannelConfig):
    activation: str = "gelu"
    bias: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_activation("mlp", self.activation)


class MultiLayerPerceptron(Channel):
    """Two matrices."""

    Config = Config
    examples: ClassVar = {
        "relu": {"activation": "relu"},
        "silu": {"activation": "silu"},
        "biases": {"activation": "gelu_tanh", "bias": True},
    }

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.up = nn.Linear(config.width, config.hidden, bias=config.bias)
        self.output = nn.Linear(config.hidden, config.width, bias=config.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.output(ACTIVATIONS[self.config.activation](self.up(x)))


CHANNEL = MultiLayerPerceptron
