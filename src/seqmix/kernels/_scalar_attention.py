"""The compiled kernel behind linear attention with one decay per head and the state space dual.

S_t = d_t S_{t-1} + k_t (s_t v_t)^T and o_t = scale S_t^T q_t + D v_t (csrc/linear_attention_scalar.hpp).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from seqmix.kernels._custom import (
    columns_contiguous,
    custom_operator,
    differentiable,
    needs_no_dispatcher,
    sum_rows,
)
from seqmix.kernels._native import native

FEW = 8  # tokens of a row up to which the kernel takes one by one, as in csrc/linear_attention.hpp
HEADS_AT_ONCE = 16  # at most, of those that share q and k: each keeps its states in the workspace
BACKWARD_TASKS = (
    4  # at least, whatever the threads: into how many sums a gradient is cut decides its last bits
)


def scalar_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gate: Tensor | None,
    step: Tensor | None,
    rate: Tensor | None,
    bias: Tensor | None,
    skip: Tensor | None,
    state: Tensor,
    bounds: Tensor | None,
    scale: float,
    softplus: bool = False,
    negative: bool = False,
) -> tuple[Tensor, Tensor]:
    """o [B, T, H, V] in the dtype of v and the last state [N, H, K, V].

    q, k [B, T, G, K] in one dtype; v [B, T, H, V]. The decay is exp(gate), gate [B, T, H], or with
    s = step + bias (through a softplus where asked) exp(s rate), step [B, T, H], and rate, bias, skip (D) [H];
    2 exp(s rate) - 1 where `negative`. All but q, k and v in float32.
    """
    tensors = (q, k, v, gate, step, rate, bias, skip, state)
    compute = _run if is_quick(v, tensors) else _forward
    o, last = compute(*tensors, bounds, scale, softplus, negative)
    return o, last


def is_quick(v: Tensor, tensors: Sequence[Tensor | None]) -> bool:
    """Whether the dispatcher would take longer than the kernel, and has nothing to do; `v` [B, T, ...]."""
    return v.shape[1] <= FEW and needs_no_dispatcher(v, tensors)


def _prepared(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gate: Tensor | None,
    step: Tensor | None,
    rate: Tensor | None,
    bias: Tensor | None,
    skip: Tensor | None,
    state: Tensor,
    bounds: Tensor | None,
    scale: float,
    softplus: bool,
    negative: bool,
    *,
    tasks: int,
) -> tuple[Any, int, Any]:
    """The arguments for the kernel, the pieces of a group of heads, and the tensors that must outlive the call."""
    kept = q, k, v, state = tuple(columns_contiguous(tensor) for tensor in (q, k, v, state))
    groups, shared = q.shape[2], v.shape[2] // q.shape[2]
    texts = state.shape[0]
    pieces = -(-shared // HEADS_AT_ONCE)
    pieces = max(pieces, min(shared, -(-tasks // max(1, texts * groups))))
    described = native.ScalarAttention(
        q, k, v, gate, step, rate, bias, skip, state, bounds, scale, softplus, negative, pieces
    )
    return described, pieces, kept


def _workspace(size: int, like: Tensor) -> Tensor:
    return torch.empty(torch.get_num_threads() * size, dtype=torch.float32, device=like.device)


def _run(*inputs: Any) -> tuple[Tensor, Tensor]:
    threads = torch.get_num_threads()
    described, _, _kept = _prepared(*inputs, tasks=2 * threads if threads > 1 else 1)
    o, last = _fake(*inputs)
    workspace = _workspace(described.forward_workspace(), o)
    described.forward(o, last, workspace, torch.get_num_threads())
    return o, last


def _fake(*inputs: Any) -> tuple[Tensor, Tensor]:
    v, state = inputs[2], inputs[8]
    return v.new_empty(v.shape), state.new_empty(state.shape)


def _run_backward(grad_o: Tensor, grad_last: Tensor, *inputs: Any) -> tuple[Tensor, ...]:
    described, pieces, _kept = _prepared(*inputs, tasks=BACKWARD_TASKS)
    results = _fake_backward(grad_o, grad_last, *inputs)
    grad_q, grad_k, grad_v, grad_gate, grad_rate, grad_skip, grad_state = results
    texts, parts = inputs[8].shape[0], [grad_q.unsqueeze(0), grad_k.unsqueeze(0)]
    if pieces > 1:
        parts = [
            grad.new_empty(pieces, *grad.shape, dtype=torch.float32) for grad in (grad_q, grad_k)
        ]
    rate, skip = (grad.new_empty(texts, *grad.shape) for grad in (grad_rate, grad_skip))
    decays = inputs[3] is not None or inputs[5] is not None
    workspace = _workspace(described.backward_workspace(), grad_o)
    grad_o, grad_last = columns_contiguous(grad_o), columns_contiguous(grad_last)
    described.backward(
        grad_o,
        grad_last,
        *parts,
        grad_v,
        grad_gate if decays else None,
        rate if inputs[5] is not None else None,
        skip if inputs[7] is not None else None,
        grad_state,
        workspace,
        torch.get_num_threads(),
    )
    if pieces > 1:
        for grad, part in zip((grad_q, grad_k), parts, strict=True):
            grad.copy_(sum_rows(part))
    if inputs[5] is not None:
        grad_rate.copy_(sum_rows(rate))
    if inputs[7] is not None:
        grad_skip.copy_(sum_rows(skip))
    return results


def _fake_backward(grad_o: Tensor, grad_last: Tensor, *inputs: Any) -> tuple[Tensor, ...]:
    """Gradients of q, k, v, the gate or the step, rate, skip and state; empty where there is no such argument."""
    q, k, v, gate, step, rate, _, skip, state = inputs[:9]
    decay = gate if step is None else step
    return tuple(
        state.new_empty(0) if like is None else like.new_empty(like.shape)
        for like in (q, k, v, decay, rate, skip, state)
    )


_ARGUMENTS = (
    "Tensor q, Tensor k, Tensor v, Tensor? gate, Tensor? step, Tensor? rate, Tensor? bias, Tensor? skip, "
    "Tensor state, Tensor? bounds, float scale, bool softplus, bool negative"
)
_forward = custom_operator(
    f"scalar_attention({_ARGUMENTS}) -> (Tensor, Tensor)",
    _run,
    _fake,
)
_backward = custom_operator(
    f"scalar_attention_backward(Tensor grad_o, Tensor grad_last, {_ARGUMENTS})"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _run_backward,
    _fake_backward,
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:10])
    ctx.options = inputs[10:]


def _gradients(ctx: Any, grad_o: Tensor, grad_last: Tensor) -> tuple[Tensor | None, ...]:
    inputs = ctx.saved_tensors
    q, k, v, decay, rate, skip, state = _backward(grad_o, grad_last, *inputs, *ctx.options)
    gate, step, bias = None, None, None
    if inputs[3] is not None:
        gate = decay
    elif inputs[4] is not None:
        step = decay
        bias = None if inputs[6] is None else decay.sum((0, 1))
    given = (rate if inputs[5] is not None else None, bias, skip if inputs[7] is not None else None)
    return (q, k, v, gate, step, *given, state, None, None, None, None)


differentiable(_forward, _gradients, _setup_context)
