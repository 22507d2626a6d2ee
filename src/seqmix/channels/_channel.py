"""What a channel mixer is: x [B, T, D] to y [B, T, D], every token on its own."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from seqmix.core.config import Config
from seqmix.core.cost import Cost, matmul_cost


@dataclass(frozen=True, kw_only=True)
class ChannelConfig(Config):
    """Fields that every channel mixer has."""

    width: int = 64
    expansion: float = 4.0  # hidden width as a multiple of the width

    @property
    def hidden(self) -> int:
        return max(1, round(self.width * self.expansion))


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
            if isinstance(module, nn.Linear):
                total += matmul_cost(length, module.in_features, module.out_features)
        return total

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.config.to_dict().items())
