"""Two of every four weights, in 8 bits: W_o,4g+p = scale_o q for the two places p that group g keeps, else 0.

What is kept takes 8 bits per value and 2 for its place: 5 bits per weight of the dense layer, 6.4 times less than
float32. There is no kernel for the pattern on CPUs, so it saves memory on disk and no time: at the first call the layer
becomes one of `seqmix.linears.int8`, which it multiplies with and never saves.
"""

from __future__ import annotations

from typing import Any, Self

import torch
from torch import Tensor, nn

from seqmix.core.cost import Cost
from seqmix.core.errors import ConfigError
from seqmix.linears._linear import Replacement
from seqmix.linears.int8 import Int8, rounded

GROUP, KEPT = 4, 2
PLACES_PER_BYTE = 4


def two_largest(weight: Tensor) -> Tensor:
    """The mask [O, I] of the two largest weights of every four neighbouring inputs."""
    if weight.shape[1] % (GROUP * KEPT):
        raise ConfigError(
            f"two_four: {weight.shape[1]} inputs, wanted a multiple of {GROUP * KEPT}. Leave this layer dense."
        )
    groups = weight.abs().unflatten(1, (-1, GROUP))
    mask = torch.zeros_like(groups, dtype=torch.bool)
    return mask.scatter(2, groups.topk(KEPT, dim=2).indices, True).flatten(1)


class TwoFour(Replacement):
    """values [O, I / 2] in int8, their places [O, I / 8] with four to a byte, and a factor per output."""

    values: Tensor
    places: Tensor
    scale: Tensor
    bias: Tensor | None

    def __init__(
        self, values: Tensor, places: Tensor, scale: Tensor, bias: Tensor | None = None
    ) -> None:
        super().__init__()
        self.out_features, self.in_features = len(values), 2 * values.shape[1]
        self.register_buffer("values", values)
        self.register_buffer("places", places)
        self.register_buffer("scale", scale)
        self.register_buffer("bias", bias)
        self._expanded: Any = None

    @classmethod
    @torch.no_grad()
    def of(cls, dense: nn.Linear, mask: Tensor) -> Self:
        """The weights that `mask` [O, I] keeps, rounded to multiples of each output's largest / 127."""
        codes, scale = rounded(dense.weight * mask)
        place = mask.unflatten(1, (-1, GROUP)).int().topk(KEPT, dim=2).indices.sort(2).values
        values = codes.unflatten(1, (-1, GROUP)).gather(2, place).flatten(1)
        fours = place.flatten(1).to(torch.uint8).unflatten(1, (-1, PLACES_PER_BYTE))
        shifts = 2 * torch.arange(PLACES_PER_BYTE, dtype=torch.uint8, device=fours.device)
        bias = None if dense.bias is None else dense.bias.detach().clone()
        return cls(values, (fours << shifts).sum(2).to(torch.uint8), scale, bias)

    @classmethod
    def empty(cls, dense: nn.Linear) -> Self:
        device, (outputs, inputs) = dense.weight.device, dense.weight.shape
        return cls(
            torch.zeros(outputs, inputs // 2, dtype=torch.int8, device=device),
            torch.zeros(outputs, inputs // 8, dtype=torch.uint8, device=device),
            torch.zeros(outputs, device=device),
            None if dense.bias is None else torch.zeros_like(dense.bias.data),
        )

    @property
    def options(self) -> dict[str, Any]:
        return {}

    def whole(self) -> Tensor:
        """The whole numbers [O, I] with their zeros, in int8."""
        shifts = 2 * torch.arange(PLACES_PER_BYTE, dtype=torch.uint8, device=self.places.device)
        place = ((self.places.unsqueeze(2) >> shifts) & 3).flatten(1).long()
        groups = self.values.new_zeros(self.out_features, self.in_features // GROUP, GROUP)
        by_group = place.unflatten(1, (-1, KEPT)), self.values.unflatten(1, (-1, KEPT))
        return groups.scatter_add(2, *by_group).flatten(1)

    def expanded(self) -> Int8:
        """The same layer with a byte per weight."""
        tensors = (self.values, self.places, self.scale)
        key = tuple((t.data_ptr(), t._version) for t in tensors)
        if self._expanded is None or self._expanded[0] != key:
            self._expanded = (key, Int8(self.whole(), self.scale, self.bias))
        layer: Int8 = self._expanded[1]
        return layer

    def forward(self, x: Tensor) -> Tensor:
        """x [..., inputs] to y [..., outputs]."""
        y: Tensor = self.expanded().product(x)
        return y

    def to_dense(self) -> nn.Module:
        return self.expanded().to_dense()

    def cost(self, length: int) -> Cost:
        """That of the int8 layer which it becomes."""
        return self.expanded().cost(length)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_expanded": None}  # type: ignore[misc]

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}"


LINEAR = TwoFour
