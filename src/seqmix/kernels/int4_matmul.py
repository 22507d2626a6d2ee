"""Products with weights of 4 bits, compiled (csrc/weight_matmul.cpp)."""

from __future__ import annotations

import torch
from torch import Tensor

from seqmix.kernels._custom import columns_contiguous, custom_operator, needs_no_dispatcher
from seqmix.kernels._native import native
from seqmix.kernels.int8_matmul import workspace
from seqmix.kernels.sparse_matmul import without_gradients


def why_not(
    x: Tensor, codes: Tensor, factors: Tensor, scale: Tensor, bias: Tensor | None, *, group: int
) -> str | None:
    """Why the compiled kernel cannot run; None if it can."""
    return without_gradients(x, scale, bias)


def int4_matmul(
    x: Tensor, codes: Tensor, factors: Tensor, scale: Tensor, bias: Tensor | None, *, group: int
) -> Tensor:
    """y [B, T, O] in the dtype of x [B, T, I]; `codes` and `factors` two to a byte, `scale` [O], `bias` [O]."""
    multiply = _run if needs_no_dispatcher(x, (x, scale, bias)) else _multiply
    bias = None if bias is None else bias.float()
    y: Tensor = multiply(x, codes, factors, scale.float(), bias, group)
    return y


def _run(
    x: Tensor, codes: Tensor, factors: Tensor, scale: Tensor, bias: Tensor | None, group: int
) -> Tensor:
    x, threads = columns_contiguous(x), torch.get_num_threads()
    y = _fake(x, codes, factors, scale, bias, group)
    codes, factors, scale = (t.contiguous() for t in (codes, factors, scale))
    bias = None if bias is None else bias.contiguous()
    native.int4_matmul(x, codes, factors, scale, bias, y, group, workspace(x, threads), threads)
    return y


def _fake(
    x: Tensor, codes: Tensor, factors: Tensor, scale: Tensor, bias: Tensor | None, group: int
) -> Tensor:
    return x.new_empty(*x.shape[:2], codes.shape[0])


_multiply = custom_operator(
    "int4_matmul(Tensor x, Tensor codes, Tensor factors, Tensor scale, Tensor? bias, int group) -> Tensor",
    _run,
    _fake,
)
