"""Products of few tokens with weights of 8 bits, compiled (csrc/int8_matmul.cpp)."""

from __future__ import annotations

import torch
from torch import Tensor

from seqmix.kernels._custom import columns_contiguous, custom_operator, needs_no_dispatcher
from seqmix.kernels._native import native
from seqmix.kernels.sparse_matmul import without_gradients

FEW = 0 if native is None else native.int8_matmul_few()  # tokens of all texts, at most
WIDEST = 16  # floats of a vector


def why_not(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> str | None:
    """Why the compiled kernel cannot run; None if it can."""
    tokens = x.shape[0] * x.shape[1]
    if reason := without_gradients(x, scale, bias):
        return reason
    if tokens > FEW:
        return f"{tokens} tokens are more than {FEW}, and from there on a dense product is faster"
    return None


def int8_matmul(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """y [B, T, O] in the dtype of x [B, T, I]; `weight` int8 [O, I], `scale` [O], `bias` [O]."""
    multiply = _run if needs_no_dispatcher(x, (x, scale, bias)) else _multiply
    y: Tensor = multiply(x, weight, scale.float(), None if bias is None else bias.float())
    return y


def _run(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    x = columns_contiguous(x)
    y = _fake(x, weight, scale, bias)
    tokens, inputs = x.shape[0] * x.shape[1], x.shape[2]
    panel = torch.empty(tokens, -(-inputs // WIDEST) * WIDEST)
    weight, scale = weight.contiguous(), scale.contiguous()
    bias = None if bias is None else bias.contiguous()
    native.int8_matmul(x, weight, scale, bias, y, panel, torch.get_num_threads())
    return y


def _fake(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(*x.shape[:2], weight.shape[0])


_multiply = custom_operator(
    "int8_matmul(Tensor x, Tensor weight, Tensor scale, Tensor? bias) -> Tensor", _run, _fake
)
