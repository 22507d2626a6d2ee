"""What a channel mixer is: x [B, T, D] to y [B, T, D], every token on its own."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from seqmix.core.config import Config
from seqmix.core.cost import Cost
from seqmix.core.errors import ConfigError
from seqmix.linears import linear_cost

ACTIVATIONS = {
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
    "sigmoid": F.sigmoid,
    "silu": F.silu,
}


def check_activation(owner: str, activation: str) -> None:
    """Raises `ConfigError` for a name that is no activation."""
    if activation not in ACTIVATIONS:
        raise ConfigError(
            f"{owner}: activation={activation!r}, wanted one of {', '.join(ACTIVATIONS)}."
        )


@dataclass(frozen=True, kw_only=True)
class ChannelConfig(Config):
    """Fields that every channel mixer has."""

    width: int = 64
    expansion: float = 4.0  # hidden width as a multiple of the width
    hidden: int | None = None  # the hidden width itself, instead

    def __post_init__(self) -> None:
        if self.hidden is None:
            object.__setattr__(self, "hidden", max(1, round(self.width * self.expansion)))
        elif self.hidden < 1:
            raise ConfigError(f"hidden={self.hidden}, wanted at least 1.")


class Channel(nn.Module, ABC):
    """A channel mixer; it keeps no state.

    `exceptions` and `examples` are those of `Mixer`.
    """

    Config: ClassVar[type[ChannelConfig]] = ChannelConfig
    config: Any  # an instance of `Config`
    exceptions: ClassVar[Mapping[str, str]] = {}
    examples: ClassVar[Mapping[str, Mapping[str, Any]]] = {}

    def __init__(self, config: ChannelConfig) -> None:
        super().__init__()
        self.config = config

    @abstractmethod
    def forward(self, x: Tensor) -> Tensor:
        """x [B, T, D] to y [B, T, D]."""

    def cost(self, length: int) -> Cost:
        """Predicted cost of `length` tokens in float32: every linear layer as a matrix product."""
        total = Cost()
        for module in self.modules():
            total += linear_cost(module, length)
        return total

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.config.to_dict().items())
