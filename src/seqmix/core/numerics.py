"""How errors are measured, and in which precision recurrences are computed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def wide_dtype(*tensors: Tensor | None) -> torch.dtype:
    """The dtype in which an operator computes and keeps its state: float64 if any input is, else float32."""
    return (
        torch.float64
        if any(t is not None and t.dtype == torch.float64 for t in tensors)
        else torch.float32
    )


def widen(*tensors: Tensor | None) -> tuple[Any, ...]:
    """Casts every given tensor to their `wide_dtype`; None stays None (so the results are typed as given)."""
    dtype = wide_dtype(*tensors)
    return tuple(None if t is None else t.to(dtype) for t in tensors)


def relative_error(got: Tensor, exact: Tensor) -> float:
    """||got - exact|| / ||exact|| in float64; NaN if `got` holds a NaN."""
    exact = exact.detach().double()
    size = exact.norm().clamp_min(1e-30)
    return float((got.detach().double() - exact).norm() / size)


def assert_as_accurate(
    got: Tensor, exact: Tensor, plain: Tensor, *, what: str, slack: float = 4.0, floor: float = 2e-6
) -> None:
    """Raises unless `got` is about as near to `exact` as `plain`, the naive same-dtype computation, is.

    The budget is `slack * error(plain) + floor`, so no test carries a tolerance of its own.
    """
    if got.shape != exact.shape:
        raise AssertionError(f"{what}: shape {list(got.shape)}, wanted {list(exact.shape)}")
    error, reference = relative_error(got, exact), relative_error(plain, exact)
    # A vanishing exact value has no relative error: compare sizes with one instead.
    if float(exact.detach().abs().max() if exact.numel() else 0) < 1e-12:
        error = float(got.detach().double().abs().max()) if got.numel() else 0.0
    budget = slack * reference + floor
    if not error <= budget:  # NaN fails too
        raise AssertionError(f"{what}: error {error:.2e}, allowed {budget:.2e}")


def assert_equal_within(got: Tensor, wanted: Tensor, *, what: str, tolerance: float = 1e-5) -> None:
    """Raises unless the two agree to `tolerance`, relative to the norm of `wanted` (and to one)."""
    if got.shape != wanted.shape:
        raise AssertionError(f"{what}: shape {list(got.shape)}, wanted {list(wanted.shape)}")
    if not got.numel():
        return
    difference = float((got.detach().double() - wanted.detach().double()).abs().max())
    size = max(1.0, float(wanted.detach().double().abs().max()))
    if not difference <= tolerance * size:
        raise AssertionError(f"{what}: differs by {difference:.2e}, allowed {tolerance * size:.2e}")
