"""Layers kept in less than a byte per weight that multiply as one of `seqmix.linears.int8`."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

from torch import Tensor, nn

from seqmix.core.cost import Cost
from seqmix.linears._linear import Replacement
from seqmix.linears.int8 import Int8


class Expanded(Replacement):
    """Whole numbers of 8 bits, `whole`, times a `scale` per output; they are made at the first call and never saved."""

    scale: Tensor
    bias: Tensor | None
    role: str = "linear"
    _expanded: Any = None

    @abstractmethod
    def whole(self) -> Tensor:
        """The whole numbers [O, I], in int8."""

    def expanded(self) -> Int8:
        """The same layer with a byte per weight, of the tensors as they are now."""
        key = tuple((tensor.data_ptr(), tensor._version) for tensor in self.buffers(recurse=False))
        if self._expanded is None or self._expanded[0] != key:
            layer = Int8(self.whole(), self.scale, self.bias, role=self.role)
            self._expanded = (key, layer)
        made: Int8 = self._expanded[1]
        return made

    def to_dense(self) -> nn.Linear | nn.Embedding:
        return self.expanded().to_dense()

    def cost(self, length: int) -> Cost:
        """That of the layer which it becomes: what it multiplies with is a whole byte per weight."""
        return self.expanded().cost(length)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_expanded": None}  # type: ignore[misc]
