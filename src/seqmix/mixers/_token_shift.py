"""The token before: what the mixers of RWKV blend every token with.

Peng et al. 2023 (arXiv:2305.13048), section 3.1.1. Axes: B batch (N rows of packed texts), T time, D width.
"""

from __future__ import annotations

from torch import Tensor

from seqmix.ops.short_convolution import short_convolution


def token_before(
    x: Tensor, previous: Tensor | None = None, cu_seqlens: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """x [B, T, D] one place later, from `previous` [B, 1, D] on (zeros if none), and the last token [B, 1, D]."""
    one_back = x.new_tensor([1.0, 0.0]).expand(x.shape[-1], 2)
    before, last = short_convolution(
        x, one_back, initial_state=previous, output_final_state=True, cu_seqlens=cu_seqlens
    )
    assert last is not None
    return before, last
