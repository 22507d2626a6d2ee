"""Halves of blocks of a language model in one compiled call (csrc/decoding.cpp).

A layer is (weight [O, I] in float32, bfloat16 or int8; the factor of each output [O] or None; bias [O] or None; None;
0), the factor and the bias in float32 or bfloat16. One of 4 bits is (codes, factor, bias, factors of groups, inputs of
a group), as in `seqmix.ops.int4_matmul`. Axes: B texts, T new tokens, D width, S keys with the new ones, H heads, G key
heads, K head width, R channels that turn.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from seqmix.kernels._custom import float_workspace
from seqmix.kernels._native import native

Layer = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, int]
Memory = tuple[
    Tensor | None, Tensor | None, int, Tensor | None, Tensor | None, Tensor | None, Tensor | None
]
NOTHING: Layer = (None, None, None, None, 0)
NO_MEMORY: Memory = (None, None, 0, None, None, None, None)


class Half:
    """Half a block, n = x / sqrt(mean(x^2) + eps) * norm.

    Attention: y = S x + W_o attend(turn(W_q n), turn(W_k n), W_v n).
    A gated unit, whose `head_width` is 0: y = S x + W_o (silu(W_g n) * W_u n).

    Args:
        norm: [D], in the dtype of x.
        eps: of the norm.
        read: W_q [H K, D], W_k and W_v [G K, D]; or W_g and W_u [F, D].
        output: W_o [E, H K] or [E, F].
        shortcut: S [E, D], or nothing where y is x + ...
        head_width: K.
        scale: of the products of queries and keys.

    It reads its weights where they lie now; `outputs` is E, and `forms` are the operators that it stands for. Raises
    `ValueError` where they do not fit together.
    """

    def __init__(
        self,
        norm: Tensor,
        eps: float,
        read: Sequence[Layer],
        output: Layer,
        shortcut: Layer = NOTHING,
        head_width: int = 0,
        scale: float = 1.0,
    ) -> None:
        self._given = norm, eps, read, output, shortcut, head_width, scale
        self.native = native.Half(*self._given)
        self.outputs: int = self.native.outputs
        self.forms = frozenset(
            "int8_matmul" if factors is None else "int4_matmul"
            for weight, _, _, factors, _ in (*read, output, shortcut)
            if weight is not None and not weight.is_floating_point()
        ) | ({"attention"} if head_width else set())

    def holding(self) -> Half:
        """The same, whose weights stay in memory even if the tensors that they are in get other ones."""
        norm, eps, read, output, shortcut, head_width, scale = self._given
        layers = [_alias(layer) for layer in read]
        return Half(norm.detach(), eps, layers, _alias(output), _alias(shortcut), head_width, scale)


def _alias(layer: Layer) -> Layer:
    weight, scale, bias, factors, group = layer
    weight, scale, bias, factors = (
        x if x is None else x.detach() for x in (weight, scale, bias, factors)
    )
    return weight, scale, bias, factors, group


def decode(x: Tensor, halves: Sequence[tuple[Half, Memory]]) -> Tensor:
    """x [B, T, D] through one half after the other, to y [B, T, E]. Weights must stay where they are meanwhile.

    Texts of several lengths are packed, x [1, total, D], and say where each begins and ends.

    Args:
        x: in float32 or bfloat16.
        halves: each with its memory: of attention the keys and values [B, S or more, G, K] in the dtype of x; S, of
            which the last T are written; the first key of each text, [B] int64; cosines and signed sines
            [1 or B, T, 1, R] in float32 ([1, total, 1, R] of packed texts), or None; of packed texts their bounds,
            [B + 1] int64, or None. A gated unit has `NO_MEMORY`.

    Raises `ValueError` where they do not fit together.
    """
    x = x.contiguous()
    batch, tokens, width = x.shape
    given = [(half.native, memory) for half, memory in halves]
    call = native.Call(x.view(-1, width), given, torch.get_num_threads())
    y = x.new_empty(batch * tokens * call.widest)
    call.run(y, float_workspace(call.floats))
    return y[: batch * tokens * call.width].view(batch, tokens, -1)


def linear_step(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """y = W x + bias [B, T, O] in the dtype of x [B, T, I], with W [O, I] in float32 or bfloat16."""
    threads, y = torch.get_num_threads(), x.new_empty(*x.shape[:2], weight.shape[0])
    tokens = x.shape[0] * x.shape[1]
    room = float_workspace(native.weight_matmul_workspace(tokens, x.shape[2], threads))
    native.linear_step(x, weight, bias, y, room, threads)
    return y
