"""A weight with only some of its blocks, in 8 bits, for inference: one factor per output, tokens rounded to 8 bits.

`seqmix.ops.quantized_sparse_matmul` says what is computed.
"""

from __future__ import annotations

from typing import Any, Self

import torch
from torch import Tensor, nn

from seqmix.core.cost import Cost
from seqmix.core.errors import ConfigError
from seqmix.linears._linear import Replacement, in_rows
from seqmix.linears.block_sparse import INDEX_BYTES, BlockSparse
from seqmix.ops.quantized_sparse_matmul import LARGEST, SIDE, quantized_sparse_matmul


class QuantizedBlockSparse(Replacement):
    """Four columns that any of four outputs uses, side by side: blocks [N, 4, 4] in int8, columns [N, 4]."""

    blocks: Tensor
    columns: Tensor
    offsets: Tensor
    scales: Tensor
    bias: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        blocks: Tensor,
        columns: Tensor,
        offsets: Tensor,
        scales: Tensor,
        bias: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.register_buffer("blocks", blocks)
        self.register_buffer("columns", columns.to(torch.int32))
        self.register_buffer("offsets", offsets.long())
        self.register_buffer("scales", scales)
        self.register_buffer("bias", bias)

    @classmethod
    @torch.no_grad()
    def of(cls, layer: BlockSparse) -> Self:
        """Each output's weights are rounded to multiples of its largest / 127."""
        if layer.out_features % SIDE:
            raise ConfigError(
                f"QuantizedBlockSparse: {layer.out_features} outputs, wanted a multiple of {SIDE}. "
                "Leave this layer in float32."
            )
        weight = layer.to_dense().weight
        scales = weight.abs().amax(1).clamp_min(1e-30) / LARGEST
        whole = (weight / scales.unsqueeze(1)).round()
        by_row = whole.unflatten(0, (-1, SIDE))  # [O / 4, 4, I]
        used = by_row.any(1)
        counts = used.sum(1)
        num_blocks = (counts + SIDE - 1) // SIDE
        offsets = torch.cat([counts.new_zeros(1), num_blocks.cumsum(0)])
        row, column = used.nonzero(as_tuple=True)
        place = torch.arange(len(row), device=row.device) - (counts.cumsum(0) - counts)[row]
        block, within = offsets[row] + place // SIDE, place % SIDE
        blocks = weight.new_zeros(int(offsets[-1]), SIDE, SIDE, dtype=torch.int8)
        blocks[block, :, within] = by_row[row, :, column].to(torch.int8)
        columns = torch.zeros(len(blocks), SIDE, dtype=torch.int32, device=row.device)
        columns[block, within] = column.int()
        bias = None if layer.bias is None else layer.bias.detach().clone()
        return cls(layer.in_features, layer.out_features, blocks, columns, offsets, scales, bias)

    @classmethod
    def empty(cls, dense: nn.Linear, *, blocks: int) -> Self:
        device, (outputs, inputs) = dense.weight.device, dense.weight.shape
        return cls(
            inputs,
            outputs,
            torch.zeros(blocks, SIDE, SIDE, dtype=torch.int8, device=device),
            torch.zeros(blocks, SIDE, dtype=torch.int32, device=device),
            torch.zeros(outputs // SIDE + 1, dtype=torch.long, device=device),
            torch.zeros(outputs, device=device),
            None if dense.bias is None else torch.zeros_like(dense.bias.data),
        )

    @property
    def options(self) -> dict[str, Any]:
        return {"blocks": len(self.blocks)}

    def forward(self, x: Tensor) -> Tensor:
        """x [..., I] to y [..., O]."""
        if not x.numel():  # as an expert that no token has chosen
            return x.new_zeros(*x.shape[:-1], self.out_features)
        pattern = self.blocks, self.columns, self.offsets
        rows = in_rows(x, self.in_features)
        y = quantized_sparse_matmul(rows, self.scales, *pattern, self.bias)
        return y.view(*x.shape[:-1], self.out_features)

    @torch.no_grad()
    def to_dense(self) -> nn.Linear:
        rows = torch.repeat_interleave(self.offsets.diff())
        whole = self.scales.new_zeros(len(self.offsets) - 1, self.in_features, SIDE)
        places = (rows.unsqueeze(1).expand(-1, SIDE), self.columns.long())
        whole.index_put_(places, self.blocks.transpose(1, 2).to(whole.dtype), accumulate=True)
        dense = nn.Linear(
            self.in_features,
            self.out_features,
            bias=self.bias is not None,
            device=whole.device,
            dtype=whole.dtype,
        )
        dense.weight.copy_(whole.transpose(1, 2).flatten(0, 1) * self.scales.unsqueeze(1))
        if self.bias is not None:
            dense.bias.copy_(self.bias)
        return dense

    def cost(self, length: int) -> Cost:
        weights = self.blocks.numel()
        moved = 4.0 * length * (self.in_features + self.out_features)
        indices = INDEX_BYTES * self.columns.numel()
        return Cost(flops=2.0 * length * weights, bytes=weights + moved + indices)

    def extra_repr(self) -> str:
        kept = self.blocks.numel() / (self.in_features * self.out_features)
        return f"{self.in_features}, {self.out_features}, kept={kept:.3f}"


LINEAR = QuantizedBlockSparse
