"""Attention over chosen blocks of keys, compiled (csrc/block_sparse_attention.cpp)."""

from __future__ import annotations

import torch
from torch import Tensor

from seqmix.kernels._custom import columns_contiguous, custom_operator, float_workspace
from seqmix.kernels._native import native


def block_sparse_attention(
    q: Tensor, k: Tensor, v: Tensor, blocks: Tensor, *, block: int, causal: bool, scale: float
) -> Tensor:
    """o [B, T, H, V] in the dtype of v; `blocks` [B, H, M, N] says which blocks of keys each block reads."""
    dtype = v.dtype
    if k.dtype != v.dtype:
        k, v = k.float(), v.float()
    return _attention(q, k, v, blocks, block, causal, scale).to(dtype)


def _run(
    q: Tensor, k: Tensor, v: Tensor, blocks: Tensor, block: int, causal: bool, scale: float
) -> Tensor:
    q, k, v = (columns_contiguous(tensor) for tensor in (q, k, v))
    o = _fake(q, k, v, blocks, block, causal, scale)
    threads = torch.get_num_threads()
    room = native.block_sparse_attention_workspace(block, q.shape[3], v.shape[3], threads)
    workspace = float_workspace(room)
    chosen = blocks.view(torch.uint8)
    native.block_sparse_attention(q, k, v, chosen, o, workspace, block, causal, scale, threads)
    return o


def _fake(
    q: Tensor, k: Tensor, v: Tensor, blocks: Tensor, block: int, causal: bool, scale: float
) -> Tensor:
    return v.new_empty(*q.shape[:3], v.shape[3])


_attention = custom_operator(
    "block_sparse_attention(Tensor q, Tensor k, Tensor v, Tensor blocks, int block, bool causal, float scale)"
    " -> Tensor",
    _run,
    _fake,
)
