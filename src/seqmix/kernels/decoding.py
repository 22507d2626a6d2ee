"""Half a block of a language model for a few tokens, in one compiled call (csrc/decoding.cpp).

A layer is (weight [O, I] in float32, bfloat16 or int8; the factor of each output [O] or None; bias [O] or None; None;
0), the factor and the bias in float32. One of 4 bits is (codes, factor, bias, factors of groups, inputs of a group), as
in `seqmix.ops.int4_matmul`. Axes: B texts, T new tokens, D width, S keys with the new ones, H heads, G key heads,
K head width, R channels that turn.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from seqmix.kernels._native import native

Layer = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, int]
NOTHING: Layer = (None, None, None, None, 0)


def attention_step(
    x: Tensor,
    norm: Tensor,
    eps: float,
    layers: Sequence[Layer],
    shortcut: Layer,
    keys: Tensor,
    values: Tensor,
    start: Tensor,
    turns: tuple[Tensor, Tensor] | tuple[None, None],
    scale: float,
) -> Tensor:
    """y = S x + W_o attend(turn(W_q n), turn(W_k n), W_v n), n = x / sqrt(mean(x^2) + eps) * norm.

    Args:
        x: [B, T, D], contiguous, in float32 or bfloat16; so are `norm` [D], `keys` and `values`.
        layers: of queries [H K, D], keys and values [G K, D], and the output [E, H K].
        shortcut: S [E, D], or `NOTHING` where y is x + ...
        keys, values: [B, S, G, K]; the last T of S are written.
        start: keys of a text before this one are none, [B] int64.
        turns: cosines and signed sines, [1 or B, T, 1, R] in float32, or None.
    """
    batch, tokens, width = x.shape
    length, groups, head_width = keys.shape[1:]
    heads, threads = _width(layers[0]) // head_width, torch.get_num_threads()
    room = native.attention_step_floats(
        batch, tokens, width, heads, groups, head_width, length, threads
    )
    y, workspace = x.new_empty(batch, tokens, _width(layers[-1])), torch.empty(room)
    native.attention_step(
        x.view(-1, width),
        norm,
        eps,
        *layers,
        shortcut,
        keys,
        values,
        start,
        *turns,
        scale,
        y.view(batch * tokens, -1),
        workspace,
        threads,
    )
    return y


def _width(layer: Layer) -> int:
    """Outputs of a layer."""
    assert layer[0] is not None
    return layer[0].shape[0]


def gated_step(
    x: Tensor, norm: Tensor, eps: float, layers: Sequence[Layer], shortcut: Layer
) -> Tensor:
    """y = S x + W_o (silu(W_g n) * W_u n), n = x / sqrt(mean(x^2) + eps) * norm; x as in `attention_step`.

    `layers` are the gate [F, D], the other factor [F, D] and the output [E, F]; `shortcut` as there.
    """
    batch, tokens, width = x.shape
    hidden, threads = _width(layers[0]), torch.get_num_threads()
    room = native.gated_step_floats(batch * tokens, width, hidden, threads)
    y, workspace = x.new_empty(batch, tokens, _width(layers[-1])), torch.empty(room)
    rows = y.view(batch * tokens, -1)
    native.gated_step(x.view(-1, width), norm, eps, *layers, shortcut, rows, workspace, threads)
    return y


def linear_step(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """y = W x + bias [B, T, O] in the dtype of x [B, T, I], with W [O, I] in float32 or bfloat16."""
    threads, y = torch.get_num_threads(), x.new_empty(*x.shape[:2], weight.shape[0])
    tokens = x.shape[0] * x.shape[1]
    room = torch.empty(native.weight_matmul_workspace(tokens, x.shape[2], threads))
    native.linear_step(x, weight, bias, y, room, threads)
    return y
