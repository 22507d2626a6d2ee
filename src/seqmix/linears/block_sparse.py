"""A weight with only some of its blocks: y = W x + b, W zero outside blocks of P outputs by Q inputs.

`seqmix.ops.sparse_matmul` describes the pattern. Inference runs compiled; gradients reach the blocks that there are, at
the cost of a dense layer.
"""

from __future__ import annotations

from typing import Any, Self

import torch
from torch import Tensor, nn

from seqmix.core.cost import Cost
from seqmix.core.errors import ConfigError, RangeError, ShapeError
from seqmix.linears._linear import Replacement, in_rows
from seqmix.ops.sparse_matmul import sparse_matmul

BLOCK = (4, 1)  # outputs by inputs: the least that keeps the compiled kernel at its full rate
INDEX_BYTES = 4


def largest_blocks(scores: Tensor, sparsity: float, block: tuple[int, int] = BLOCK) -> Tensor:
    """The mask [O / P, I / Q] of the blocks to keep: a share `sparsity` of them, of the least norm, is left out.

    `scores` [O, I] is a weight, or whatever its entries count for.
    """
    if not 0 <= sparsity <= 1:
        raise RangeError(f"largest_blocks: sparsity={sparsity}, wanted a share from 0 to 1.")
    norms = in_blocks(scores, block).square().sum((2, 3))
    kept = norms.numel() - round(sparsity * norms.numel())
    mask = torch.zeros_like(norms, dtype=torch.bool).flatten()
    mask[norms.flatten().topk(kept).indices] = True
    return mask.view_as(norms)


def in_blocks(weight: Tensor, block: tuple[int, int]) -> Tensor:
    """[O, I] as [O / P, I / Q, P, Q]; raises `ConfigError` for blocks that do not fill it."""
    height, width = block
    if height < 1 or width < 1 or weight.shape[0] % height or weight.shape[1] % width:
        raise ConfigError(
            f"block={block} does not divide a weight of {list(weight.shape)} (outputs by inputs). "
            "Choose divisors, such as (4, 1)."
        )
    return weight.unflatten(1, (-1, width)).unflatten(0, (-1, height)).transpose(1, 2)


class BlockSparse(Replacement):
    """blocks [N, P, Q], their columns [N], and for every row of blocks where its own begin, offsets [O / P + 1]."""

    columns: Tensor
    offsets: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        blocks: Tensor,
        columns: Tensor,
        offsets: Tensor,
        bias: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.blocks = nn.Parameter(blocks)
        self.bias = None if bias is None else nn.Parameter(bias)
        self.register_buffer("columns", columns.to(torch.int32))
        self.register_buffer("offsets", offsets.long())

    @classmethod
    def of(
        cls,
        linear: nn.Linear,
        *,
        mask: Tensor | None = None,
        sparsity: float | None = None,
        block: tuple[int, int] = BLOCK,
    ) -> Self:
        """The blocks of a trained layer that `mask` [O / P, I / Q] keeps, or the largest: `sparsity` leaves out."""
        if (mask is None) == (sparsity is None):
            raise ConfigError("BlockSparse.of: give either mask or sparsity.")
        weight = linear.weight.detach()
        by_block = in_blocks(weight, block)
        if sparsity is not None:
            mask = largest_blocks(weight, sparsity, block)
        assert mask is not None
        if mask.shape != by_block.shape[:2]:
            raise ShapeError(
                f"BlockSparse.of: `mask` has shape {list(mask.shape)}, wanted {list(by_block.shape[:2])}, an entry "
                f"per block of {block[0]} x {block[1]}."
            )
        mask = mask.bool()
        rows, columns = mask.nonzero(as_tuple=True)
        offsets = torch.cat([rows.new_zeros(1), mask.sum(1).cumsum(0)])
        bias = None if linear.bias is None else linear.bias.detach().clone()
        blocks = by_block[rows, columns].contiguous()
        return cls(linear.in_features, linear.out_features, blocks, columns, offsets, bias)

    @classmethod
    def empty(cls, dense: nn.Linear, *, height: int, width: int, blocks: int) -> Self:
        weight, (outputs, inputs) = dense.weight.data, dense.weight.shape
        columns = torch.zeros(blocks, dtype=torch.int32, device=weight.device)
        offsets = torch.zeros(outputs // height + 1, dtype=torch.long, device=weight.device)
        bias = None if dense.bias is None else torch.zeros_like(dense.bias.data)
        return cls(inputs, outputs, weight.new_zeros(blocks, height, width), columns, offsets, bias)

    @property
    def options(self) -> dict[str, Any]:
        blocks, height, width = self.blocks.shape
        return {"height": height, "width": width, "blocks": blocks}

    def forward(self, x: Tensor) -> Tensor:
        """x [..., I] to y [..., O]."""
        if not x.numel():  # as an expert that no token has chosen
            return x.new_zeros(*x.shape[:-1], self.out_features)
        rows = in_rows(x, self.in_features)
        y = sparse_matmul(rows, self.blocks, self.columns, self.offsets, self.bias)
        return y.view(*x.shape[:-1], self.out_features)

    @torch.no_grad()
    def to_dense(self) -> nn.Linear:
        """The same layer with all its zeros."""
        like = {"device": self.blocks.device, "dtype": self.blocks.dtype}
        dense = nn.Linear(self.in_features, self.out_features, bias=self.bias is not None, **like)
        identity = torch.eye(self.in_features, **like).unsqueeze(0)  # type: ignore[call-overload]
        dense.weight.copy_(sparse_matmul(identity, self.blocks, self.columns, self.offsets)[0].T)
        if self.bias is not None:
            dense.bias.copy_(self.bias)
        return dense

    def cost(self, length: int) -> Cost:
        weights = self.blocks.numel()
        moved = 4.0 * (weights + length * (self.in_features + self.out_features))
        return Cost(flops=2.0 * length * weights, bytes=moved + INDEX_BYTES * self.columns.numel())

    def extra_repr(self) -> str:
        kept = self.blocks.numel() / (self.in_features * self.out_features)
        return f"{self.in_features}, {self.out_features}, kept={kept:.3f}"


LINEAR = BlockSparse
