"""State space dual, compiled: h_t = exp(dt_t A) h_{t-1} + B_t (dt_t x_t)^T, y_t = h_t^T C_t + D x_t.

The kernel is that of linear attention (csrc/linear_attention_scalar.hpp) with q = C, k = B and v = x.
"""

from __future__ import annotations

from torch import Tensor

from seqmix.kernels._custom import filled, text_bounds
from seqmix.kernels._scalar_attention import scalar_attention


def state_space_dual(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    dt_bias: Tensor | None,
    state: Tensor | None,
    *,
    softplus: bool,
    negative_eigenvalues: bool,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """y [B, T, H, P] in the dtype of x, and the last h [R, H, N, P] in float32; arguments as the operator's."""
    bounds = text_bounds(cu_seqlens)
    texts = x.shape[0] if bounds is None else len(bounds) - 1
    state = filled(state, (texts, x.shape[2], B.shape[3], x.shape[3]), x)
    if B.dtype != C.dtype:
        B, C = B.float(), C.float()
    rate, bias, skip = (None if t is None else t.float() for t in (A, dt_bias, D))
    return scalar_attention(
        *(C, B, x, None, dt.float(), rate, bias, skip, state, bounds, 1.0),
        softplus=softplus,
        negative=negative_eigenvalues,
    )
