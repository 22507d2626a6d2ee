"""Selective scan, compiled: step sizes, recurrence, skip and gate in one pass (csrc/selective_scan.cpp).

    h_t = d_t h_{t-1} + delta_t u_t B_t,   y_t = (C_t . h_t + D u_t) * silu(z_t)

with d_t = exp(delta_t A), or 2 exp(delta_t A) - 1 (signed). Of u, delta, z, B and C either the time or the last axis
may be contiguous: neither layout is copied.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from seqmix.kernels._custom import (
    custom_operator,
    differentiable,
    empty_in_layout,
    needs_no_dispatcher,
    sum_rows,
    text_bounds,
)
from seqmix.kernels._native import native

# As in the C++ source: tokens between kept states, channels of a task, and states of a vector.
TOKENS, PIECE, STATES = 32, 64, 16
# Pieces are summed into the gradients of B and C in at most so many parts, a count that fixes the order of sums.
PARTS = 16


def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    initial_state: Tensor | None,
    *,
    delta_softplus: bool,
    cu_seqlens: Tensor | None = None,
    negative: bool = False,
) -> tuple[Tensor, Tensor]:
    """y [B, T, E] in the dtype and layout of u [B, T, E], and the last h [R, E, N] in float32.

    B and C are [B, T, N], or [B, T, G, N] with maps of their own for each of G groups of channels.
    """
    inputs = (u, delta, A, B, C, D, z, delta_bias, initial_state)
    B, C = (maps.unsqueeze(2) if maps.ndim == 3 else maps for maps in (B, C))
    A = A.float()
    D, delta_bias, initial_state = (
        None if x is None else x.float() for x in (D, delta_bias, initial_state)
    )
    keep = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs)
    bounds = text_bounds(cu_seqlens)
    y, last, _ = _forward(
        u, delta, A, B, C, D, z, delta_bias, initial_state, bounds, delta_softplus, negative, keep
    )
    return y, last


def selective_scan_update(
    state: Tensor,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    *,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    negative: bool = False,
) -> Tensor:
    """One token, for decoding: y [B, E] of u, delta and z [B, E]; B and C are [B, N] or [B, G, N].

    `state` [B, E, N], in float32 or bfloat16 and with any strides, is written in place. No gradients.
    """
    A = A.float()
    D, delta_bias = (None if x is None else x.float() for x in (D, delta_bias))
    tensors = (state, u, delta, A, B, C, D, z, delta_bias)
    update = _run_update if needs_no_dispatcher(u, tensors) else _update
    return update(*tensors, delta_softplus, negative)


def _run(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    bias: Tensor | None,
    state: Tensor | None,
    bounds: Tensor | None,
    softplus: bool,
    negative: bool,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    D, bias = (None if x is None else x.contiguous() for x in (D, bias))
    inputs = (u, delta, A, B, C, D, z, bias, state, bounds, softplus, negative)
    results = _fake(*inputs, keep)
    y, last, borders = results
    threads = torch.get_num_threads()
    work = A.new_empty((threads, native.selective_scan_workspace(A.shape[1], False)))
    native.selective_scan(*inputs, y, last, borders if keep else None, work, threads)
    return results


def _run_update(
    state: Tensor,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    bias: Tensor | None,
    softplus: bool,
    negative: bool,
) -> Tensor:
    D, bias = (None if x is None else x.contiguous() for x in (D, bias))
    y = u.new_empty(u.shape)
    threads = torch.get_num_threads()
    work = A.new_empty((threads, native.selective_scan_workspace(A.shape[1], False)))
    native.selective_scan_update(
        state, u, delta, A, B, C, D, z, bias, softplus, negative, y, work, threads
    )
    torch.autograd.graph.increment_version(state)
    return y


def _fake_update(state: Tensor, u: Tensor, *rest: Any) -> Tensor:
    return u.new_empty(u.shape)


def _fake(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    bias: Tensor | None,
    state: Tensor | None,
    bounds: Tensor | None,
    softplus: bool,
    negative: bool,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    last = A.new_empty((_num_texts(u, bounds), *A.shape))
    borders = A.new_empty(_borders(u, A, B, bounds) if keep else (0,))
    return empty_in_layout(u), last, borders


def _num_texts(u: Tensor, bounds: Tensor | None) -> int:
    return u.shape[0] if bounds is None else bounds.shape[0] - 1


def _pieces(A: Tensor, B: Tensor) -> int:
    groups = B.shape[2]
    return groups * -(-(A.shape[0] // groups) // PIECE)


def _borders(u: Tensor, A: Tensor, B: Tensor, bounds: Tensor | None) -> tuple[int, int, int]:
    """The shape of the states before each block of tokens of every text."""
    batch, length = u.shape[:2]
    if bounds is None:
        blocks = batch * -(-length // TOKENS)
    else:
        blocks = length // TOKENS + bounds.shape[0]
    return blocks, _pieces(A, B), PIECE * -(-A.shape[1] // STATES) * STATES


def _run_backward(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    bias: Tensor | None,
    bounds: Tensor | None,
    borders: Tensor,
    grad_y: Tensor,
    grad_last: Tensor,
    softplus: bool,
    negative: bool,
) -> tuple[Tensor, ...]:
    D, bias = (None if x is None else x.contiguous() for x in (D, bias))
    texts, (batch, length, channels), (groups, states) = _num_texts(u, bounds), u.shape, B.shape[2:]
    threads = torch.get_num_threads()
    grad_u, grad_delta = empty_in_layout(u), empty_in_layout(delta)
    grad_z = None if z is None else empty_in_layout(z)
    grad_state, grad_A = A.new_empty((texts, *A.shape)), A.new_empty((texts, *A.shape))
    grad_channels = A.new_empty((texts, 2, channels))
    parts = max(1, min(_pieces(A, B), PARTS // texts))
    grad_maps = A.new_zeros((parts, 2, batch * length, groups * states))
    work = A.new_empty((threads, native.selective_scan_workspace(states, True)))
    given = (u, delta, A, B, C, D, z, bias, bounds, softplus, negative, borders, grad_y, grad_last)
    native.selective_scan_backward(
        *given,
        grad_u,
        grad_delta,
        grad_z,
        grad_state,
        grad_A,
        grad_channels,
        grad_maps,
        work,
        threads,
    )
    grad_B, grad_C = (
        sum_rows(grad_maps[:, which]).to(maps.dtype).view(batch, length, groups, states)
        for which, maps in enumerate((B, C))
    )
    grad_bias, grad_D = sum_rows(grad_channels).unbind(0)
    absent = A.new_empty(0)
    return (
        grad_u,
        grad_delta,
        sum_rows(grad_A),
        grad_B,
        grad_C,
        absent if D is None else grad_D.clone(),
        u.new_empty(0) if grad_z is None else grad_z,
        absent.clone() if bias is None else grad_bias.clone(),
        grad_state,
    )


def _fake_backward(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    bias: Tensor | None,
    bounds: Tensor | None,
    borders: Tensor,
    grad_y: Tensor,
    grad_last: Tensor,
    softplus: bool,
    negative: bool,
) -> tuple[Tensor, ...]:
    return (
        empty_in_layout(u),
        empty_in_layout(delta),
        A.new_empty(A.shape),
        B.new_empty(B.shape),
        C.new_empty(C.shape),
        A.new_empty(0 if D is None else A.shape[:1]),
        u.new_empty(0) if z is None else empty_in_layout(z),
        A.new_empty(0 if bias is None else A.shape[:1]),
        A.new_empty((_num_texts(u, bounds), *A.shape)),
    )


_forward = custom_operator(
    "selective_scan(Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, Tensor? bias,"
    " Tensor? state, Tensor? bounds, bool softplus, bool negative, bool keep) -> (Tensor, Tensor, Tensor)",
    _run,
    _fake,
)
_update = custom_operator(
    "selective_scan_update(Tensor(a!) state, Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor? D,"
    " Tensor? z, Tensor? bias, bool softplus, bool negative) -> Tensor",
    _run_update,
    _fake_update,
)
_backward = custom_operator(
    "selective_scan_backward(Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z,"
    " Tensor? bias, Tensor? bounds, Tensor borders, Tensor grad_y, Tensor grad_last, bool softplus, bool negative)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _run_backward,
    _fake_backward,
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    u, delta, A, B, C, D, z, bias, state, bounds, softplus, negative, _ = inputs
    ctx.save_for_backward(u, delta, A, B, C, D, z, bias, bounds, output[2])
    ctx.options = (softplus, negative)
    ctx.absent = [x is None for x in (D, z, bias, state)]
    ctx.set_materialize_grads(False)  # a gradient of the kept states would be as large as they are


def _gradients(
    ctx: Any, grad_y: Tensor | None, grad_last: Tensor | None, _: None
) -> tuple[Any, ...]:
    saved = ctx.saved_tensors  # once: checkpointing allows no second look
    u, A, bounds = saved[0], saved[2], saved[8]
    if grad_y is None:
        grad_y = torch.zeros_like(u)
    if grad_last is None:
        grad_last = A.new_zeros((_num_texts(u, bounds), *A.shape))
    *grads, grad_D, grad_z, grad_bias, grad_state = _backward(
        *saved, grad_y, grad_last, *ctx.options
    )
    optional = (grad_D, grad_z, grad_bias, grad_state)
    given = (None if absent else grad for grad, absent in zip(optional, ctx.absent, strict=True))
    return (*grads, *given, None, None, None, None)


differentiable(_forward, _gradients, _setup_context)
