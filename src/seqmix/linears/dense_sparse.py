"""A weight whose rows stand in blocks, each a small dense basis times a sparse matrix: W_b = D_b S_b.

    W [outputs, inputs] = blocks of `height` rows,   D_b [height, atoms],   S_b [atoms, inputs]

Every column of S_b has the same number s of entries, so a column of a block is a sum of s of its atoms. An entry is
kept as a value and a number of eight bits. Chand et al. 2023 (arXiv:2312.13211).
"""

from __future__ import annotations

from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from seqmix.core.cost import Cost, matmul_cost
from seqmix.core.errors import RangeError
from seqmix.linears._linear import Replacement

MOST_ATOMS = 256  # that a number of eight bits tells apart


class DenseSparseLinear(Replacement):
    """`basis` [blocks, height, atoms], `values` and `chosen` [blocks, s, inputs]: which atoms, and how much of each.

    The weight is put together at every call, which costs as much as `atoms` tokens; what is saved is memory.
    """

    chosen: Tensor

    def __init__(
        self, basis: Tensor, values: Tensor, chosen: Tensor, bias: Tensor | None = None
    ) -> None:
        super().__init__()
        blocks, self.height, self.atoms = basis.shape
        self.entries, self.in_features = values.shape[1:]
        self.out_features = blocks * self.height
        self.basis, self.values = nn.Parameter(basis), nn.Parameter(values)
        self.register_buffer("chosen", chosen.to(torch.uint8))
        self.bias = None if bias is None else nn.Parameter(bias)

    @classmethod
    def empty(cls, dense: nn.Linear, *, height: int, atoms: int, entries: int) -> Self:
        """Zeros, in the place of `dense`; raises `RangeError` for sizes that do not fit its weight."""
        weight = dense.weight
        outputs, inputs = weight.shape
        if height < 1 or outputs % height or not 1 <= entries <= atoms <= MOST_ATOMS:
            raise RangeError(
                f"height={height}, atoms={atoms}, entries={entries} of a weight {list(weight.shape)}, wanted a height "
                f"that divides {outputs}, and 1 <= entries <= atoms <= {MOST_ATOMS}."
            )
        blocks = outputs // height
        return cls(
            weight.new_zeros(blocks, height, atoms),
            weight.new_zeros(blocks, entries, inputs),
            torch.zeros(blocks, entries, inputs, dtype=torch.uint8, device=weight.device),
            None if dense.bias is None else torch.zeros_like(dense.bias),
        )

    @property
    def options(self) -> dict[str, Any]:
        return {"height": self.height, "atoms": self.atoms, "entries": self.entries}

    @property
    def weight(self) -> Tensor:
        """W [outputs, inputs]."""
        shape = self.basis.shape[0], self.atoms, self.in_features
        sparse = self.values.new_zeros(shape).scatter_add(1, self.chosen.long(), self.values)
        return (self.basis @ sparse).flatten(0, 1)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)

    def to_dense(self) -> nn.Linear:
        weight = self.weight.detach()
        dense = nn.Linear(
            self.in_features,
            self.out_features,
            bias=self.bias is not None,
            device=weight.device,
            dtype=weight.dtype,
        )
        with torch.no_grad():
            dense.weight.copy_(weight)
            if self.bias is not None:
                dense.bias.copy_(self.bias)
        return dense

    def cost(self, length: int) -> Cost:
        """Of the product that is computed here: the weight, then `length` tokens."""
        blocks = self.basis.shape[0]
        made = matmul_cost(self.height, self.atoms, self.in_features) * blocks
        return made + matmul_cost(length, self.in_features, self.out_features)

    def extra_repr(self) -> str:
        sizes = f"height={self.height}, atoms={self.atoms}, entries={self.entries}"
        return f"{self.in_features}, {self.out_features}, {sizes}, bias={self.bias is not None}"


LINEAR = DenseSparseLinear
