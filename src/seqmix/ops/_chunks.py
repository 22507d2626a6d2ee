"""Pieces that chunked forms share. Axes: ... any, M chunks, C places in a chunk, K key width."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

# exp(-80) is zero beside any float32 value; a finite bound keeps cumulative sums meaningful after a hard reset.
LOWEST_LOG_DECAY = -80.0

# Decay over a block, in log space, up to which one product per side stays far inside float32's range.
SPAN = 60.0


def running_total(log_decay: Tensor, dim: int) -> Tensor:
    """The running sum of a log decay, at least `LOWEST_LOG_DECAY` per token, in float64.

    Differences of it are what is used. After a few hard resets a float32 sum of thousands would leave them
    three correct digits, and its gradient, a difference of sums, not many more.
    """
    return log_decay.clamp_min(LOWEST_LOG_DECAY).double().cumsum(dim)


def into_chunks(x: Tensor, chunk: int) -> Tensor:
    """`[B, T, H, ...]` to `[B, H, M, C, ...]`, zero-padded at the end."""
    batch, length, heads = x.shape[:3]
    missing = -length % chunk
    if missing:
        x = F.pad(x, [0, 0] * (x.ndim - 2) + [0, missing])
    x = x.reshape(batch, -1, chunk, heads, *x.shape[3:])
    return x.movedim(3, 1)


def from_chunks(x: Tensor, length: int) -> Tensor:
    """`[B, H, M, C, ...]` to `[B, T, H, ...]`."""
    return x.movedim(1, 3).flatten(1, 2)[:, :length]


def decay_matrix(log_decay: Tensor) -> Tensor:
    """`exp(sum of log_decay over (j, i])` for i >= j, else 0: `[..., C]` to `[..., C, C]`.

    The mask comes before the exponential, and differences are taken of one running sum, so nothing
    overflows however strong the decay.
    """
    total = running_total(log_decay, -1)
    difference = (total.unsqueeze(-1) - total.unsqueeze(-2)).to(log_decay.dtype)
    size = log_decay.shape[-1]
    future = torch.ones(size, size, dtype=torch.bool, device=log_decay.device).triu(1)
    return difference.masked_fill(future, -torch.inf).exp()


def decayed_scores(q: Tensor, k: Tensor, total: Tensor, *, smallest: int = 8) -> Tensor:
    """`sum_c q[i, c] k[j, c] exp(total[i, c] - total[j, c])` for i >= j, else 0, as `[..., C, C]`.

    `total [..., C, K]` is the `running_total` of a log decay per key dimension. exp(total[i]) * exp(-total[j])
    would overflow. While the decay over a block spans little, both are taken from its middle, and neither
    exceeds exp(SPAN / 2). Otherwise the square is halved: a later half meets an earlier one through the
    total at the border between them, which splits the exponential in two factors of at most 1, and only
    blocks of `smallest` are summed entry by entry (GLA, section 4.2: secondary chunking).
    """
    size = q.shape[-2]
    future = torch.ones(size, size, dtype=torch.bool, device=q.device).triu(1)
    first, last = total[..., :1, :], total[..., -1:, :]
    if float((first - last).detach().max()) <= SPAN:
        to_middle = (total - (first + last) / 2).to(q.dtype)
        scores = (q * to_middle.exp()) @ (k * (-to_middle).exp()).transpose(-1, -2)
        return scores.masked_fill(future, 0.0)
    if size <= smallest or size % 2:
        difference = (total.unsqueeze(-2) - total.unsqueeze(-3)).to(q.dtype)
        weight = difference.masked_fill(future.unsqueeze(-1), -torch.inf).exp()
        return torch.einsum("...ic,...jc,...ijc->...ij", q, k, weight)
    half = size // 2
    diagonal = decayed_scores(
        *(x.unflatten(-2, (2, half)) for x in (q, k, total)), smallest=smallest
    )
    border = total[..., half - 1 : half, :]
    later = q[..., half:, :] * (total[..., half:, :] - border).to(q.dtype).exp()
    earlier = k[..., :half, :] * (border - total[..., :half, :]).to(q.dtype).exp()
    lower = later @ earlier.transpose(-1, -2)
    top = torch.cat([diagonal[..., 0, :, :], torch.zeros_like(lower)], dim=-1)
    return torch.cat([top, torch.cat([lower, diagonal[..., 1, :, :]], dim=-1)], dim=-2)


def run_recurrence(decays: Sequence[Tensor], values: Sequence[Tensor], state: Tensor) -> Tensor:
    """`h_i = decays[i] h_{i-1} + values[i]`, written over `values`; returns the last h.

    One fused operation per step: where autograd need not see it, nothing in PyTorch runs a recurrence faster.
    """
    for decay, value in zip(decays, values, strict=True):
        state = value.addcmul_(decay, state)
    return state
