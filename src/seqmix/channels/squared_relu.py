"""Squared ReLU: y = W_o max(0, W_u x)^2, the perceptron that a search over language models found.

So et al. 2021 (arXiv:2109.08668), section 4.1 (Primer).
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from seqmix.channels._channel import Channel, ChannelConfig


class SquaredReLU(Channel):
    """Two matrices."""

    Config = ChannelConfig

    def __init__(self, config: ChannelConfig) -> None:
        super().__init__(config)
        self.up = nn.Linear(config.width, config.hidden, bias=False)
        self.output = nn.Linear(config.hidden, config.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.output(F.relu(self.up(x)).square())


CHANNEL = SquaredReLU
