"""The compiled kernel behind linear attention with a decay per key dimension (csrc/linear_attention_vector.hpp)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from seqmix.kernels._custom import columns_contiguous, custom_operator, differentiable
from seqmix.kernels._native import native
from seqmix.kernels._scalar_attention import is_quick


def vector_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    state: Tensor,
    bounds: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """o [B, T, H, V] in the dtype of v and the last state [N, H, K, V]; q, k, g [B, T, H, K], state in float32."""
    compute = _run if is_quick(v, (q, k, v, g, state)) else _forward
    o, last = compute(q, k, v, g, state, bounds, scale)
    return o, last


def _prepared(*inputs: Any) -> tuple[Any, Any]:
    """The arguments for the kernel, and the tensors that must outlive the call."""
    kept = tuple(columns_contiguous(tensor) for tensor in inputs[:5])
    return native.VectorAttention(*kept, *inputs[5:]), kept


def _workspace(size: int, like: Tensor) -> Tensor:
    return torch.empty(torch.get_num_threads() * size, dtype=torch.float32, device=like.device)


def _run(*inputs: Any) -> tuple[Tensor, Tensor]:
    described, _kept = _prepared(*inputs)
    o, last = _fake(*inputs)
    workspace = _workspace(described.forward_workspace(), o)
    described.forward(o, last, workspace, torch.get_num_threads())
    return o, last


def _fake(*inputs: Any) -> tuple[Tensor, Tensor]:
    v, state = inputs[2], inputs[4]
    return v.new_empty(v.shape), state.new_empty(state.shape)


def _run_backward(grad_o: Tensor, grad_last: Tensor, *inputs: Any) -> tuple[Tensor, ...]:
    described, _kept = _prepared(*inputs)
    results = _fake_backward(grad_o, grad_last, *inputs)
    grad_o, grad_last = columns_contiguous(grad_o), columns_contiguous(grad_last)
    workspace = _workspace(described.backward_workspace(), grad_o)
    described.backward(grad_o, grad_last, *results, workspace, torch.get_num_threads())
    return results


def _fake_backward(grad_o: Tensor, grad_last: Tensor, *inputs: Any) -> tuple[Tensor, ...]:
    return tuple(tensor.new_empty(tensor.shape) for tensor in inputs[:5])


_ARGUMENTS = "Tensor q, Tensor k, Tensor v, Tensor g, Tensor state, Tensor? bounds, float scale"
_forward = custom_operator(f"vector_attention({_ARGUMENTS}) -> (Tensor, Tensor)", _run, _fake)
_backward = custom_operator(
    f"vector_attention_backward(Tensor grad_o, Tensor grad_last, {_ARGUMENTS})"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _run_backward,
    _fake_backward,
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:6])
    ctx.scale = inputs[6]


def _gradients(ctx: Any, grad_o: Tensor, grad_last: Tensor) -> tuple[Tensor | None, ...]:
    return (*_backward(grad_o, grad_last, *ctx.saved_tensors, ctx.scale), None, None)


differentiable(_forward, _gradients, _setup_context)
