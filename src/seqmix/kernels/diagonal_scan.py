"""Diagonal scan, compiled: h_t = exp(a_t) h_{t-1} + x_t (csrc/diagonal_scan.cpp)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from seqmix.kernels._custom import (
    columns_contiguous,
    custom_operator,
    differentiable,
    filled,
    text_bounds,
)
from seqmix.kernels._native import native


def diagonal_scan(
    x: Tensor, a: Tensor, state: Tensor | None, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor]:
    """h [B, T, D] in the dtype of x [B, T, D], and the last h [N, D] in float32; `state` [N, D] or None for zeros."""
    bounds = text_bounds(cu_seqlens)
    rows = x.shape[0] if bounds is None else len(bounds) - 1
    state = filled(state, (rows, x.shape[2]), x)
    return _forward(x, a, state, bounds)


def _run(x: Tensor, a: Tensor, state: Tensor, bounds: Tensor | None) -> tuple[Tensor, Tensor]:
    x, a, state = (columns_contiguous(tensor) for tensor in (x, a, state))
    h, last = _fake(x, a, state, bounds)
    native.diagonal_scan(x, a, state, bounds, h, last, torch.get_num_threads())
    return h, last


def _fake(x: Tensor, a: Tensor, state: Tensor, bounds: Tensor | None) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), state.new_empty(state.shape)


def _run_backward(
    a: Tensor, state: Tensor, bounds: Tensor | None, h: Tensor, grad_h: Tensor, grad_last: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    tensors = [columns_contiguous(tensor) for tensor in (a, state, h, grad_h, grad_last)]
    a, state, h, grad_h, grad_last = tensors
    results = _fake_backward(a, state, bounds, h, grad_h, grad_last)
    native.diagonal_scan_backward(
        a, state, bounds, h, grad_h, grad_last, *results, torch.get_num_threads()
    )
    return results


def _fake_backward(
    a: Tensor, state: Tensor, bounds: Tensor | None, h: Tensor, grad_h: Tensor, grad_last: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return h.new_empty(h.shape), a.new_empty(a.shape), state.new_empty(state.shape)


_forward = custom_operator(
    "diagonal_scan(Tensor x, Tensor a, Tensor state, Tensor? bounds) -> (Tensor, Tensor)",
    _run,
    _fake,
)
_backward = custom_operator(
    "diagonal_scan_backward(Tensor a, Tensor state, Tensor? bounds, Tensor h, Tensor grad_h, Tensor grad_last)"
    " -> (Tensor, Tensor, Tensor)",
    _run_backward,
    _fake_backward,
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    _, a, state, bounds = inputs
    ctx.save_for_backward(a, state, bounds, output[0])


def _gradients(ctx: Any, grad_h: Tensor, grad_last: Tensor) -> tuple[Tensor | None, ...]:
    return (*_backward(*ctx.saved_tensors, grad_h, grad_last), None)


differentiable(_forward, _gradients, _setup_context)
