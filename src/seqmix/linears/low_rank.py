"""A weight of low rank: y = U (V x) + b, with U [outputs, rank] and V [rank, inputs].

It has rank * (inputs + outputs) entries and as many products per token, instead of inputs * outputs.
"""

from __future__ import annotations

from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from seqmix.core.cost import Cost, matmul_cost
from seqmix.core.errors import RangeError
from seqmix.linears._linear import Replacement


class LowRankLinear(Replacement):
    """Two thin matrices in the place of one: `down` is V, `up` is U."""

    def __init__(self, down: Tensor, up: Tensor, bias: Tensor | None = None) -> None:
        super().__init__()
        self.rank, self.in_features = down.shape
        self.out_features = up.shape[0]
        self.down, self.up = nn.Parameter(down), nn.Parameter(up)
        self.bias = None if bias is None else nn.Parameter(bias)

    @classmethod
    def empty(cls, dense: nn.Linear, *, rank: int) -> Self:
        """Zeros, in the place of `dense`; raises `RangeError` for a rank that no matrix of its shape has."""
        weight = dense.weight
        if not 1 <= rank <= min(weight.shape):
            raise RangeError(
                f"rank={rank} of a weight {list(weight.shape)}, wanted 1 to {min(weight.shape)}."
            )
        outputs, inputs = weight.shape
        bias = None if dense.bias is None else torch.zeros_like(dense.bias)
        return cls(weight.new_zeros(rank, inputs), weight.new_zeros(outputs, rank), bias)

    @property
    def options(self) -> dict[str, Any]:
        return {"rank": self.rank}

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.linear(x, self.down), self.up, self.bias)

    def to_dense(self) -> nn.Linear:
        dense = nn.Linear(
            self.in_features,
            self.out_features,
            bias=self.bias is not None,
            device=self.up.device,
            dtype=self.up.dtype,
        )
        with torch.no_grad():
            dense.weight.copy_(self.up @ self.down)
            if self.bias is not None:
                dense.bias.copy_(self.bias)
        return dense

    def cost(self, length: int) -> Cost:
        first = matmul_cost(length, self.in_features, self.rank)
        return first + matmul_cost(length, self.rank, self.out_features)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, rank={self.rank}, bias={self.bias is not None}"


LINEAR = LowRankLinear
