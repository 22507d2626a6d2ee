"""A weight of 8 bits: y = diag(scale) W x + b, with whole numbers W [outputs, inputs] from -127 to 127.

Each output's weights are rounded to multiples of its largest / 127. Embedding tables are kept the same way, a factor
per token.
"""

from __future__ import annotations

from typing import Any, Self

import torch
from torch import Tensor, nn

from seqmix.core.cost import Cost
from seqmix.core.errors import ConfigError
from seqmix.linears._linear import Replacement, in_rows
from seqmix.ops.int8_matmul import int8_matmul

LARGEST = 127


def rounded(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Whole numbers [O, I] in int8, and the factor of each row [O]."""
    weight = weight.detach().float()
    scale = weight.abs().amax(1).clamp_min(1e-30) / LARGEST
    return (weight / scale.unsqueeze(1)).round().to(torch.int8), scale


class Int8(Replacement):
    """In the place of a linear layer (`role="linear"`), or of an embedding (`role="embedding"`).

    `seqmix.ops.int8_matmul` says what is computed: compiled on a CPU, as a dense product where gradients are wanted.
    """

    weight: Tensor
    scale: Tensor
    bias: Tensor | None

    def __init__(
        self, weight: Tensor, scale: Tensor, bias: Tensor | None = None, *, role: str = "linear"
    ) -> None:
        super().__init__()
        if role not in ("linear", "embedding"):
            raise ConfigError(f"int8: role={role!r}, wanted 'linear' or 'embedding'.")
        self.role = role
        self.out_features, self.in_features = weight.shape
        self.register_buffer("weight", weight)
        self.register_buffer("scale", scale)
        self.register_buffer("bias", bias)

    @classmethod
    def of(cls, dense: nn.Linear | nn.Embedding) -> Self:
        """The rounded weight of a trained layer."""
        bias = getattr(dense, "bias", None)
        role = "embedding" if isinstance(dense, nn.Embedding) else "linear"
        return cls(
            *rounded(dense.weight), None if bias is None else bias.detach().clone(), role=role
        )

    @classmethod
    def empty(cls, dense: nn.Linear | nn.Embedding, *, role: str = "linear") -> Self:
        weight = torch.zeros_like(dense.weight, dtype=torch.int8, requires_grad=False)
        bias = getattr(dense, "bias", None)
        scale = torch.zeros(len(weight), device=weight.device)
        return cls(weight, scale, None if bias is None else torch.zeros_like(bias.data), role=role)

    @property
    def options(self) -> dict[str, Any]:
        return {"role": self.role}

    def forward(self, x: Tensor) -> Tensor:
        """Token ids [...] or activations [..., inputs], to [..., width] or [..., outputs]."""
        if self.role == "embedding":
            return self.weight[x].to(self.scale.dtype) * self.scale[x].unsqueeze(-1)
        return self.product(x)

    def product(self, x: Tensor) -> Tensor:
        """y = diag(scale) W x + b, whichever the role."""
        if not x.numel():  # as an expert that no token has chosen
            return x.new_zeros(*x.shape[:-1], self.out_features)
        y = int8_matmul(in_rows(x, self.in_features), self.weight, self.scale, self.bias)
        return y.view(*x.shape[:-1], self.out_features)

    def to_dense(self) -> nn.Linear | nn.Embedding:
        weight = self.weight.float() * self.scale.float().unsqueeze(1)
        if self.role == "embedding":
            return nn.Embedding.from_pretrained(weight, freeze=False)
        dense = nn.Linear(
            self.in_features,
            self.out_features,
            bias=self.bias is not None,
            device=weight.device,
        )
        with torch.no_grad():
            dense.weight.copy_(weight)
            if self.bias is not None:
                dense.bias.copy_(self.bias)
        return dense

    def cost(self, length: int) -> Cost:
        """A byte per weight; the activations count once."""
        if self.role == "embedding":
            return Cost(bytes=length * self.in_features)
        return self.product_cost(length)

    def product_cost(self, length: int) -> Cost:
        """That of `product`, which a tied head calls whatever the role."""
        weights = self.in_features * self.out_features
        moved = 4.0 * length * (self.in_features + self.out_features)
        return Cost(flops=2.0 * length * weights, bytes=weights + moved)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, role={self.role!r}"


LINEAR = Int8
