"""Short convolution, compiled: taps, bias and activation in one pass (csrc/short_convolution.cpp).

    y_t = f(sum_i weight[:, W-1-i] x_{t-i} + bias)

Either the time or the last axis of x may be contiguous: neither layout is copied.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from seqmix.kernels._custom import (
    custom_operator,
    differentiable,
    empty_in_layout,
    filled,
    needs_no_dispatcher,
    sum_rows,
    text_bounds,
)
from seqmix.kernels._native import native


def short_convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_state: Tensor | None,
    *,
    activation: str | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """y [B, T, D] in the dtype and layout of x [B, T, D], and the last W-1 inputs [R, W-1, D] in float32."""
    bounds = text_bounds(cu_seqlens)
    rows = x.shape[0] if bounds is None else bounds.shape[0] - 1
    state = filled(initial_state, (rows, weight.shape[1] - 1, x.shape[2]), x)
    bias = None if bias is None else bias.float()
    return _forward(x, weight.float(), bias, state, bounds, activation == "silu")


def short_convolution_update(
    x: Tensor,
    state: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
) -> Tensor:
    """y [B, T, D] of a few tokens x [B, T, D], for decoding: `state` [B, S, D] then holds the last S inputs.

    S is at least W - 1; the state may have any strides and float32 or bfloat16, and is written in place.
    """
    tensors = (x, state, weight.float(), None if bias is None else bias.float())
    update = _run_update if needs_no_dispatcher(x, tensors) else _update
    return update(*tensors, activation == "silu")


def _convolve(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    state: Tensor,
    bounds: Tensor | None,
    silu: bool,
    last: Tensor,
) -> Tensor:
    y = empty_in_layout(x)
    threads = torch.get_num_threads()
    size = native.short_convolution_workspace(weight.shape[1], state.shape[1])
    work = x.new_empty((threads, size), dtype=torch.float32)
    bias = None if bias is None else bias.contiguous()
    native.short_convolution(x, weight, bias, state, bounds, silu, y, last, work, threads)
    return y


def _run(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    state: Tensor,
    bounds: Tensor | None,
    silu: bool,
) -> tuple[Tensor, Tensor]:
    last = state.new_empty(state.shape)
    return _convolve(x, weight, bias, state, bounds, silu, last), last


def _fake(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    state: Tensor,
    bounds: Tensor | None,
    silu: bool,
) -> tuple[Tensor, Tensor]:
    return empty_in_layout(x), state.new_empty(state.shape)


def _run_update(
    x: Tensor, state: Tensor, weight: Tensor, bias: Tensor | None, silu: bool
) -> Tensor:
    y = _convolve(x, weight, bias, state, None, silu, state)
    torch.autograd.graph.increment_version(state)
    return y


def _fake_update(
    x: Tensor, state: Tensor, weight: Tensor, bias: Tensor | None, silu: bool
) -> Tensor:
    return empty_in_layout(x)


def _run_backward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    state: Tensor,
    bounds: Tensor | None,
    grad_y: Tensor,
    grad_last: Tensor,
    silu: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    texts, reach, channels = state.shape
    threads = torch.get_num_threads()
    size = native.short_convolution_workspace(reach + 1, reach)
    work = x.new_empty((threads, size), dtype=torch.float32)
    grad_x, grad_state = empty_in_layout(x), state.new_empty(state.shape)
    grad_channels = weight.new_empty((texts, reach + 2, channels))
    bias = None if bias is None else bias.contiguous()
    given = (x, weight, bias, state, bounds, silu, grad_y, grad_last)
    native.short_convolution_backward(*given, grad_x, grad_state, grad_channels, work, threads)
    total = sum_rows(grad_channels)
    return grad_x, total[:-1].T.contiguous(), total[-1].clone(), grad_state


def _fake_backward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    state: Tensor,
    bounds: Tensor | None,
    grad_y: Tensor,
    grad_last: Tensor,
    silu: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return (
        empty_in_layout(x),
        weight.new_empty(weight.shape),
        weight.new_empty(weight.shape[:1]),
        state.new_empty(state.shape),
    )


_forward = custom_operator(
    "short_convolution(Tensor x, Tensor weight, Tensor? bias, Tensor state, Tensor? bounds, bool silu)"
    " -> (Tensor, Tensor)",
    _run,
    _fake,
)
_update = custom_operator(
    "short_convolution_update(Tensor x, Tensor(a!) state, Tensor weight, Tensor? bias, bool silu) -> Tensor",
    _run_update,
    _fake_update,
)
_backward = custom_operator(
    "short_convolution_backward(Tensor x, Tensor weight, Tensor? bias, Tensor state, Tensor? bounds,"
    " Tensor grad_y, Tensor grad_last, bool silu) -> (Tensor, Tensor, Tensor, Tensor)",
    _run_backward,
    _fake_backward,
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, bias, state, bounds, silu = inputs
    ctx.save_for_backward(x, weight, bias, state, bounds)
    ctx.silu = silu


def _gradients(ctx: Any, grad_y: Tensor, grad_last: Tensor) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors  # once: checkpointing allows no second look
    grad_x, grad_weight, grad_bias, grad_state = _backward(*saved, grad_y, grad_last, ctx.silu)
    bias = None if saved[2] is None else grad_bias
    return grad_x, grad_weight, bias, grad_state, None, None


differentiable(_forward, _gradients, _setup_context)
