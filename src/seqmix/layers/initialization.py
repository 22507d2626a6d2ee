"""Where decays and step sizes of recurrences start from, as in Mamba and Mamba-2."""

from __future__ import annotations

import math

import torch
from torch import Tensor

SLOWEST, FASTEST = 1.0, 16.0  # decay rates are drawn uniformly between them
SHORTEST, LONGEST = 1e-3, 1e-1  # step sizes are drawn between them, uniformly on a log scale


def initial_log_rate(count: int) -> Tensor:
    """Logarithms [count] of decay rates."""
    return (SLOWEST + (FASTEST - SLOWEST) * torch.rand(count)).log()


def initial_log_step(count: int) -> Tensor:
    """Logarithms [count] of step sizes."""
    low, high = math.log(SHORTEST), math.log(LONGEST)
    return low + (high - low) * torch.rand(count)


def initial_step_bias(count: int) -> Tensor:
    """Biases b [count] such that softplus(b) is a step size."""
    step = initial_log_step(count).exp()
    return step + torch.log(-torch.expm1(-step))  # the inverse of softplus
