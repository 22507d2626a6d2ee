"""How far the order in which a model fills a text is that from left to right.

    local(k)  = share of steps t > k in which t - k, ..., t have written k + 1 places in a row, from left to right
    global(k) = share of steps that have written one of the first k places that were still empty

Both are 1 for an autoregressive model. For an order that is drawn at random, global(1) is H_N / N for N places, H_N =
1 + 1/2 + ... + 1/N, and local(1) is 1 / N. Gong et al. 2025 (DiffuCoder, arXiv:2506.20639), section 4.1 and
appendix A.2, there AR-ness@k.

Axes: B texts, N places.
"""

from __future__ import annotations

from torch import Tensor

from seqmix.core.errors import RangeError, ShapeError


def local_causality(order: Tensor, k: int = 1) -> Tensor:
    """[B], from the number [B, N] of the step in which each place was written, one place a step."""
    _check(order, k)
    jumps = order.argsort(dim=1).diff(dim=1)
    return (jumps == 1).unfold(1, k, 1).all(dim=-1).double().mean(dim=1)


def global_causality(order: Tensor, k: int = 1) -> Tensor:
    """[B], from the number [B, N] of the step in which each place was written, one place a step."""
    _check(order, k)
    later = order.unsqueeze(1) > order.unsqueeze(
        2
    )  # [B, place, other place]: that is written afterwards
    skipped = later.tril(-1).sum(dim=2)
    return (skipped < k).double().mean(dim=1)


def _check(order: Tensor, k: int) -> None:
    if order.ndim != 2 or order.shape[1] < 2:
        raise ShapeError(f"`order` has shape {list(order.shape)}, wanted [B, N] with N above 1.")
    if not 1 <= k < order.shape[1]:
        raise RangeError(f"k={k}, wanted 1 to {order.shape[1] - 1}.")
    steps = order.sort(dim=1).values
    if not bool((steps.diff(dim=1) == 1).all()):
        raise RangeError("`order`: wanted a step of its own for every place. Fill one per step.")
