"""Rounding of tensors, as pure functions: to steps of one size, by groups, to logarithmic levels, with a noisy bias.

A quantiser of n bits here has the 2^n - 1 whole numbers from -L to L, L = 2^(n-1) - 1.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from seqmix.linears.twin_log import from_log

CLIPS = (1.0, 0.9, 0.8, 0.7, 0.6)  # shares of the largest entry that may be the largest step
LARGEST_FACTOR = 15  # of a group: four bits
BASES = (1.15, 1.2, 1.25, 1.3, 1.4, 1.5, 1.7, 2.0, 2.5)  # of logarithmic levels


def largest(bits: int) -> int:
    """L, the largest whole number of a symmetric quantiser of so many bits."""
    return 2 ** (bits - 1) - 1


def to_steps(x: Tensor, step: Tensor | float, bits: int) -> Tensor:
    """x rounded to a whole number of steps, from -L to L; `step` broadcasts to x."""
    limit = largest(bits)
    return (x / step).round().clamp(-limit, limit) * step


def best_step(
    x: Tensor, bits: int, *, dim: int | None = None, clips: Sequence[float] = CLIPS
) -> Tensor:
    """The step with the least squared error along `dim`, or over all, of those that leave a share `clips` unclipped.

    Large entries are cut off where that serves the many small ones. Shape as x with `dim` (or every one) kept as 1.
    """
    dims = list(range(x.ndim)) if dim is None else [dim]
    peak = x.abs().amax(dims, keepdim=True).clamp_min(1e-30) / largest(bits)
    steps = torch.stack([share * peak for share in clips])
    errors = torch.stack(
        [(to_steps(x, step, bits) - x).square().sum(dims, keepdim=True) for step in steps]
    )
    return steps.gather(0, errors.argmin(0, keepdim=True))[0]


def in_groups(x: Tensor, group: int) -> Tensor:
    """[..., I] as [..., I / G, G]."""
    return x.unflatten(-1, (-1, group))


def four_bits(weight: Tensor, group: int) -> tuple[Tensor, Tensor, Tensor]:
    """W_oi = scale_o m_og q_oi: whole q [O, I] from -7 to 7, m [O, I / G] from 1 to 15 (int8), and scale [O].

    m q is a whole number of eight bits, so that products with it need no groups.
    """
    grouped = in_groups(weight.detach().float(), group)
    step = best_step(grouped, 4, dim=-1)  # [O, I / G, 1]
    scale = (step.amax(1, keepdim=True) / LARGEST_FACTOR).clamp_min(1e-30)
    factors = (step / scale).round().clamp(1, LARGEST_FACTOR)
    codes = (grouped / (factors * scale)).round().clamp(-largest(4), largest(4))
    return codes.flatten(1).to(torch.int8), factors[..., 0].to(torch.int8), scale.flatten()


def twin_log(weight: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """Twin logarithmic codes of every row: levels peak_s base^-k, k = 0, 1, ..., for each sign s.

    Returns codes [O, I] in int8, sign in the highest bit and k below, peaks [O, 2] of the positive and the negative
    levels, and bases [O]. Of `CLIPS` (shares of the largest weight of either sign that the peaks are) and `BASES`, a
    row has those with the least squared error.
    """
    weight = weight.detach().float()
    largest_of = torch.stack([weight.clamp_min(0).amax(1), (-weight).clamp_min(0).amax(1)], dim=1)
    ordered = weight.sort(dim=1).values
    sums, squares = (F.pad(x.cumsum(1), (1, 0)) for x in (ordered.double(), ordered.double() ** 2))
    best = sums.new_full((len(weight),), torch.inf)
    peaks, bases = torch.ones_like(largest_of), weight.new_ones(len(weight))
    for share in CLIPS:
        for base in BASES:
            tried = (share * largest_of.clamp_min(1e-30), torch.full_like(bases, base))
            error = _log_errors(ordered, sums, squares, *tried, bits)
            better = error < best
            best = torch.where(better, error, best)
            peaks[better], bases[better] = tried[0][better], base
    return _log_codes(weight, peaks, bases, bits), peaks, bases


def _log_errors(
    ordered: Tensor, sums: Tensor, squares: Tensor, peaks: Tensor, bases: Tensor, bits: int
) -> Tensor:
    """The squared error of each row [O], level by level.

    The weights of a row are in order [O, I], so those that get one level l are neighbours. The error of n of them is
    sum w^2 - 2 l sum w + n l^2, and both sums are differences of `squares` and `sums` [O, I + 1], which run up to each
    place.
    """
    half = 2 ** (bits - 1)
    descending = torch.arange(half, device=ordered.device)
    codes = torch.cat([half + descending, descending.flip(0)]).expand(len(ordered), -1)
    levels = from_log(codes, peaks, bases, bits)  # [O, 2 half], ascending
    middles = (levels[:, 1:] + levels[:, :-1]) / 2
    middles[:, half - 1] = 0  # a weight keeps its sign
    ends = F.pad(torch.searchsorted(ordered, middles), (1, 0))
    ends = F.pad(ends, (0, 1), value=ordered.shape[1])
    count, first, second = (
        x.diff(dim=1) for x in (ends, sums.gather(1, ends), squares.gather(1, ends))
    )
    return (second - 2 * levels * first + levels.double().square() * count).sum(1)


def _log_codes(weight: Tensor, peaks: Tensor, bases: Tensor, bits: int) -> Tensor:
    """The codes of the nearest levels."""
    levels = 2 ** (bits - 1)
    negative = weight < 0
    table = bases.unsqueeze(1) ** -torch.arange(levels, device=weight.device, dtype=weight.dtype)
    middles = ((table[:, :-1] + table[:, 1:]) / 2).flip(1).contiguous()
    relative = weight.abs() / peaks.gather(1, negative.long())
    k = levels - 1 - torch.searchsorted(middles, relative)
    return (k + levels * negative).to(torch.int8)


def noisy_error(x: Tensor, amplitude: float) -> Tensor:
    """E over N, uniform from -a to a, of (Q(x + N) - x - N)^2, for steps of size 1; x^2 near 0 without noise.

    The error at u is e(u) = u - round(u), and G(u) = integral of e^2 from 0 to u; the mean is
    (G(x + a) - G(x - a)) / 2a. Liu et al. 2022 (arXiv:2211.16056), section 3, theorem 1.
    """
    if amplitude == 0:
        return (x - x.round()).square()

    def integral(u: Tensor) -> Tensor:
        whole = u.round()
        return whole / 12 + (u - whole) ** 3 / 3

    return (integral(x + amplitude) - integral(x - amplitude)) / (2 * amplitude)
