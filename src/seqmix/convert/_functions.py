"""The functions that transformers' hybrid models call, computed by our operators.

A replacement is made from the reference that it replaces, has the same signature, and hands back to the reference
what it does not compute: tensors on other devices, tensor subclasses, and models being exported. One text a row goes
to the compiled kernels without the checks of our public functions; packed texts, and dtypes that the kernels do not
take, go through those.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import wraps
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.parameter import Parameter
from transformers.activations import ACT2FN

from seqmix.convert import _kernels as kernels
from seqmix.convert._texts import bounds_of, last_of_rows, one_row
from seqmix.kernels import missing, transformed
from seqmix.ops.delta_rule import delta_rule
from seqmix.ops.selective_scan import selective_scan
from seqmix.ops.short_convolution import short_convolution
from seqmix.ops.state_space_dual import state_space_dual

Function = Callable[..., Any]
SILU = ("silu", "swish")
_DTYPES = (torch.float32, torch.bfloat16)
_COMPILED = missing() is None


@dataclass(frozen=True)
class Replacement:
    """How one function is computed here: by which operator (none if not at all), and its first parameters."""

    operator: str
    make: Callable[[Function], Function]
    parameters: tuple[str, ...]


def computed_here(tensor: Tensor) -> bool:
    """Whether our operators compute with this tensor: a plain one on the CPU, in a model that is not exported.

    Not under transforms of torch.func or forward derivatives, of which the kernels know nothing.

    torch.compile follows the compiled kernels, but not the checks of our public functions.
    """
    if not (tensor.is_cpu and type(tensor) in (Tensor, Parameter)) or transformed():
        return False
    if not torch.compiler.is_compiling():
        return True
    return taken(tensor) and not torch.compiler.is_exporting()


def taken(*tensors: Tensor) -> bool:
    """Whether there are compiled kernels and they take these dtypes: `missing` for tensors known to be on the CPU."""
    return _COMPILED and all(tensor.dtype in _DTYPES for tensor in tensors)


def plain(reference: Function) -> Function:
    """The PyTorch function inside transformers' dispatch to other packages."""
    return inspect.unwrap(reference)


def _causal_conv1d_fn(reference: Function) -> Function:
    @wraps(reference)
    def causal_conv1d_fn(
        hidden_states: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        activation: str | None = None,
        **kwargs: Any,
    ) -> Tensor:
        if not computed_here(hidden_states):
            return reference(hidden_states, weight, bias, activation, **kwargs)
        batch, _, length = hidden_states.shape
        bounds = bounds_of(kwargs, batch, length)
        x = hidden_states.transpose(1, 2)
        ours = "silu" if activation in SILU else None
        if bounds is None and taken(x, weight):
            y, _ = kernels.short_convolution(x, weight, bias, None, activation=ours)
        else:
            y, _ = short_convolution(
                x if bounds is None else one_row(x),
                weight,
                bias,
                activation=ours,
                cu_seqlens=bounds,
            )
        if activation is not None and ours is None:
            y = ACT2FN[activation](y)
        return y.reshape(x.shape).transpose(1, 2)

    return causal_conv1d_fn


def _mamba_selective_scan(reference: Function) -> Function:
    @wraps(reference)
    def mamba_selective_scan(
        hidden_states: Tensor,
        dt: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        D: Tensor | None = None,
        z: Tensor | None = None,
        delta_bias: Tensor | None = None,
        delta_softplus: bool = False,
        return_last_state: bool = False,
        **kwargs: Any,
    ) -> Tensor | tuple[Tensor, Tensor | None]:
        if not computed_here(hidden_states):
            return reference(
                hidden_states,
                dt,
                A,
                B,
                C,
                D,
                z,
                delta_bias,
                delta_softplus,
                return_last_state,
                **kwargs,
            )
        batch, _, length = hidden_states.shape
        bounds = bounds_of(kwargs, batch, length)

        def turned(tensor: Tensor) -> Tensor:
            tensor = tensor.transpose(1, 2)
            return tensor if bounds is None else one_row(tensor)

        u, delta, B, C = (turned(tensor) for tensor in (hidden_states, dt, B, C))
        z = None if z is None else turned(z)
        state: Tensor | None
        if bounds is None and taken(u, delta, B, C):
            y, state = kernels.selective_scan(
                *(u, delta, A, B, C, D, z, delta_bias, None), delta_softplus=delta_softplus
            )
        else:
            y, state = selective_scan(
                *(u, delta, A, B, C, D),
                z=z,
                delta_bias=delta_bias,
                delta_softplus=delta_softplus,
                output_final_state=True,
                cu_seqlens=bounds,
            )
        y = y.reshape(batch, length, -1).transpose(1, 2)
        if state is None or not return_last_state:
            return y
        return y, state if bounds is None else last_of_rows(state, bounds, batch, length)

    return mamba_selective_scan


def _mamba2_chunk_scan(reference: Function) -> Function:
    @wraps(reference)
    def mamba2_chunk_scan(
        hidden_states: Tensor,
        dt: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        chunk_size: int,
        D: Tensor | None = None,
        dt_bias: Tensor | None = None,
        initial_states: Tensor | None = None,
        dt_softplus: bool = False,
        dt_limit: tuple[float, float] = (0.0, float("inf")),
        return_final_states: bool = False,
        **kwargs: Any,
    ) -> Tensor | tuple[Tensor, Tensor | None]:
        if not computed_here(hidden_states):
            return reference(
                hidden_states,
                dt,
                A,
                B,
                C,
                chunk_size,
                D,
                dt_bias,
                initial_states,
                dt_softplus,
                dt_limit,
                return_final_states,
                **kwargs,
            )
        batch, length = hidden_states.shape[:2]
        bounds = bounds_of(kwargs, batch, length)
        x = hidden_states
        if dt_limit[0] > 0.0 or dt_limit[1] < float("inf"):
            dt = dt.float() if dt_bias is None else dt.float() + dt_bias
            dt = (F.softplus(dt) if dt_softplus else dt).clamp(*dt_limit)
            dt_bias, dt_softplus = None, False
        state = None if initial_states is None else initial_states.transpose(-1, -2)
        if bounds is None and dt_softplus and taken(x, dt, B, C):
            y, state = kernels.state_space_dual(
                *(x, dt, A, B, C, D, dt_bias, state),
                softplus=True,
                negative_eigenvalues=False,
                cu_seqlens=None,
            )
        else:
            if bounds is not None:
                x, dt, B, C = (one_row(tensor) for tensor in (x, dt, B, C))
            y, state = state_space_dual(
                *(x, dt, A, B, C, D),
                dt_bias=dt_bias,
                dt_softplus=dt_softplus,
                initial_state=state,
                output_final_state=True,
                cu_seqlens=bounds,
            )
        y = y.reshape(hidden_states.shape).contiguous()  # callers take a view
        if state is None or not return_final_states:
            return y
        if bounds is not None:
            state = last_of_rows(state, bounds, batch, length)
        return y, state.transpose(-1, -2).contiguous()  # caches keep its strides

    return mamba2_chunk_scan


def _delta_rule(reference: Function, *, has_chunk: bool) -> Function:
    """Both the chunked and the recurrent function: they compute the same."""

    @wraps(reference)
    def gated_delta_rule(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        g: Tensor,
        beta: Tensor,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        if not computed_here(query):
            return reference(query, key, value, g, beta, *args, **kwargs)
        if has_chunk and args:  # chunk_size has no meaning here
            args = args[1:]
        options = dict(zip(_DELTA_OPTIONS, args, strict=False)) | kwargs
        batch, length = value.shape[:2]
        bounds = options.get("cu_seqlens")
        if bounds is None:
            bounds = bounds_of(options, batch, length)
        normalize = options.get("use_qk_l2norm_in_kernel", False)
        state = options.get("initial_state")
        tensors = (query, key, value, beta, g)
        if bounds is None and taken(*tensors):
            o, state = kernels.delta_rule(*tensors, state, qk_l2norm=normalize)
            return o, state if options.get("output_final_state") else None
        if bounds is not None:
            tensors = tuple(one_row(tensor) for tensor in tensors)
        o, state = delta_rule(
            *tensors,
            qk_l2norm=normalize,
            initial_state=state,
            output_final_state=options.get("output_final_state", False),
            cu_seqlens=bounds,
        )
        return o.reshape(value.shape), state

    return gated_delta_rule


_DELTA_OPTIONS = ("initial_state", "output_final_state", "use_qk_l2norm_in_kernel")


def _no_shortcut(reference: Function) -> Function:
    """Of a whole mixer in one call there is none on the CPU: None, as the reference says, packed texts or not."""

    @wraps(reference)
    def shortcut(first: Tensor, *args: Any, **kwargs: Any) -> Tensor | None:
        return None if computed_here(first) else reference(first, *args, **kwargs)

    return shortcut


def _chunked_delta_rule(reference: Function) -> Function:
    return _delta_rule(reference, has_chunk=True)


def _recurrent_delta_rule(reference: Function) -> Function:
    return _delta_rule(reference, has_chunk=False)


_CONVOLUTION = ("hidden_states", "weight", "bias", "activation")
_SCAN = ("hidden_states", "dt", "A", "B", "C")
_DELTA = ("query", "key", "value", "g", "beta")

_SHORTCUT = ("conv1d_weight", "conv1d_bias")

REPLACEMENTS: Mapping[str, Replacement] = {
    "mamba_inner_fn": Replacement("", _no_shortcut, ("xz", *_SHORTCUT)),
    "mamba2_split_conv1d_scan_combined": Replacement("", _no_shortcut, ("zxbcdt", *_SHORTCUT)),
    "causal_conv1d_fn": Replacement("short_convolution", _causal_conv1d_fn, _CONVOLUTION),
    "mamba_selective_scan": Replacement("selective_scan", _mamba_selective_scan, _SCAN),
    "mamba2_chunk_scan": Replacement("state_space_dual", _mamba2_chunk_scan, _SCAN),
    "torch_chunk_gated_delta_rule": Replacement("delta_rule", _chunked_delta_rule, _DELTA),
    "torch_recurrent_gated_delta_rule": Replacement("delta_rule", _recurrent_delta_rule, _DELTA),
    "chunk_kimi_delta_attention": Replacement("delta_rule", _chunked_delta_rule, _DELTA),
    "recurrent_kimi_delta_attention": Replacement("delta_rule", _recurrent_delta_rule, _DELTA),
}
