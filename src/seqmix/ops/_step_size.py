"""Step sizes and decay rates of discretised state spaces: exp(step * rate) is the decay of one token."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from seqmix.core.errors import RangeError


def step_size(
    operator: str, name: str, step: Tensor, bias: Tensor | None, *, softplus: bool
) -> Tensor:
    """`step + bias`, through a softplus where asked; raises `RangeError` where a step is below 0 or NaN."""
    if bias is not None:
        step = step + bias
    if softplus:
        return F.softplus(step)
    if step.numel() and not bool((step.detach() >= 0).all()):
        raise RangeError(
            f"{operator}: `{name}` (with its bias) falls to {float(step.detach().min()):.4g}, wanted step "
            f"sizes of at least 0 (and no NaN). Pass {name}_softplus=True for unbounded values."
        )
    return step


def check_decay_rate(operator: str, name: str, rate: Tensor) -> None:
    """Raises `RangeError` unless every rate is finite and at most 0, so that no state can grow."""
    values = rate.detach()
    if values.numel() and not bool(((values <= 0) & torch.isfinite(values)).all()):
        raise RangeError(
            f"{operator}: `{name}` runs from {float(values.min()):.4g} to {float(values.max()):.4g}, wanted "
            f"finite decay rates of at most 0. Store the logarithm and pass {name} = -torch.exp(log)."
        )
