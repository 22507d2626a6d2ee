"""A weight of 4 bits: W_oi = scale_o m_og q_oi, g the group of neighbouring inputs that i is in.

q are whole numbers from -7 to 7, m from 1 to 15, both kept two to a byte, and multiplied with as they are. Embedding
tables are kept the same way.
"""

from __future__ import annotations

from typing import Any, Self

import torch
from torch import Tensor, nn

from seqmix.core.cost import Cost
from seqmix.core.errors import ConfigError
from seqmix.linears._linear import Replacement, in_rows
from seqmix.linears.int8 import Int8
from seqmix.ops.int4_matmul import ZERO, int4_matmul, packed, whole


class Int4(Replacement):
    """In the place of a linear layer (`role="linear"`), or of an embedding (`role="embedding"`).

    `seqmix.ops.int4_matmul` says what is computed: compiled on a CPU, as a dense product where gradients are wanted.
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
        return whole(codes, factors, self.in_features, self.group)

    def forward(self, x: Tensor) -> Tensor:
        """Token ids [...] or activations [..., inputs], to [..., width] or [..., outputs]."""
        if self.role == "embedding":
            return self.whole(x).to(self.scale.dtype) * self.scale[x].unsqueeze(-1)
        return self.product(x)

    def product(self, x: Tensor) -> Tensor:
        """y = W x + b, whichever the role."""
        if self.input_bits is not None:
            x = rounded(x, self.input_bits, self.group)
        if not x.numel():  # as an expert that no token has chosen
            return x.new_zeros(*x.shape[:-1], self.out_features)
        rows = in_rows(x, self.in_features)
        y = int4_matmul(rows, self.codes, self.factors, self.scale, self.bias, group=self.group)
        return y.view(*x.shape[:-1], self.out_features)

    def to_dense(self) -> nn.Linear | nn.Embedding:
        return Int8(self.whole(), self.scale, self.bias, role=self.role).to_dense()

    def cost(self, length: int) -> Cost:
        """Half a byte per weight, and per factor of a group; the activations count once."""
        if self.role == "embedding":
            return Cost(bytes=length * (self.codes.shape[1] + self.factors.shape[1]))
        return self.product_cost(length)

    def product_cost(self, length: int) -> Cost:
        weights = self.in_features * self.out_features
        moved = 4.0 * length * (self.in_features + self.out_features)
        stored = self.codes.numel() + self.factors.numel()
        return Cost(flops=2.0 * length * weights, bytes=stored + moved)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, group={self.group}, role={self.role!r}"


def rounded(x: Tensor, bits: int, group: int) -> Tensor:
    """x [..., I], every G neighbours rounded to multiples of their largest / (2^(bits - 1) - 1)."""
    limit = 2 ** (bits - 1) - 1
    grouped = x.unflatten(-1, (-1, group))
    step = grouped.abs().amax(-1, keepdim=True).clamp_min(1e-30) / limit
    return ((grouped / step).round() * step).flatten(-2)


LINEAR = Int4
