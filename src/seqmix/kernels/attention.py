"""Softmax attention, compiled: decoding split over the keys, many queries in blocks (csrc/attention.cpp)."""

from __future__ import annotations

import torch
from torch import Tensor

from seqmix.kernels._custom import (
    columns_contiguous,
    custom_operator,
    float_workspace,
    needs_no_dispatcher,
    text_bounds,
)
from seqmix.kernels._native import native

FEW = 16  # queries of a decoding step


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    logits: Tensor | None,
    cu_seqlens: Tensor | None,
    *,
    causal: bool,
    window: int | None,
    first: int,
    scale: float,
) -> Tensor:
    """o [B, T, H, V] in the dtype of v, of q [B, T, H, K], k [B, S, G, K] and v [B, S, G, V].

    `bias` broadcasts to [B, H, T, S]; `logits` [H] join the denominators; the keys before `first` are seen
    beyond the `window`. Keys and values are read where they lie; only two dtypes are joined in float32.
    """
    dtype = v.dtype
    if k.dtype != v.dtype:
        k, v = k.float(), v.float()
    if bias is not None:
        bias = bias.float().expand(q.shape[0], q.shape[2], q.shape[1], k.shape[1])
    if window is not None and window >= max(q.shape[1], k.shape[1]):
        window = None  # none is so far; and sums with a larger number might be too large
    # For a few queries the dispatcher would take longer than the kernel, and has nothing to do.
    few = q.shape[1] <= FEW and needs_no_dispatcher(q, (q, k, v, bias, logits))
    compute = _run if few else _attention
    o = compute(
        q,
        k,
        v,
        bias,
        None if logits is None else logits.float(),
        text_bounds(cu_seqlens),
        causal,
        -1 if window is None else window,
        first,
        scale,
    )
    return o.to(dtype)


def _run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    logits: Tensor | None,
    bounds: Tensor | None,
    causal: bool,
    window: int,
    first: int,
    scale: float,
) -> Tensor:
    q, k, v = (columns_contiguous(tensor) for tensor in (q, k, v))
    o = _fake(q, k, v, bias, logits, bounds, causal, window, first, scale)
    threads = torch.get_num_threads()
    room = native.attention_workspace(q, k, v, bounds, threads)
    workspace = float_workspace(room)
    native.attention(
        q, k, v, bias, logits, bounds, o, workspace, causal, window, first, scale, threads
    )
    return o


def _fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    logits: Tensor | None,
    bounds: Tensor | None,
    causal: bool,
    window: int,
    first: int,
    scale: float,
) -> Tensor:
    return v.new_empty(*q.shape[:3], v.shape[3])


_attention = custom_operator(
    "attention(Tensor q, Tensor k, Tensor v, Tensor? bias, Tensor? logits, Tensor? bounds, bool causal,"
    " int window, int first, float scale) -> Tensor",
    _run,
    _fake,
)
