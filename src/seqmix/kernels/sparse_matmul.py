"""Products with block-sparse weights, compiled (csrc/sparse_matmul.cpp, csrc/quantized_sparse_matmul.cpp)."""

from __future__ import annotations

import torch
from torch import Tensor

from seqmix.kernels._custom import columns_contiguous, custom_operator, float_workspace
from seqmix.kernels._native import missing, native

STRIP = 128  # outputs of a strip, as in csrc/tiles.hpp


def without_gradients(*tensors: Tensor | None) -> str | None:
    """Why the compiled kernels cannot run: the reasons of every kernel, and that these have no backward."""
    if reason := missing(*tensors):
        return reason
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        return "the compiled sparse kernels have no backward, and gradients are wanted"
    return None


def pattern_fits(columns: Tensor, offsets: Tensor, num_blocks: int, width: int) -> bool:
    """Whether `offsets` rise from 0 to `num_blocks` and every column is one of `width`."""
    if native is not None and columns.device.type == "cpu":
        columns, offsets = columns.to(torch.int32).contiguous(), offsets.long().contiguous()
        return bool(native.sparse_pattern_fits(columns, offsets, num_blocks, width))
    ends = int(offsets[0]), int(offsets[-1])
    rises = ends == (0, num_blocks) and bool((offsets.diff() >= 0).all())
    return rises and bool(((columns >= 0) & (columns < width)).all())


def sparse_matmul(
    x: Tensor, blocks: Tensor, columns: Tensor, offsets: Tensor, bias: Tensor | None
) -> Tensor:
    """y [B, T, O] in the dtype of x [B, T, I]; `blocks` [N, P, Q], `columns` [N], `offsets` [O/P + 1], `bias` [O]."""
    bias = None if bias is None else bias.float()
    return _multiply(x, blocks.float(), columns.to(torch.int32), offsets.long(), bias)


def _run(
    x: Tensor, blocks: Tensor, columns: Tensor, offsets: Tensor, bias: Tensor | None
) -> Tensor:
    x, threads = columns_contiguous(x), torch.get_num_threads()
    y = _fake(x, blocks, columns, offsets, bias)
    tile = native.sparse_tile()
    panels = float_workspace(threads, x.shape[2] + _strip(blocks.shape[1]), tile)
    packed = torch.empty(threads, dtype=torch.long, device="cpu")
    blocks, columns, offsets = (t.contiguous() for t in (blocks, columns, offsets))
    bias = None if bias is None else bias.contiguous()
    native.sparse_matmul(x, blocks, columns, offsets, bias, y, panels, packed, threads)
    return y


def _fake(
    x: Tensor, blocks: Tensor, columns: Tensor, offsets: Tensor, bias: Tensor | None
) -> Tensor:
    return x.new_empty(*x.shape[:2], (offsets.shape[0] - 1) * blocks.shape[1])


def _strip(height: int) -> int:
    """Rows of results that a thread keeps: a strip of outputs, in whole vectors."""
    return -(-max(height, STRIP) // 16) * 16


_multiply = custom_operator(
    "sparse_matmul(Tensor x, Tensor blocks, Tensor columns, Tensor offsets, Tensor? bias) -> Tensor",
    _run,
    _fake,
)


def quantized_sparse_matmul(
    x: Tensor,
    scales: Tensor,
    blocks: Tensor,
    columns: Tensor,
    offsets: Tensor,
    bias: Tensor | None,
) -> Tensor:
    """y [B, T, O] in the dtype of x; `blocks` [N, 4, 4] int8, `columns` [N, 4], `scales` [O], `offsets` [O/4 + 1]."""
    bias = None if bias is None else bias.float()
    return _multiply_quantized(
        x, scales.float(), blocks, columns.to(torch.int32), offsets.long(), bias
    )


def _run_quantized(
    x: Tensor,
    scales: Tensor,
    blocks: Tensor,
    columns: Tensor,
    offsets: Tensor,
    bias: Tensor | None,
) -> Tensor:
    x, threads = columns_contiguous(x), torch.get_num_threads()
    y = _fake_quantized(x, scales, blocks, columns, offsets, bias)
    tile = native.sparse_tile()
    panels = torch.empty(threads, x.shape[2], tile, dtype=torch.int8, device="cpu")
    results = float_workspace(threads, 1 + _strip(4), tile)
    packed = torch.empty(threads, dtype=torch.long, device="cpu")
    scales, blocks, columns, offsets = (t.contiguous() for t in (scales, blocks, columns, offsets))
    bias = None if bias is None else bias.contiguous()
    native.quantized_sparse_matmul(
        x, blocks, scales, columns, offsets, bias, y, panels, results, packed, threads
    )
    return y


def _fake_quantized(
    x: Tensor,
    scales: Tensor,
    blocks: Tensor,
    columns: Tensor,
    offsets: Tensor,
    bias: Tensor | None,
) -> Tensor:
    return x.new_empty(*x.shape[:2], scales.shape[0])


_multiply_quantized = custom_operator(
    "quantized_sparse_matmul(Tensor x, Tensor scales, Tensor blocks, Tensor columns, Tensor offsets, Tensor? bias)"
    " -> Tensor",
    _run_quantized,
    _fake_quantized,
)
