"""Inputs of few bits with a noisy bias: y = W Q(x + N) + (b - W N), with fixed N [inputs], uniform from -a to a.

    Q(u) = step clamp(round(u / step), -L, L),   L = 2^(bits - 1) - 1

Without noise, all inputs that round to the same number err together; with it the errors are spread, and what it adds is
taken away after the product, in the bias, at no cost. `step` is one number for the layer.
Liu et al. 2022 (arXiv:2211.16056), section 3.3.
"""

from __future__ import annotations

from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from seqmix.core.cost import Cost, matmul_cost
from seqmix.linears._linear import Replacement


class Noisy(Replacement):
    """`bias` already holds b - W N."""

    noise: Tensor
    step: Tensor

    def __init__(
        self, weight: Tensor, bias: Tensor, noise: Tensor, step: Tensor, *, bits: int
    ) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.bits = bits
        self.weight, self.bias = nn.Parameter(weight), nn.Parameter(bias)
        self.register_buffer("noise", noise)
        self.register_buffer("step", step)

    @classmethod
    @torch.no_grad()
    def of(cls, dense: nn.Linear, noise: Tensor, step: Tensor, *, bits: int) -> Self:
        """The trained layer with noise [inputs] and a step."""
        weight = dense.weight.detach().clone()
        bias = weight.new_zeros(len(weight)) if dense.bias is None else dense.bias
        return cls(weight, bias - weight @ noise, noise, step.reshape(()), bits=bits)

    @classmethod
    def empty(cls, dense: nn.Linear, *, bits: int) -> Self:
        weight = dense.weight.data
        bias, noise = weight.new_zeros(len(weight)), weight.new_zeros(weight.shape[1])
        return cls(torch.zeros_like(weight), bias, noise, weight.new_zeros(()), bits=bits)

    @property
    def options(self) -> dict[str, Any]:
        return {"bits": self.bits}

    def forward(self, x: Tensor) -> Tensor:
        """x [..., inputs] to y [..., outputs]."""
        limit = 2 ** (self.bits - 1) - 1
        u = ((x + self.noise) / self.step).round().clamp(-limit, limit) * self.step
        return F.linear(u, self.weight, self.bias)

    @torch.no_grad()
    def to_dense(self) -> nn.Linear:
        like: dict[str, Any] = {"device": self.weight.device, "dtype": self.weight.dtype}
        dense = nn.Linear(self.in_features, self.out_features, **like)
        dense.weight.copy_(self.weight)
        dense.bias.copy_(self.bias + self.weight @ self.noise)
        return dense

    def cost(self, length: int) -> Cost:
        return matmul_cost(length, self.in_features, self.out_features)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, bits={self.bits}"


LINEAR = Noisy
