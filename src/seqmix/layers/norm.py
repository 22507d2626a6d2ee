"""The norms that models are built of."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from seqmix.layers.progressive_norm import Affine, ProgressiveNorm

NORMS: dict[str, type[nn.Module]] = {
    "rms": nn.RMSNorm,
    "layer": nn.LayerNorm,
    "progressive_batch": ProgressiveNorm,
    "affine": Affine,
    "none": nn.Identity,
}


class RMSNorm(nn.RMSNorm):
    """y = x / sqrt(mean(x^2) + eps) * weight over the last axis, in the weight's dtype, returned in that of x.

    In mixed precision activations come in bfloat16 to a float32 weight, for which PyTorch's own module warns
    and rounds the squares. Zhang & Sennrich 2019 (arXiv:1910.07467), eq. 4.
    """

    def forward(self, x: Tensor) -> Tensor:
        wide = x if self.weight is None else x.to(self.weight.dtype)
        return F.rms_norm(wide, self.normalized_shape, self.weight, self.eps).to(x.dtype)
