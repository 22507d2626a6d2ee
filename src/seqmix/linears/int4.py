"""A weight of 4 bits: W_oi = scale_o m_og q_oi, g the group of neighbouring inputs that i is in.

q are whole numbers from -7 to 7, m from 1 to 15, both kept two to a byte. Their product is a whole number of 8 bits, so
the layer multiplies as one of `seqmix.linears.int8`, which it makes at the first call and never saves. Embedding tables
are kept the same way.
"""

from __future__ import annotations

from typing import Any, Self

import torch
from torch import Tensor, nn

from seqmix.core.errors import ConfigError
from seqmix.linears._expanded import Expanded

ZERO = 8  # codes are kept as q + 8


def packed(codes: Tensor) -> Tensor:
    """Whole numbers [O, I] from -8 to 7, two to a byte, [O, ceil(I / 2)]."""
    low, high = (
        nn.functional.pad(codes + ZERO, (0, codes.shape[1] % 2))
        .view(torch.uint8)
        .view(len(codes), -1, 2)
        .unbind(-1)
    )
    return low | (high << 4)


def unpacked(bytes_: Tensor, count: int) -> Tensor:
    """The first `count` whole numbers of every row, [..., count] in int8."""
    both = torch.stack([bytes_ & 15, bytes_ >> 4], dim=-1).flatten(-2)
    return both[..., :count].view(torch.int8) - ZERO


class Int4(Expanded):
    """In the place of a linear layer (`role="linear"`), or of an embedding (`role="embedding"`).

    `input_bits` rounds the inputs, with a step for every group of every token, before they are multiplied.
    """

    codes: Tensor
    factors: Tensor
    scale: Tensor
    bias: Tensor | None

    def __init__(
        self,
        codes: Tensor,
        factors: Tensor,
        scale: Tensor,
        bias: Tensor | None = None,
        *,
        inputs: int,
        group: int,
        role: str = "linear",
        input_bits: int | None = None,
    ) -> None:
        super().__init__()
        if role not in ("linear", "embedding"):
            raise ConfigError(f"int4: role={role!r}, wanted 'linear' or 'embedding'.")
        self.role, self.group, self.input_bits = role, group, input_bits
        self.out_features, self.in_features = len(codes), inputs
        self.register_buffer("codes", codes)
        self.register_buffer("factors", factors)
        self.register_buffer("scale", scale)
        self.register_buffer("bias", bias)

    @classmethod
    def of(
        cls,
        dense: nn.Linear | nn.Embedding,
        codes: Tensor,
        factors: Tensor,
        scale: Tensor,
        *,
        input_bits: int | None = None,
    ) -> Self:
        """In the place of `dense`, with q [O, I], m [O, I / G] and scale [O]."""
        bias = getattr(dense, "bias", None)
        return cls(
            packed(codes),
            packed(factors - ZERO),
            scale,
            None if bias is None else bias.detach().clone(),
            inputs=codes.shape[1],
            group=codes.shape[1] // factors.shape[1],
            role="embedding" if isinstance(dense, nn.Embedding) else "linear",
            input_bits=input_bits,
        )

    @classmethod
    def empty(
        cls,
        dense: nn.Linear | nn.Embedding,
        *,
        group: int,
        role: str = "linear",
        input_bits: int | None = None,
    ) -> Self:
        device, (outputs, inputs) = dense.weight.device, dense.weight.shape
        bias = getattr(dense, "bias", None)

        def halves(count: int) -> Tensor:
            return torch.zeros(outputs, -(-count // 2), dtype=torch.uint8, device=device)

        return cls(
            halves(inputs),
            halves(inputs // group),
            torch.zeros(outputs, device=device),
            None if bias is None else torch.zeros_like(bias.data),
            inputs=inputs,
            group=group,
            role=role,
            input_bits=input_bits,
        )

    @property
    def options(self) -> dict[str, Any]:
        return {"group": self.group, "role": self.role, "input_bits": self.input_bits}

    def whole(self, rows: Tensor | None = None) -> Tensor:
        """m q in int8, [O, I], or of some rows."""
        codes, factors = (
            (self.codes, self.factors) if rows is None else (self.codes[rows], self.factors[rows])
        )
        q = unpacked(codes, self.in_features).unflatten(-1, (-1, self.group))
        m = unpacked(factors, self.in_features // self.group) + ZERO
        return (q * m.unsqueeze(-1)).flatten(-2)

    def forward(self, x: Tensor) -> Tensor:
        """Token ids [...] or activations [..., inputs], to [..., width] or [..., outputs]."""
        if self.role == "embedding":
            return self.whole(x).to(self.scale.dtype) * self.scale[x].unsqueeze(-1)
        return self.product(x)

    def product(self, x: Tensor) -> Tensor:
        """y = W x + b, whichever the role."""
        if self.input_bits is not None:
            x = rounded(x, self.input_bits, self.group)
        y: Tensor = self.expanded().product(x)
        return y

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, group={self.group}, role={self.role!r}"


def rounded(x: Tensor, bits: int, group: int) -> Tensor:
    """x [..., I], every G neighbours rounded to multiples of their largest / (2^(bits - 1) - 1)."""
    limit = 2 ** (bits - 1) - 1
    grouped = x.unflatten(-1, (-1, group))
    step = grouped.abs().amax(-1, keepdim=True).clamp_min(1e-30) / limit
    return ((grouped / step).round() * step).flatten(-2)


LINEAR = Int4
