"""Halves of blocks of a language model for a few tokens, in one compiled call (csrc/decoding.cpp).

A layer is (weight [O, I] in float32, bfloat16 or int8; the factor of each output [O] or None; bias [O] or None; None;
0), the factor and the bias in float32 or bfloat16. One of 4 bits is (codes, factor, bias, factors of groups, inputs of
a group), as in `seqmix.ops.int4_matmul`. Axes: B texts, T new tokens, D width, S keys with the new ones, H heads, G key
heads, K head width, R channels that turn.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from seqmix.kernels._native import native

Layer = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, int]
Memory = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None]
NOTHING: Layer = (None, None, None, None, 0)
NO_MEMORY: Memory = (None, None, None, None, None)


def attention_half(
    norm: Tensor,
    eps: float,
    layers: Sequence[Layer],
    shortcut: Layer,
    head_width: int,
    scale: float,
) -> Any:
    """y = S x + W_o attend(turn(W_q n), turn(W_k n), W_v n), n = x / sqrt(mean(x^2) + eps) * norm.

    It keeps what it is made of and reads it where that lies now: once a weight is put elsewhere, it must be made again,
    as `Origin` tells.

    Args:
        norm: [D], in the dtype of x.
        layers: of queries [H K, D], keys and values [G K, D], and the output [E, H K].
        shortcut: S [E, D], or `NOTHING` where y is x + ...
        scale: of the products of queries and keys.
    """
    *read, output = layers
    return native.Half(norm, eps, read, output, shortcut, head_width, scale)


def gated_half(norm: Tensor, eps: float, layers: Sequence[Layer], shortcut: Layer) -> Any:
    """y = S x + W_o (silu(W_g n) * W_u n), n = x / sqrt(mean(x^2) + eps) * norm; the rest as in `attention_half`.

    `layers` are the gate [F, D], the other factor [F, D] and the output [E, F].
    """
    *read, output = layers
    return native.Half(norm, eps, read, output, shortcut, 0, 1.0)


class Origin:
    """What a half was made of: seeing whether it is the same takes a tenth of the time of making the half.

    Args:
        modules: and all that are in them.
        entries: further (dictionary, key, value), compared by identity.
    """

    def __init__(
        self, modules: Sequence[nn.Module], entries: Sequence[tuple[Any, str, Any]]
    ) -> None:
        found, lengths, tensors = [*entries], [], []
        for module in [inner for each in modules for inner in each.modules()]:
            own: dict[str, Any] = module.__dict__
            held = own["_parameters"], own["_buffers"]
            for place in (*held, own["_modules"]):
                found += [(place, name, value) for name, value in place.items()]
            found += [(own, name, x) for name, x in own.items() if not name.startswith("_")]
            hooks = own["_forward_hooks"], own["_forward_pre_hooks"]
            lengths += [(place, len(place)) for place in (own, *held, own["_modules"], *hooks)]
            tensors += [x for place in held for x in place.values() if x is not None]
        self._native = native.Origin(found, lengths, tensors)

    def is_same(self) -> bool:
        """Whether there are the same modules, settings, tensors and as many hooks, and the tensors lie as they did."""
        return self._native.is_same()


def decode(x: Tensor, halves: Sequence[tuple[Any, Memory]]) -> Tensor:
    """x [B, T, D] through one half after the other, to y [B, T, E].

    Args:
        x: contiguous, in float32 or bfloat16.
        halves: each with its memory: of attention the keys and values [B, S, G, K] in the dtype of x, whose last T are
            written; the first key of each text, [B] int64; cosines and signed sines [1 or B, T, 1, R] in float32, or
            None. A gated unit has `NO_MEMORY`.
    """
    batch, tokens, width = x.shape
    call = native.Call(x.view(-1, width), halves, torch.get_num_threads())
    y = x.new_empty(batch * tokens * call.widest)
    call.run(y, torch.empty(call.floats))
    return y[: batch * tokens * call.width].view(batch, tokens, -1)


def linear_step(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """y = W x + bias [B, T, O] in the dtype of x [B, T, I], with W [O, I] in float32 or bfloat16."""
    threads, y = torch.get_num_threads(), x.new_empty(*x.shape[:2], weight.shape[0])
    tokens = x.shape[0] * x.shape[1]
    room = torch.empty(native.weight_matmul_workspace(tokens, x.shape[2], threads))
    native.linear_step(x, weight, bias, y, room, threads)
    return y
