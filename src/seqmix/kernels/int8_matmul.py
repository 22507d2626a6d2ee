"""Products with weights of 8 bits, compiled (csrc/weight_matmul.cpp)."""

from __future__ import annotations

import torch
from torch import Tensor

from seqmix.kernels._custom import (
    columns_contiguous,
    custom_operator,
    float_workspace,
    needs_no_dispatcher,
)
from seqmix.kernels._native import native
from seqmix.kernels.sparse_matmul import without_gradients


def why_not(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> str | None:
    """Why the compiled kernel cannot run; None if it can."""
    return without_gradients(x, scale, bias)


def int8_matmul(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """y [B, T, O] in the dtype of x [B, T, I]; `weight` int8 [O, I], `scale` [O], `bias` [O]."""
    multiply = _run if needs_no_dispatcher(x, (x, scale, bias)) else _multiply
    y: Tensor = multiply(x, weight, scale.float(), None if bias is None else bias.float())
    return y


def workspace(x: Tensor, threads: int) -> Tensor:
    """What the kernels for dense weights of few bits work in."""
    tokens = x.shape[0] * x.shape[1]
    return float_workspace(native.weight_matmul_workspace(tokens, x.shape[2], threads))


def _run(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    x, threads = columns_contiguous(x), torch.get_num_threads()
    y = _fake(x, weight, scale, bias)
    weight, scale = weight.contiguous(), scale.contiguous()
    bias = None if bias is None else bias.contiguous()
    native.int8_matmul(x, weight, scale, bias, y, workspace(x, threads), threads)
    return y


def _fake(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(*x.shape[:2], weight.shape[0])


_multiply = custom_operator(
    "int8_matmul(Tensor x, Tensor weight, Tensor scale, Tensor? bias) -> Tensor", _run, _fake
)
