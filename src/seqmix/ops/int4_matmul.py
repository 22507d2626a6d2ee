"""Product with a weight of 4 bits, a factor per group of inputs and one per output: half the bytes of `int8_matmul`.

    y_to = scale_o sum_i m_og q_oi x_ti + bias_o        g = floor(i / G), the group that input i is in

q are whole numbers from -8 to 7, m from 0 to 15, both kept two to a byte: the first of two neighbours in the low half,
q as q + 8. Only the weight is rounded: activations and sums are float32. Axes: B batch, T time, I inputs, O outputs.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from seqmix.core.cost import Cost
from seqmix.core.errors import DtypeError, RangeError, ShapeError
from seqmix.core.numerics import widen
from seqmix.kernels import int4_matmul as native
from seqmix.ops._arguments import check_tensors
from seqmix.ops._operator import Case, Form, Operator, with_extremes

AXES = {"x": "B T I", "scale": "O", "bias": "O"}
ZERO = 8  # codes are kept as q + 8


def int4_matmul(
    x: Tensor,
    codes: Tensor,
    factors: Tensor,
    scale: Tensor,
    bias: Tensor | None = None,
    *,
    group: int,
    form: str | None = None,
) -> Tensor:
    """y_to = scale_o sum_i m_og q_oi x_ti + bias_o.

    Args:
        x: inputs, [B, T, I].
        codes: q + 8, two to a byte, uint8 [O, ceil(I / 2)]; see `packed`.
        factors: m, two to a byte, uint8 [O, ceil(I / G / 2)].
        scale: the factor of each output, [O].
        bias: [O]; none by default.
        group: G, the neighbouring inputs that share a factor; a divisor of I. Multiples of 16 are fast.
        form: forces one form (`native`, `dense`, `definition`).

    Returns:
        y [B, T, O] in the dtype of x, computed in float32 (float64 for float64 inputs).

    Raises:
        ShapeError, DtypeError, RangeError: for an argument that does not fit, with what to do.
        NoUsableForm: when `form` cannot run here.

    Source: Frantar et al. 2023 (arXiv:2210.17323), section 4, for groups of few bits; that factors within an output are
    whole numbers is ours.
    """
    sizes = check_tensors("int4_matmul", AXES, {"x": x, "scale": scale, "bias": bias})
    outputs, inputs = sizes["O"], sizes["I"]
    if group < 1 or inputs % group:
        raise RangeError(
            f"int4_matmul: `group` is {group}, wanted a divisor of the {inputs} inputs. "
            "Pass the group that the factors were made for."
        )
    for name, halves, count in (("codes", codes, inputs), ("factors", factors, inputs // group)):
        if halves.dtype != torch.uint8:
            raise DtypeError(
                f"int4_matmul: `{name}` has dtype {halves.dtype}, wanted uint8, two numbers to a byte. "
                "Use seqmix.ops.int4_matmul.packed."
            )
        if tuple(halves.shape) != (outputs, -(-count // 2)):
            raise ShapeError(
                f"int4_matmul: `{name}` has shape {list(halves.shape)}, wanted "
                f"[{outputs}, {-(-count // 2)}] for [O, I] = [{outputs}, {inputs}] and groups of {group}. "
                "Make its sizes agree with `scale` and `x`."
            )
    if compute := OPERATOR.fused(form, x, codes, factors, scale, bias, group=group):
        fused: Tensor = compute(x, codes, factors, scale, bias, group=group)
        return fused
    dtype = x.dtype
    x, scale, bias = widen(x, scale, bias)
    y: Tensor = OPERATOR.run(form, x, codes, factors, scale, bias, group=group)
    return y.to(dtype)


def packed(codes: Tensor) -> Tensor:
    """Whole numbers [O, I] from -8 to 7, two to a byte, [O, ceil(I / 2)]."""
    low, high = (
        F.pad(codes + ZERO, (0, codes.shape[1] % 2))
        .view(torch.uint8)
        .view(len(codes), -1, 2)
        .unbind(-1)
    )
    return low | (high << 4)


def unpacked(bytes_: Tensor, count: int) -> Tensor:
    """The first `count` whole numbers of every row, [..., count] in int8."""
    both = torch.stack([bytes_ & 15, bytes_ >> 4], dim=-1).flatten(-2)
    return both[..., :count].view(torch.int8) - ZERO


def whole(codes: Tensor, factors: Tensor, inputs: int, group: int) -> Tensor:
    """m q [..., I], which fits into int8."""
    q = unpacked(codes, inputs).unflatten(-1, (-1, group))
    m = unpacked(factors, inputs // group) + ZERO
    product: Tensor = q * m.unsqueeze(-1)
    return product.flatten(-2)


def definition(
    x: Tensor, codes: Tensor, factors: Tensor, scale: Tensor, bias: Tensor | None, *, group: int
) -> Tensor:
    """Group by group."""
    inputs = x.shape[-1]
    q, m = unpacked(codes, inputs), unpacked(factors, inputs // group) + ZERO
    y = x.new_zeros(*x.shape[:-1], len(codes))
    for g, (part, weights) in enumerate(zip(x.split(group, -1), q.split(group, -1), strict=True)):
        y = y + m[:, g] * F.linear(part, weights.to(x.dtype))
    return y * scale if bias is None else y * scale + bias


def dense(
    x: Tensor, codes: Tensor, factors: Tensor, scale: Tensor, bias: Tensor | None, *, group: int
) -> Tensor:
    """The weight as floats, and one product: what training takes."""
    y = F.linear(x, whole(codes, factors, x.shape[-1], group).to(x.dtype)) * scale
    return y if bias is None else y + bias


def sample(case: Case, generator: Generator) -> dict[str, Any]:
    """Random inputs and whole numbers, as arguments of `int4_matmul`."""
    B, T, inputs, outputs = (case[letter] for letter in "BTIO")
    group = case["group"]

    def normal(*sizes: int) -> Tensor:
        return torch.randn(*sizes, generator=generator)

    def whole_numbers(count: int) -> Tensor:
        numbers = torch.randint(-8, 8, (outputs, count), generator=generator)
        return packed(numbers.to(torch.int8))

    arguments = {
        "x": normal(B, T, inputs),
        "codes": whole_numbers(inputs),
        "factors": whole_numbers(inputs // group),
        "scale": torch.rand(outputs, generator=generator) / (32 * inputs**0.5),
        "group": group,
    }
    return {**arguments, "bias": normal(outputs)} if case.get("bias") else arguments


def cost(case: Case) -> Cost:
    """Half a byte per weight and per factor of a group, read once; inputs and outputs once."""
    B, T, inputs, outputs = (case[letter] for letter in "BTIO")
    weights = outputs * (-(-inputs // 2) - (-inputs // case["group"] // 2))
    return Cost(flops=2 * B * T * inputs * outputs, bytes=weights + 4 * B * T * (inputs + outputs))


SIZES = {"B": 2, "T": 37, "I": 96, "O": 24}
GROUP = {"group": 32}
TIMING = {"B": 1, "T": 512, "I": 576, "O": 1536}  # of SmolLM2-135M

OPERATOR = Operator(
    function=int4_matmul,
    equation=r"y_{to} = \sigma_o \sum_i m_{og} q_{oi} x_{ti} + b_o",
    source="Frantar et al. 2023 (arXiv:2210.17323)",
    axes=AXES,
    definition=definition,
    forms={
        "native": Form(native.int4_matmul, native.why_not, trains=False, fused=True),
        "dense": Form(dense),
    },
    sample=sample,
    extreme=with_extremes(sample, "x"),
    cases=[
        Case("plain", SIZES, GROUP),
        Case("sixteen", {**SIZES, "I": 48, "O": 133}, {"bias": True, "group": 16}),
        Case("odd", {**SIZES, "T": 3, "I": 21, "O": 19}, {"bias": True, "group": 7}),
        Case("wide", {**SIZES, "B": 3, "T": 5, "I": 192, "O": 300}, {"group": 64}),
        Case("one", {"B": 1, "T": 1, "I": 7, "O": 5}, {"group": 1}),
    ],
    timing=[
        Case("prefill", TIMING, GROUP),
        Case("batch", {**TIMING, "T": 32}, GROUP),
        Case("decode", {**TIMING, "T": 1}, GROUP),
        Case("head", {**TIMING, "T": 1, "O": 49152}, GROUP),
    ],
    cost=cost,
)
