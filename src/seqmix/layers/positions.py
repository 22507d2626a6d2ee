"""Rotary positions: pairs of channels turn with the position, so that scores depend on distances.

    (x_i, x_{i + d/2}) turns by the angle p * base**(-2 i / d),  i = 0 ... d/2 - 1,  d channels, position p

Su et al. 2021 (arXiv:2104.09864), eq. 34, with the halves paired as in most checkpoints.
"""

from __future__ import annotations

import torch
from torch import Tensor

from seqmix.core.errors import ShapeError


def rotate(x: Tensor, positions: Tensor, base: float = 10000.0) -> Tensor:
    """x [B, T, H, d] turned by `positions` ([T] or [B, T], whole numbers); angles are computed in float32.

    Nothing is stored, so any position works and no table can be lost with a checkpoint.
    Raises `ShapeError` for an odd d.
    """
    width = x.shape[-1]
    if width % 2:
        raise ShapeError(
            f"rotate: `x` has {width} channels per head, wanted an even number. Change the heads."
        )
    exponents = torch.arange(0, width, 2, device=x.device, dtype=torch.float32) / width
    angles = positions.float().unsqueeze(-1) * base**-exponents  # [(B,) T, d/2]
    cos, sin = (turn.to(x.dtype).unsqueeze(-2) for turn in (angles.cos(), angles.sin()))
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
