"""The head of a model whose embedding table is kept in another way: logits = E x, with the table E used twice."""

from __future__ import annotations

from typing import Any, Self

from torch import Tensor, nn

from seqmix.core.cost import Cost
from seqmix.linears._linear import Replacement


class Tied(Replacement):
    """No weights of its own: `attach` finds the embedding, whose `product` multiplies by the table."""

    _table: tuple[Any, ...] = ()  # in a tuple, so that the table is not a child of two modules

    @classmethod
    def empty(cls, dense: nn.Module) -> Self:
        return cls()

    @property
    def options(self) -> dict[str, Any]:
        return {}

    def attach(self, model: nn.Module) -> None:
        self._table = (model.get_submodule("embedding"),)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self._table[0].product(x)
        return y

    def to_dense(self) -> nn.Linear:
        weight = self._table[0].to_dense().weight.detach()
        dense = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device=weight.device)
        dense.weight.data.copy_(weight)
        return dense

    def cost(self, length: int) -> Cost:
        cost: Cost = self._table[0].product_cost(length)
        return cost


LINEAR = Tied
