"""A weight of logarithmic levels, perhaps turned, and inputs of few bits: y = V Q(R x) + b, with V near W R^T.

    V_oi = s peak_os base_o^-k     s the sign and k the level that are coded for o, i; a peak for either sign
    R = H                          Hadamard matrices on blocks of inputs
    R = H (I - 2 v v^T)            after a reflection that spreads one direction v over all inputs

R is orthogonal, so R x loses nothing, and its entries are of one size, which `input_bits` rounds token by token. Codes
are two to a byte.
"""

from __future__ import annotations

import math
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from seqmix.core.cost import Cost, matmul_cost
from seqmix.core.errors import ConfigError
from seqmix.linears._linear import Replacement
from seqmix.linears.int4 import rounded
from seqmix.ops.int4_matmul import ZERO, packed, unpacked


class TwinLog(Replacement):
    """`reflected` holds v [inputs], zero where there is no reflection."""

    codes: Tensor
    peaks: Tensor
    bases: Tensor
    reflected: Tensor
    bias: Tensor | None

    def __init__(
        self,
        codes: Tensor,
        peaks: Tensor,
        bases: Tensor,
        reflected: Tensor,
        bias: Tensor | None = None,
        *,
        bits: int,
        input_bits: int | None = None,
        rotated: bool = False,
    ) -> None:
        super().__init__()
        if not 2 <= bits <= 4:
            raise ConfigError(f"twin_log: bits={bits}, wanted 2 to 4.")
        self.out_features, self.in_features = len(codes), len(reflected)
        self.bits, self.input_bits, self.rotated = bits, input_bits, rotated
        for name, tensor in (("codes", codes), ("peaks", peaks), ("bases", bases)):
            self.register_buffer(name, tensor)
        self.register_buffer("reflected", reflected)
        self.register_buffer("bias", bias)

    @classmethod
    def empty(
        cls, dense: nn.Linear, *, bits: int, input_bits: int | None = None, rotated: bool = False
    ) -> Self:
        device, (outputs, inputs) = dense.weight.device, dense.weight.shape
        return cls(
            torch.zeros(outputs, -(-inputs // 2), dtype=torch.uint8, device=device),
            torch.zeros(outputs, 2, device=device),
            torch.ones(outputs, device=device),
            torch.zeros(inputs, device=device),
            None if dense.bias is None else torch.zeros_like(dense.bias.data),
            bits=bits,
            input_bits=input_bits,
            rotated=rotated,
        )

    @property
    def options(self) -> dict[str, Any]:
        return {"bits": self.bits, "input_bits": self.input_bits, "rotated": self.rotated}

    def weight(self) -> Tensor:
        """V [outputs, inputs]."""
        codes = unpacked(self.codes, self.in_features) + ZERO
        return from_log(codes, self.peaks, self.bases, self.bits)

    def turned(self, x: Tensor) -> Tensor:
        """R x."""
        return rotation(x, self.reflected.to(x.dtype)) if self.rotated else x

    def forward(self, x: Tensor) -> Tensor:
        """x [..., inputs] to y [..., outputs]."""
        u = self.turned(x)
        if self.input_bits is not None:
            u = rounded(u, self.input_bits, self.in_features)
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.linear(u, self.weight().to(x.dtype), bias)

    @torch.no_grad()
    def to_dense(self) -> nn.Linear:
        dense = nn.Linear(
            self.in_features,
            self.out_features,
            bias=self.bias is not None,
            device=self.codes.device,
        )
        identity = torch.eye(self.in_features, device=self.codes.device)
        dense.weight.copy_(self.weight().float() @ self.turned(identity).T)
        if self.bias is not None:
            dense.bias.copy_(self.bias)
        return dense

    def cost(self, length: int) -> Cost:
        return matmul_cost(length, self.in_features, self.out_features)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, bits={self.bits}, rotated={self.rotated}"


def from_log(codes: Tensor, peaks: Tensor, bases: Tensor, bits: int) -> Tensor:
    """The weights [O, I] that codes [O, I] stand for: the sign in the highest bit, k below."""
    levels = 2 ** (bits - 1)
    table = bases.unsqueeze(1) ** -torch.arange(levels, device=codes.device, dtype=bases.dtype)
    signed = torch.cat([peaks[:, :1] * table, -peaks[:, 1:] * table], dim=1)  # [O, 2 levels]
    return signed.gather(1, codes.long())


def rotation(x: Tensor, v: Tensor) -> Tensor:
    """H (x - 2 v (v . x)) for x [..., I]; Hadamard matrices of the largest power of two that divides I."""
    x = x - 2 * (x @ v).unsqueeze(-1) * v
    side = x.shape[-1] & -x.shape[-1]
    y = x.unflatten(-1, (-1, side))
    step = 1
    while step < side:
        first, second = y.unflatten(-1, (-1, 2, step)).unbind(-2)
        y = torch.stack([first + second, first - second], dim=-2).flatten(-3)
        step *= 2
    return y.flatten(-2) / math.sqrt(side)


def of_codes(codes: Tensor) -> Tensor:
    """Codes from 0 to 15 [O, I], two to a byte."""
    return packed(codes - ZERO)


LINEAR = TwinLog
