"""Linear layers that keep only the blocks of their weight that are not zero, in float32 or in 8 bits.

They take the place of a trained `torch.nn.Linear`: `SparseLinear.from_linear`, or `sparsify` for all of a model.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, nn

from seqmix.core.errors import ConfigError, RangeError, ShapeError
from seqmix.ops.quantized_sparse_matmul import LARGEST, SIDE, quantized_sparse_matmul
from seqmix.ops.sparse_matmul import sparse_matmul

BLOCK = (4, 1)  # outputs by inputs: the least that keeps the compiled kernel at its full rate


def largest_blocks(weight: Tensor, sparsity: float, block: tuple[int, int] = BLOCK) -> Tensor:
    """The mask [O / P, I / Q] of the blocks to keep: a share `sparsity` of them, of the least norm, is left out."""
    if not 0 <= sparsity <= 1:
        raise RangeError(f"largest_blocks: sparsity={sparsity}, wanted a share from 0 to 1.")
    norms = _in_blocks(weight, block).square().sum((2, 3))
    kept = norms.numel() - round(sparsity * norms.numel())
    mask = torch.zeros_like(norms, dtype=torch.bool).flatten()
    mask[norms.flatten().topk(kept).indices] = True
    return mask.view_as(norms)


def _in_blocks(weight: Tensor, block: tuple[int, int]) -> Tensor:
    """[O, I] as [O / P, I / Q, P, Q]."""
    height, width = block
    if height < 1 or width < 1 or weight.shape[0] % height or weight.shape[1] % width:
        raise ConfigError(
            f"block={block} does not divide a weight of {list(weight.shape)} (outputs by inputs). "
            "Choose divisors, such as (4, 1)."
        )
    return weight.unflatten(1, (-1, width)).unflatten(0, (-1, height)).transpose(1, 2)


class _Sparse(nn.Module):
    """What both layers share: the pattern, which a state dict may replace by one with other blocks."""

    columns: Tensor
    offsets: Tensor

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        for name in ("blocks", "columns"):
            given, own = state_dict.get(prefix + name), getattr(self, name)
            if given is not None and given.shape[1:] == own.shape[1:]:
                fresh = own.new_empty(given.shape)
                is_weight = isinstance(own, nn.Parameter)
                setattr(self, name, nn.Parameter(fresh, own.requires_grad) if is_weight else fresh)
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def _in_rows(self, x: Tensor) -> Tensor:
        if x.shape[-1] != self.in_features:
            raise ShapeError(
                f"{type(self).__name__}: `x` has {x.shape[-1]} channels, wanted {self.in_features}."
            )
        return x.reshape(1, -1, self.in_features)

    def extra_repr(self) -> str:
        kept = (
            self.columns.numel() * self._weights_per_column / (self.in_features * self.out_features)
        )
        return f"{self.in_features}, {self.out_features}, kept={kept:.3f}"

    @property
    def _weights_per_column(self) -> int:
        raise NotImplementedError


class SparseLinear(_Sparse):
    """y = W x + b with W [O, I] given by its blocks [N, P, Q]; `seqmix.ops.sparse_matmul` describes the pattern.

    Inference runs compiled. Gradients reach the blocks that there are, at the cost of a dense layer.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        blocks: Tensor,
        columns: Tensor,
        offsets: Tensor,
        bias: Tensor | None = None,
    ) -> None:
        super().__init__(in_features, out_features)
        self.blocks = nn.Parameter(blocks)
        self.bias = None if bias is None else nn.Parameter(bias)
        self.register_buffer("columns", columns.to(torch.int32))
        self.register_buffer("offsets", offsets.long())

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        *,
        mask: Tensor | None = None,
        sparsity: float | None = None,
        block: tuple[int, int] = BLOCK,
    ) -> Self:
        """The blocks of a trained layer that `mask` [O / P, I / Q] keeps, or the largest: `sparsity` leaves out."""
        if (mask is None) == (sparsity is None):
            raise ConfigError("SparseLinear.from_linear: give either mask or sparsity.")
        weight = linear.weight.detach()
        by_block = _in_blocks(weight, block)
        if sparsity is not None:
            mask = largest_blocks(weight, sparsity, block)
        assert mask is not None
        if mask.shape != by_block.shape[:2]:
            raise ShapeError(
                f"SparseLinear.from_linear: `mask` has shape {list(mask.shape)}, wanted "
                f"{list(by_block.shape[:2])}, an entry per block of {block[0]} x {block[1]}."
            )
        mask = mask.bool()
        rows, columns = mask.nonzero(as_tuple=True)
        offsets = torch.cat([rows.new_zeros(1), mask.sum(1).cumsum(0)])
        bias = None if linear.bias is None else linear.bias.detach().clone()
        blocks = by_block[rows, columns].contiguous()
        return cls(linear.in_features, linear.out_features, blocks, columns, offsets, bias)

    @torch.no_grad()
    def to_linear(self) -> nn.Linear:
        """The same layer with all its zeros."""
        linear = nn.Linear(self.in_features, self.out_features, bias=self.bias is not None)
        identity = torch.eye(self.in_features, device=self.blocks.device).unsqueeze(0)
        linear.weight.copy_(sparse_matmul(identity, self.blocks, self.columns, self.offsets)[0].T)
        if self.bias is not None:
            linear.bias.copy_(self.bias)
        return linear

    def quantized(self) -> QuantizedSparseLinear:
        """The same layer with weights of 8 bits."""
        return QuantizedSparseLinear.from_sparse(self)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., I] to y [..., O]."""
        y = sparse_matmul(self._in_rows(x), self.blocks, self.columns, self.offsets, self.bias)
        return y.view(*x.shape[:-1], self.out_features)

    @property
    def _weights_per_column(self) -> int:
        return self.blocks.shape[1] * self.blocks.shape[2]


class QuantizedSparseLinear(_Sparse):
    """The same with int8 weights, one factor per output, and activations rounded to 8 bits token by token.

    For inference only: `seqmix.ops.quantized_sparse_matmul` says what is computed.
    """

    blocks: Tensor
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
        super().__init__(in_features, out_features)
        self.register_buffer("blocks", blocks)
        self.register_buffer("columns", columns.to(torch.int32))
        self.register_buffer("offsets", offsets.long())
        self.register_buffer("scales", scales)
        self.register_buffer("bias", bias)

    @classmethod
    @torch.no_grad()
    def from_sparse(cls, layer: SparseLinear) -> Self:
        """Each output's weights are rounded to multiples of its largest / 127."""
        if layer.out_features % SIDE:
            raise ConfigError(
                f"QuantizedSparseLinear: {layer.out_features} outputs, wanted a multiple of {SIDE}. "
                "Leave this layer in float32."
            )
        weight = layer.to_linear().weight
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

    def forward(self, x: Tensor) -> Tensor:
        """x [..., I] to y [..., O]."""
        pattern = self.blocks, self.columns, self.offsets
        y = quantized_sparse_matmul(self._in_rows(x), self.scales, *pattern, self.bias)
        return y.view(*x.shape[:-1], self.out_features)

    @property
    def _weights_per_column(self) -> int:
        return SIDE


def sparsify(
    model: nn.Module,
    sparsity: float,
    *,
    block: tuple[int, int] = BLOCK,
    quantized: bool = False,
    only: Callable[[str, nn.Linear], bool] = lambda name, linear: True,
) -> nn.Module:
    """Replaces the linear layers of `model`, in place, by sparse ones that keep their largest blocks.

    `only(name, linear)` says which; raises `ConfigError`, before anything is replaced, if `block` does not
    divide one of them.
    """
    replacements: list[tuple[nn.Module, str, nn.Module]] = []
    for name, module in model.named_modules():
        for leaf, child in module.named_children():
            if type(child) is nn.Linear and only(f"{name}.{leaf}" if name else leaf, child):
                sparse = SparseLinear.from_linear(child, sparsity=sparsity, block=block)
                replacements.append((module, leaf, sparse.quantized() if quantized else sparse))
    for module, leaf, replacement in replacements:
        setattr(module, leaf, replacement)
    return model
