"""Compiled kernels as custom operators of PyTorch: seen by autograd, torch.compile and export.

A kernel is a pair of functions on tensors: `run`, which allocates the results and calls the compiled code, and
`fake`, which only gives their shapes. Gradients are joined to it by `differentiable`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from seqmix.kernels._native import transformed

_library = torch.library.Library("seqmix", "FRAGMENT")
_gradients: dict[str, tuple[Callable[..., Any], Callable[..., None]]] = {}


def custom_operator(
    schema: str, run: Callable[..., Any], fake: Callable[..., Any]
) -> Callable[..., Any]:
    """Registers `torch.ops.seqmix.NAME` for the CPU and returns it; `schema` is "NAME(arguments) -> results".

    Until `differentiable` gives it a gradient, asking for one is an error, a second one (of an operator that is
    itself a gradient) as well. An operator that writes to an argument can have none.
    """
    name = schema.partition("(")[0]
    _library.define(schema, tags=torch.Tag.pt2_compliant_tag)
    _library.impl(name, run, "CPU")
    torch.library.register_fake(f"seqmix::{name}", fake, lib=_library)

    operator = getattr(torch.ops.seqmix, name).default
    if operator._schema.is_mutable:
        return operator

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        if name in _gradients:
            _gradients[name][1](ctx, inputs, output)

    def backward(ctx: Any, *gradients: Any) -> Any:
        if name not in _gradients:
            raise NotImplementedError(
                f"seqmix::{name} has no gradient. Where a gradient of a gradient is wanted, give the operator "
                "form='definition'."
            )
        return _gradients[name][0](ctx, *gradients)

    torch.library.register_autograd(
        f"seqmix::{name}", backward, setup_context=setup_context, lib=_library
    )
    return operator


def differentiable(
    operator: Callable[..., Any],
    backward: Callable[..., Any],
    setup_context: Callable[..., None],
) -> None:
    """Gives a custom operator its gradient: `backward(ctx, *gradients)` after `setup_context(ctx, inputs, output)`."""
    name = str(operator).removeprefix("seqmix.").removesuffix(".default")
    _gradients[name] = backward, setup_context


def needs_no_dispatcher(first: Tensor, tensors: Iterable[Tensor | None]) -> bool:
    """Whether a kernel may run outside PyTorch's dispatcher, which takes longer than a few tokens.

    It may where `first` is an ordinary tensor of the CPU, nothing records what is computed, no gradient is wanted
    and no tensor is stored with its sign to be changed.
    """
    if torch.compiler.is_compiling() or type(first) is not Tensor or not first.is_cpu:
        return False
    if transformed() or torch._C._len_torch_dispatch_stack() or torch._C._is_tracing():
        return False
    trains = torch.is_grad_enabled()
    given = [x for x in tensors if x is not None]
    return not [x for x in given if x.is_neg() or (trains and x.requires_grad)]


def float_workspace(*shape: int) -> Tensor:
    """What a kernel works in, whatever dtype and device PyTorch takes by default: another thread may set them."""
    return torch.empty(shape, dtype=torch.float32, device="cpu")


def columns_contiguous(tensor: Tensor) -> Tensor:
    """The same values with neighbours along the last axis next to each other; other axes keep any stride."""
    if tensor.stride(-1) == 1 or tensor.shape[-1] == 1:
        return tensor
    return tensor.contiguous()


def text_bounds(cu_seqlens: Tensor | None) -> Tensor | None:
    """`cu_seqlens` [N+1] as the kernels read it."""
    return None if cu_seqlens is None else cu_seqlens.to("cpu", torch.int64).contiguous()


def filled(state: Tensor | None, shape: tuple[int, ...], like: Tensor) -> Tensor:
    """The given state in float32, or zeros."""
    if state is None:
        return torch.zeros(shape, dtype=torch.float32, device=like.device)
    return state.float()


def empty_in_layout(tensor: Tensor) -> Tensor:
    """A new [B, T, D], time contiguous if it is so in the given one."""
    batch, length, width = tensor.shape
    if tensor.stride(1) == 1 and tensor.stride(2) != 1:
        return tensor.new_empty((batch, width, length)).transpose(1, 2)
    return tensor.new_empty(tensor.shape)


def sum_rows(parts: Tensor) -> Tensor:
    """The sum over the first axis, in its order whatever the number of threads."""
    total = parts[0].clone()
    for part in parts[1:]:
        total += part
    return total
