"""The functions that transformers' hybrid models call for one token at a time: states and histories in place.

Where a token takes microseconds, what is around the arithmetic counts, so these call the compiled kernels without
the checks of our public functions. Gradients through a step, and dtypes that the kernels do not take, stay with
transformers' own PyTorch.
"""

from __future__ import annotations

from functools import wraps
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from seqmix.convert._functions import SILU, Function, computed_here, plain, taken
from seqmix.kernels.selective_scan import selective_scan_update
from seqmix.kernels.short_convolution import short_convolution_update


def causal_conv1d_update(reference: Function) -> Function:
    """The last inputs [B, D, L] move on by one place, and the taps meet the newest."""
    torch_only = plain(reference)

    @wraps(reference)
    def accelerated(
        hidden_states: Tensor,
        conv_state: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        activation: str | None = None,
    ) -> Tensor:
        if not computed_here(hidden_states):
            return reference(hidden_states, conv_state, weight, bias, activation)
        ours = activation is None or activation in SILU
        if not ours or _needs_torch(hidden_states, conv_state, weight):
            return torch_only(hidden_states, conv_state, weight, bias, activation)
        y = short_convolution_update(
            hidden_states.transpose(1, 2),
            conv_state.transpose(1, 2),
            weight,
            bias,
            activation="silu" if activation else None,
        )
        return y.transpose(1, 2)

    return accelerated


def mamba_selective_state_update(reference: Function) -> Function:
    """One token of the selective scan: `state` [B, E, N] is written in place."""
    torch_only = plain(reference)

    @wraps(reference)
    def accelerated(
        state: Tensor,
        hidden_states: Tensor,
        dt: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        D: Tensor | None = None,
        dt_bias: Tensor | None = None,
        dt_softplus: bool = False,
        z: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        if not computed_here(hidden_states):
            return reference(
                state, hidden_states, dt, A, B, C, D, dt_bias, dt_softplus, z, **kwargs
            )
        if _needs_torch(hidden_states, state, dt, A, B, C):
            return torch_only(state, hidden_states, dt, A, B, C, D, dt_bias, dt_softplus, z)
        return selective_scan_update(
            state,
            hidden_states,
            dt,
            A,
            B,
            C,
            D,
            z=z,
            delta_bias=dt_bias,
            delta_softplus=dt_softplus,
        )

    return accelerated


def mamba2_selective_state_update(reference: Function) -> Function:
    """One token of Mamba-2, h <- exp(dt A) h + (dt x) B^T, y = h C + D x: `state` h [B, H, P, N] in place.

    The callers repeat each head's step, rate, bias and skip for all of its values; here they are one number a head.
    """
    torch_only = plain(reference)

    @wraps(reference)
    def accelerated(
        state: Tensor,
        hidden_states: Tensor,
        dt: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        D: Tensor | None = None,
        dt_bias: Tensor | None = None,
        dt_softplus: bool = False,
        z: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        if not computed_here(hidden_states):
            return reference(
                state, hidden_states, dt, A, B, C, D, dt_bias, dt_softplus, z, **kwargs
            )
        per_head = _same_for_all(-1, dt, A, D, dt_bias) and _same_for_all(1, A)
        plain_state = state.dtype == torch.float32 and state.is_contiguous()
        if torch.is_grad_enabled() or not (per_head and plain_state):
            return torch_only(state, hidden_states, dt, A, B, C, D, dt_bias, dt_softplus, z)
        x = hidden_states.float()
        step = dt[..., 0].float()
        if dt_bias is not None:
            step = step + dt_bias[:, 0]
        if dt_softplus:
            step = F.softplus(step)
        batch, heads, width, states = state.shape
        shared = heads // B.shape[1]
        state.mul_((step * A[:, 0, 0]).exp()[..., None, None])
        by_group = state.view(-1, shared * width, states)  # heads of a group meet the same B and C
        written = (x * step.unsqueeze(-1)).view(-1, shared * width, 1)
        by_group.baddbmm_(written, B.reshape(-1, 1, states).float())
        y = by_group.bmm(C.reshape(-1, states, 1).float()).view(batch, heads, width)
        if D is not None:
            y = y + x * D[:, :1]
        if z is not None:
            y = y * F.silu(z.float())
        return y.to(hidden_states.dtype)

    return accelerated


def _same_for_all(axis: int, *tensors: Tensor | None) -> bool:
    """Whether every tensor repeats one number along the axis, as `expand` leaves it."""
    return all(x is None or x.stride(axis) == 0 for x in tensors)


def _needs_torch(*tensors: Tensor) -> bool:
    """Whether gradients may pass through the step, or a dtype is none of the kernels'."""
    return torch.is_grad_enabled() or not taken(*tensors)
