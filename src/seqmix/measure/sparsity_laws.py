"""The laws by which the share of active neurons changes with training data, fitted to measurements.

    SiLU:  A(D) = A_0 - c D^-a             rises and converges to A_0
    ReLU:  A(D) = A_0 + exp(b - c D^a)     falls and converges to A_0

A is the share of neurons that stay (`seqmix.measure.activation_sparsity`), D the tokens trained on, c and a
positive. Luo et al. 2024 (arXiv:2411.02335), section 4. The exponent (and for ReLU the limit) is searched on a
grid; what is left is linear.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from seqmix.core.errors import DataError

EXPONENTS = np.geomspace(0.05, 3.0, 60)
LIMITS = np.linspace(0.0, 0.999, 60)  # as a share of the smallest measurement
FEWEST = 4  # points: one more than the rising law has parameters


@dataclass(frozen=True)
class Law:
    """`explained` is the share of the variance around the mean that the law explains."""

    limit: float
    exponent: float
    explained: float


def rising_power_law(tokens: Sequence[float], ratios: Sequence[float]) -> Law:
    """The best A_0 - c D^-a with c at least 0, by least squares."""
    x, y = _points(tokens, ratios)
    found = []
    for exponent in EXPONENTS:
        columns = np.stack([np.ones_like(x), -(x**-exponent)], axis=1)
        (limit, scale), *_ = np.linalg.lstsq(columns, y)
        if scale < 0:  # it falls: the nearest that does not is a constant
            limit, scale = y.mean(), 0.0
        found.append((y - columns @ [limit, scale], limit, exponent))
    return _best(found, y)


def falling_logspace_power_law(tokens: Sequence[float], ratios: Sequence[float]) -> Law:
    """The best A_0 + exp(b - c D^a) with c at least 0, by least squares on log(A - A_0) for every A_0 tried."""
    x, y = _points(tokens, ratios)
    found = []
    for limit in LIMITS * y.min():
        logarithms = np.log(y - limit)
        for exponent in EXPONENTS:
            columns = np.stack([np.ones_like(x), -(x**exponent)], axis=1)
            (offset, scale), *_ = np.linalg.lstsq(columns, logarithms)
            if scale < 0:
                offset, scale = logarithms.mean(), 0.0
            predicted = limit + np.exp(columns @ [offset, scale])
            found.append((y - predicted, limit, exponent))
    return _best(found, y)


def _points(tokens: Sequence[float], ratios: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    x, y = np.asarray(tokens, dtype=np.float64), np.asarray(ratios, dtype=np.float64)
    if len(x) != len(y) or len(x) < FEWEST or x.min() <= 0 or y.min() <= 0:
        raise DataError(
            f"A law needs at least {FEWEST} positive numbers of tokens and as many positive ratios, got "
            f"{len(x)} and {len(y)}."
        )
    return x / x.min(), y  # the unit of the tokens changes neither limit nor exponent


def _best(found: list[tuple[np.ndarray, float, float]], y: np.ndarray) -> Law:
    residual, limit, exponent = min(found, key=lambda one: float((one[0] ** 2).sum()))
    variance = float(((y - y.mean()) ** 2).sum())
    explained = 1 - float((residual**2).sum()) / variance if variance else 1.0
    return Law(float(limit), float(exponent), explained)
