"""Linear attention, compiled: S_t = exp(g_t) S_{t-1} + k_t v_t^T, o_t = scale S_t^T q_t (csrc/linear_attention*)."""

from __future__ import annotations

import torch
from torch import Tensor

from seqmix.kernels._custom import filled, text_bounds
from seqmix.kernels._scalar_attention import scalar_attention
from seqmix.kernels._vector_attention import vector_attention

EPSILON = 1e-10  # keeps an empty normaliser from dividing by zero


def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    state: Tensor | None,
    *,
    scale: float | None,
    normalize: bool,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """o [B, T, H, V] in the dtype of v, and the last S [N, H, K, V] in float32; arguments as the operator's."""
    bounds = text_bounds(cu_seqlens)
    dtype, width = v.dtype, v.shape[3]
    if normalize:  # in float32, so that the quotient is rounded and not its two parts
        v = torch.cat([v.float(), torch.ones_like(v[..., :1], dtype=torch.float32)], dim=-1)
    texts = v.shape[0] if bounds is None else len(bounds) - 1
    state = filled(state, (texts, v.shape[2], q.shape[3], v.shape[3]), v)
    factor = 1.0 if normalize else q.shape[3] ** -0.5 if scale is None else scale
    if g is not None and g.ndim == 4:
        o, state = vector_attention(q, k, v, g, state, bounds, factor)
    else:
        if q.dtype != k.dtype:
            q, k = q.float(), k.float()
        g = None if g is None else g.float()
        o, state = scalar_attention(q, k, v, g, None, None, None, None, state, bounds, factor)
    if normalize:
        o = (o[..., :width] / (o[..., width:] + EPSILON)).to(dtype)
    return o, state
