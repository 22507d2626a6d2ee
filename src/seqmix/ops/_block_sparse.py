"""Patterns of nonzero blocks in a weight matrix: how they are given, and what is wrong with one."""

from __future__ import annotations

import torch
from torch import Tensor

from seqmix.core.errors import DtypeError, RangeError, ShapeError
from seqmix.kernels.sparse_matmul import pattern_fits


def check_pattern(
    operator: str, columns: Tensor, offsets: Tensor, shape: tuple[int, ...], width: int
) -> None:
    """Raises unless `columns`, of this shape, are below `width` and `offsets` [R + 1] rise from 0 to the number
    of blocks.
    """
    for name, tensor in (("columns", columns), ("offsets", offsets)):
        if not isinstance(tensor, Tensor) or tensor.dtype not in (torch.int32, torch.int64):
            raise DtypeError(
                f"{operator}: `{name}` is {getattr(tensor, 'dtype', type(tensor).__name__)}, wanted an int32 or "
                f"int64 tensor. Pass {name}.int()."
            )
    if tuple(columns.shape) != shape:
        raise ShapeError(
            f"{operator}: `columns` has shape {list(columns.shape)}, wanted {list(shape)}, an entry per block of "
            "`blocks`. Make the two agree."
        )
    if offsets.ndim != 1 or len(offsets) < 2:
        raise ShapeError(
            f"{operator}: `offsets` has shape {list(offsets.shape)}, wanted one entry more than there are rows "
            "of blocks."
        )
    if not columns.is_meta and not pattern_fits(columns, offsets, shape[0], width):
        raise RangeError(
            f"{operator}: `offsets` must rise from 0 to {shape[0]}, the number of blocks, and `columns` must lie "
            f"from 0 to {width - 1} for inputs of this width. They describe another matrix: pass those that came "
            "with these blocks."
        )


def rows_of_blocks(offsets: Tensor, num_blocks: int) -> Tensor:
    """[N]: the row of blocks that each block is in."""
    rows = torch.arange(len(offsets) - 1, device=offsets.device)
    return rows.repeat_interleave(offsets.diff().long(), output_size=num_blocks)
