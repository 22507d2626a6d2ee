"""Two of every four weights, in 8 or 4 bits: W_o,4g+p = scale_o q for the two places p that group g keeps, else 0.

What is kept takes `bits` per value and 2 for its place: 5 bits per weight of the dense layer with 8, 6.4 times less
than float32, and 3 with 4. With `unit=2`, neighbouring pairs stay or go together, two of every four pairs, and share a
place: 2.5 bits with 4, 12.8 times less. That is the pattern of the instructions for 4 bits of GPUs (Nvidia's PTX,
`mma.sp`). There is no kernel for either on CPUs, so it saves memory on disk and no time: at the first call the layer
becomes one of `seqmix.linears.int8`, which it multiplies with and never saves.
"""

from __future__ import annotations

from typing import Any, Self

import torch
from torch import Tensor, nn

from seqmix.core.cost import Cost
from seqmix.core.errors import ConfigError
from seqmix.linears._linear import Replacement
from seqmix.linears.int8 import Int8
from seqmix.ops.int4_matmul import packed, unpacked

GROUP, KEPT = 4, 2
PLACES_PER_BYTE = 4


def two_largest(weight: Tensor, unit: int = 1) -> Tensor:
    """The mask [O, I] of the two largest of every four neighbouring weights, or units of so many weights."""
    if weight.shape[1] % (GROUP * KEPT * unit):
        raise ConfigError(
            f"two_four: {weight.shape[1]} inputs, wanted a multiple of {GROUP * KEPT * unit}. Leave this layer dense."
        )
    groups = weight.abs().unflatten(1, (-1, GROUP, unit)).sum(3)
    mask = torch.zeros_like(groups, dtype=torch.bool)
    mask = mask.scatter(2, groups.topk(KEPT, dim=2).indices, True)
    return mask.flatten(1).repeat_interleave(unit, dim=1)


class TwoFour(Replacement):
    """values [O, I / 2] in int8 or two to a byte, their places four to a byte, and a factor per output."""

    values: Tensor
    places: Tensor
    scale: Tensor
    bias: Tensor | None
    _expanded: Any = None  # of which tensors it was made, and the layer with a byte per weight

    def __init__(
        self,
        values: Tensor,
        places: Tensor,
        scale: Tensor,
        bias: Tensor | None = None,
        *,
        bits: int = 8,
        unit: int = 1,
    ) -> None:
        super().__init__()
        check(bits, unit)
        self.bits, self.unit = bits, unit
        self.out_features = len(values)
        self.in_features = KEPT * PLACES_PER_BYTE * unit * places.shape[1]
        self.register_buffer("values", values)
        self.register_buffer("places", places)
        self.register_buffer("scale", scale)
        self.register_buffer("bias", bias)

    @classmethod
    @torch.no_grad()
    def of(
        cls, dense: nn.Linear, mask: Tensor, codes: Tensor, scale: Tensor, *, bits: int, unit: int
    ) -> Self:
        """In the place of `dense`: scale [O] times whole numbers [O, I] in int8, where the mask [O, I] keeps them."""
        units = mask.unflatten(1, (-1, GROUP, unit))[..., 0]
        place = units.int().topk(KEPT, dim=2).indices.sort(2).values  # [O, groups, KEPT]
        index = place.unsqueeze(3).expand(-1, -1, -1, unit)
        values = codes.unflatten(1, (-1, GROUP, unit)).gather(2, index).flatten(1)
        fours = place.flatten(1).to(torch.uint8).unflatten(1, (-1, PLACES_PER_BYTE))
        shifts = 2 * torch.arange(PLACES_PER_BYTE, dtype=torch.uint8, device=fours.device)
        return cls(
            values if bits == 8 else packed(values),
            (fours << shifts).sum(2).to(torch.uint8),
            scale,
            None if dense.bias is None else dense.bias.detach().clone(),
            bits=bits,
            unit=unit,
        )

    @classmethod
    def empty(cls, dense: nn.Linear, *, bits: int = 8, unit: int = 1) -> Self:
        check(bits, unit)
        device, (outputs, inputs) = dense.weight.device, dense.weight.shape
        columns, kind = (inputs // 2, torch.int8) if bits == 8 else (inputs // 4, torch.uint8)
        places = inputs // (KEPT * PLACES_PER_BYTE * unit)
        return cls(
            torch.zeros(outputs, columns, dtype=kind, device=device),
            torch.zeros(outputs, places, dtype=torch.uint8, device=device),
            torch.zeros(outputs, device=device),
            None if dense.bias is None else torch.zeros_like(dense.bias.data),
            bits=bits,
            unit=unit,
        )

    @property
    def options(self) -> dict[str, Any]:
        return {"bits": self.bits, "unit": self.unit}

    def whole(self) -> Tensor:
        """The whole numbers [O, I] with their zeros, in int8."""
        shifts = 2 * torch.arange(PLACES_PER_BYTE, dtype=torch.uint8, device=self.places.device)
        place = ((self.places.unsqueeze(2) >> shifts) & 3).flatten(1).long()
        values = self.values if self.bits == 8 else unpacked(self.values, self.in_features // 2)
        kept = values.unflatten(1, (-1, KEPT, self.unit))
        index = place.unflatten(1, (-1, KEPT)).unsqueeze(3).expand_as(kept)
        groups = kept.new_zeros(self.out_features, kept.shape[1], GROUP, self.unit)
        return groups.scatter_add(2, index, kept).flatten(1)

    def expanded(self) -> Int8:
        """The same layer with a byte per weight, of the tensors as they are now."""
        key = tuple((tensor.data_ptr(), tensor._version) for tensor in self.buffers(recurse=False))
        if self._expanded is None or self._expanded[0] != key:
            self._expanded = (key, Int8(self.whole(), self.scale, self.bias))
        made: Int8 = self._expanded[1]
        return made

    def forward(self, x: Tensor) -> Tensor:
        """x [..., inputs] to y [..., outputs]."""
        y: Tensor = self.expanded().product(x)
        return y

    def to_dense(self) -> nn.Module:
        return self.expanded().to_dense()

    def cost(self, length: int) -> Cost:
        """That of the layer which it becomes: what it multiplies with is a whole byte per weight."""
        return self.expanded().cost(length)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_expanded": None}  # type: ignore[misc]

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, bits={self.bits}, unit={self.unit}"


def check(bits: int, unit: int) -> None:
    """Raises `ConfigError` for what the layer has no room for."""
    if bits not in (4, 8) or unit not in (1, 2):
        raise ConfigError(
            f"two_four: bits={bits}, unit={unit}, wanted 4 or 8 bits, and a unit of 1 or 2."
        )


LINEAR = TwoFour
