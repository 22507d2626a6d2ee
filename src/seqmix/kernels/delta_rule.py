"""Delta rule, compiled: decayed states that replace what they hold under a key (csrc/delta_rule.hpp)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from seqmix.kernels._custom import (
    columns_contiguous,
    custom_operator,
    differentiable,
    needs_no_dispatcher,
    text_bounds,
)
from seqmix.kernels._native import native

CHUNK = 64  # rows (steps of tokens) of a chunk, as in csrc/delta_rule.hpp
FEW = 8  # rows up to which they are written one by one
WIDEST_KEY = 512  # of the loop over tokens, as in csrc/delta_rule_tokens.hpp


def delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    g: Tensor | None,
    state: Tensor | None,
    *,
    steps: int = 1,
    scale: float | None = None,
    qk_l2norm: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """S <- exp(g_t) S, then `steps` times S <- S + beta k (v - S^T k)^T; o_t = scale * S^T q_t.

    q [B, T, G, K] and k [B, T*steps, G, K] may have fewer heads than v [B, T*steps, H, V]: value head h reads
    key head h // (H / G), and the gradients of a group's heads are summed. beta [B, T*steps, H], g [B, T, H] or
    [B, T, H, K] or None, `state` [N, H, K, V] or None for zeros. Returns o [B, T, H, V] in the dtype of v and the
    last S [N, H, K, V] in float32.
    """
    bounds = text_bounds(cu_seqlens)
    key_width = q.shape[3]
    if state is None:
        texts = len(q) if bounds is None else len(bounds) - 1
        state = v.new_zeros(texts, v.shape[2], key_width, v.shape[3], dtype=torch.float32)
    dtype = v.dtype
    if not q.dtype == k.dtype == dtype:
        q, k, v = q.float(), k.float(), v.float()
    beta, g, state = beta.float(), None if g is None else g.float(), state.float()
    factor = key_width**-0.5 if scale is None else float(scale)
    given = (q, k, v, beta, g, state, bounds, steps, factor, qk_l2norm)
    trains = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in given[:6])
    if _for_tokens(q, steps) and needs_no_dispatcher(v, given[:6]):
        o, last = _run_tokens(*given)  # the dispatcher takes longer than a token
    else:
        o, last, _ = _forward(*given, trains)
    return o.to(dtype), last


def _for_tokens(q: Tensor, steps: int) -> bool:
    return q.shape[1] * steps <= FEW and q.shape[3] <= WIDEST_KEY


def _run_tokens(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    g: Tensor | None,
    state: Tensor,
    bounds: Tensor | None,
    *options: Any,
) -> tuple[Tensor, Tensor]:
    q, k, v, state = (columns_contiguous(x) for x in (q, k, v, state))
    g = columns_contiguous(g) if g is not None and g.ndim == 4 else g
    o = v.new_empty(*q.shape[:2], *v.shape[2:])
    last = torch.empty_like(state, memory_format=torch.contiguous_format)
    threads = torch.get_num_threads()
    native.delta_rule_tokens(q, k, v, beta, g, state, bounds, *options, o, last, threads)
    return o, last


def _run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    g: Tensor | None,
    state: Tensor,
    bounds: Tensor | None,
    steps: int,
    scale: float,
    normalize: bool,
    borders: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """o, the last state, and with `borders` the states before every chunk [M, H, K, V], which backward reads."""
    q, k, v, state = (columns_contiguous(x) for x in (q, k, v, state))
    g = columns_contiguous(g) if g is not None and g.ndim == 4 else g
    given = (q, k, v, beta, g, state, bounds, steps, scale, normalize)
    if not borders and _for_tokens(q, steps):
        return *_run_tokens(*given), state.new_empty(0, *state.shape[1:])
    o, last, before = _fake(*given, borders)
    threads = torch.get_num_threads()
    workspace = state.new_empty(threads, native.delta_rule_workspace(*_sizes(q, v, steps)))
    native.delta_rule(*given, o, last, before if borders else None, workspace, threads)
    return o, last, before


def _fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    g: Tensor | None,
    state: Tensor,
    bounds: Tensor | None,
    steps: int,
    scale: float,
    normalize: bool,
    borders: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    batch, length = q.shape[:2]
    chunks = 0
    if borders:
        tokens = max(1, CHUNK // steps)
        # texts of a packed row each begin a chunk of their own: at most one more than their number
        chunks = -(-length // tokens) * batch if bounds is None else length // tokens + len(state)
    o = v.new_empty(batch, length, *v.shape[2:])
    return o, state.new_empty(state.shape), state.new_empty(chunks, *state.shape[1:])


def _run_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    g: Tensor | None,
    bounds: Tensor | None,
    before: Tensor,
    grad_o: Tensor,
    grad_last: Tensor,
    steps: int,
    scale: float,
    normalize: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    q, k, v, grad_o, grad_last = (columns_contiguous(x) for x in (q, k, v, grad_o, grad_last))
    g = columns_contiguous(g) if g is not None and g.ndim == 4 else g
    given = (q, k, v, beta, g, bounds)
    options = (steps, scale, normalize)
    results = _fake_backward(*given, before, grad_o, grad_last, *options)
    *gradients, grad_g, grad_state = results
    threads = torch.get_num_threads()
    size = native.delta_rule_backward_workspace(*_sizes(q, v, steps))
    native.delta_rule_backward(
        *given,
        *options,
        before,
        grad_o,
        grad_last,
        *gradients,
        None if g is None else grad_g,
        grad_state,
        grad_last.new_empty(threads, size),
        threads,
    )
    return results


def _fake_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    g: Tensor | None,
    bounds: Tensor | None,
    before: Tensor,
    grad_o: Tensor,
    grad_last: Tensor,
    steps: int,
    scale: float,
    normalize: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    given = (q, k, v, beta, beta.new_empty(0) if g is None else g, grad_last)
    q, k, v, beta, g, state = (x.new_empty(x.shape) for x in given)
    return q, k, v, beta, g, state


def _sizes(q: Tensor, v: Tensor, steps: int) -> tuple[int, int, int, int]:
    return q.shape[3], v.shape[3], steps, v.shape[2] // q.shape[2]


_forward = custom_operator(
    "delta_rule(Tensor q, Tensor k, Tensor v, Tensor beta, Tensor? g, Tensor state, Tensor? bounds, int steps,"
    " float scale, bool normalize, bool borders) -> (Tensor, Tensor, Tensor)",
    _run,
    _fake,
)
_backward = custom_operator(
    "delta_rule_backward(Tensor q, Tensor k, Tensor v, Tensor beta, Tensor? g, Tensor? bounds, Tensor before,"
    " Tensor grad_o, Tensor grad_last, int steps, float scale, bool normalize)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _run_backward,
    _fake_backward,
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    q, k, v, beta, g, _, bounds, *ctx.options, _ = inputs
    ctx.save_for_backward(q, k, v, beta, g, bounds, output[2])
    ctx.set_materialize_grads(False)  # a gradient of the saved states would be as large as they are


def _gradients(
    ctx: Any, grad_o: Tensor | None, grad_last: Tensor | None, _: None
) -> tuple[Tensor | None, ...]:
    q, k, v, beta, g, bounds, before = ctx.saved_tensors
    if grad_o is None:
        grad_o = v.new_zeros(*q.shape[:2], *v.shape[2:])
    if grad_last is None:
        texts = len(q) if bounds is None else len(bounds) - 1
        grad_last = before.new_zeros(texts, *before.shape[1:])
    results = _backward(q, k, v, beta, g, bounds, before, grad_o, grad_last, *ctx.options)
    *gradients, grad_g, grad_state = results
    return *gradients, None if g is None else grad_g, grad_state, None, None, None, None, None


differentiable(_forward, _gradients, _setup_context)
