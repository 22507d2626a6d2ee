"""A layer norm that gives way to a batch norm while a model is trained, and costs nothing afterwards.

    y = r * LayerNorm(x) + (1 - r) * (BatchNorm(x) + eta * x)        r falls from 1 to 0 over `steps` forward passes

A batch norm with the statistics of training is y = a * x + b per channel, and so is the whole once r is 0: the next
linear layer can take it over (`seqmix.compress.fold_norms`). Replacing the layer norm at once trains badly.
Guo et al. 2024 (arXiv:2405.11582), section 3.2, eq. 4-6; as in the authors' code eta starts at 1, and every training
forward pass counts as a step. In their evaluation r is always 0, here it is where training has brought it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from seqmix.core.errors import ConfigError

MOMENTUM = 0.1  # of the running statistics


class ProgressiveNorm(nn.Module):
    """x [..., D] to y [..., D]; `switch_over` says how many forward passes the change takes."""

    mean: Tensor
    variance: Tensor
    passes: Tensor
    steps: Tensor

    def __init__(self, width: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))  # of the layer norm, which goes in the end
        self.bias = nn.Parameter(torch.zeros(width))
        self.batch_weight = nn.Parameter(torch.ones(width))
        self.batch_bias = nn.Parameter(torch.zeros(width))
        self.skip = nn.Parameter(torch.ones(1))
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("variance", torch.ones(width))
        self.register_buffer("passes", torch.zeros((), dtype=torch.long))
        self.register_buffer("steps", torch.ones((), dtype=torch.long))

    @property
    def layer_share(self) -> float:
        """r: how much of the layer norm is left."""
        steps = int(self.steps)
        return max(0.0, 1 - int(self.passes) / steps) if steps else 0.0

    def forward(self, x: Tensor) -> Tensor:
        wide, share = x.to(self.weight.dtype), self.layer_share
        batch = F.batch_norm(
            wide.reshape(-1, wide.shape[-1]),
            self.mean,
            self.variance,
            self.batch_weight,
            self.batch_bias,
            self.training,
            MOMENTUM,
            self.eps,
        )
        y = batch.view_as(wide) + self.skip * wide
        if share:
            y = share * F.layer_norm(wide, x.shape[-1:], self.weight, self.bias, self.eps) + (
                (1 - share) * y
            )
        if self.training:
            self.passes += 1
        return y.to(x.dtype)

    def affine(self) -> tuple[Tensor, Tensor]:
        """a and b [D] such that y = a x + b; raises `ConfigError` while some of the layer norm is left."""
        if share := self.layer_share:
            raise ConfigError(
                f"progressive_batch: {share:.0%} of the layer norm is left, which is no factor per channel. Train on "
                "until it has gone (seqmix.layers.progressive_norm.switch_over sets how soon)."
            )
        factor = self.batch_weight * (self.variance + self.eps).rsqrt()
        return factor + self.skip, self.batch_bias - factor * self.mean

    def extra_repr(self) -> str:
        return f"{len(self.weight)}, eps={self.eps}, layer_share={self.layer_share:.2f}"


class Affine(nn.Module):
    """y = weight * x + bias, [..., D]: what is left of a batch norm where no linear layer follows."""

    def __init__(self, width: int, eps: float = 0.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addcmul(self.bias, x, self.weight)


def switch_over(model: nn.Module, steps: int) -> None:
    """Lets every progressive norm of `model` become a batch norm over the next `steps` training passes (0: now)."""
    if steps < 0:
        raise ConfigError(f"switch_over: steps={steps}, wanted at least 0.")
    for module in model.modules():
        if isinstance(module, ProgressiveNorm):
            module.steps.fill_(steps)
            module.passes.zero_()
