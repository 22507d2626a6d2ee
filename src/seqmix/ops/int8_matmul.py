"""Product with a weight of 8 bits and a factor per output: half to a quarter of the bytes that decoding waits for.

    y_to = scale_o sum_i W_oi x_ti + bias_o

Only the weight is rounded: activations and sums are float32. Axes: B batch, T time, I inputs, O outputs.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from seqmix.core.cost import Cost
from seqmix.core.errors import DtypeError, ShapeError
from seqmix.core.numerics import widen
from seqmix.kernels import int8_matmul as native
from seqmix.ops._arguments import check_tensors
from seqmix.ops._operator import Case, Form, Operator, with_extremes

AXES = {"x": "B T I", "scale": "O", "bias": "O"}


def int8_matmul(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor | None = None,
    *,
    form: str | None = None,
) -> Tensor:
    """y_to = scale_o sum_i W_oi x_ti + bias_o.

    Args:
        x: inputs, [B, T, I].
        weight: W, whole numbers in int8, [O, I].
        scale: the factor of each output, [O].
        bias: [O]; none by default.
        form: forces one form (`native`, `dense`, `definition`).

    Returns:
        y [B, T, O] in the dtype of x, computed in float32 (float64 for float64 inputs).

    Raises:
        ShapeError, DtypeError: for an argument that does not fit, with what to do.
        NoUsableForm: when `form` cannot run here.

    Source: Dettmers et al. 2022 (arXiv:2208.07339), section 2.1, for a factor per output.
    """
    sizes = check_tensors("int8_matmul", AXES, {"x": x, "scale": scale, "bias": bias})
    if weight.dtype != torch.int8:
        raise DtypeError(
            f"int8_matmul: `weight` has dtype {weight.dtype}, wanted int8. "
            "Use seqmix.linears.int8.Int8, which rounds weights."
        )
    if tuple(weight.shape) != (sizes["O"], sizes["I"]):
        raise ShapeError(
            f"int8_matmul: `weight` has shape {list(weight.shape)}, wanted [O, I] = "
            f"[{sizes['O']}, {sizes['I']}]. Make its sizes agree with `scale` and `x`."
        )
    if compute := OPERATOR.fused(form, x, weight, scale, bias):
        fused: Tensor = compute(x, weight, scale, bias)
        return fused
    dtype = x.dtype
    x, scale, bias = widen(x, scale, bias)
    y: Tensor = OPERATOR.run(form, x, weight, scale, bias)
    return y.to(dtype)


def definition(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """Output by output."""
    rows = [scale[o] * (x * weight[o].to(x.dtype)).sum(-1) for o in range(len(weight))]
    y = torch.stack(rows, dim=-1)
    return y if bias is None else y + bias


def dense(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """The weight as floats, and one product: what training takes."""
    y = F.linear(x, weight.to(x.dtype)) * scale
    return y if bias is None else y + bias


def sample(case: Case, generator: Generator) -> dict[str, Any]:
    """Random inputs and whole numbers, as arguments of `int8_matmul`."""

    def normal(*sizes: int) -> Tensor:
        return torch.randn(*sizes, generator=generator)

    B, T, inputs, outputs = (case[letter] for letter in "BTIO")
    arguments = {
        "x": normal(B, T, inputs),
        "weight": torch.randint(-127, 128, (outputs, inputs), generator=generator).to(torch.int8),
        "scale": torch.rand(outputs, generator=generator) / (64 * inputs**0.5),
    }
    return {**arguments, "bias": normal(outputs)} if case.get("bias") else arguments


def cost(case: Case) -> Cost:
    """A byte per weight, read once; inputs and outputs once."""
    B, T, inputs, outputs = (case[letter] for letter in "BTIO")
    moved = inputs * outputs + 4 * B * T * (inputs + outputs)
    return Cost(flops=2 * B * T * inputs * outputs, bytes=moved)


SIZES = {"B": 2, "T": 37, "I": 40, "O": 24}
TIMING = {"B": 1, "T": 512, "I": 576, "O": 1536}  # of SmolLM2-135M

OPERATOR = Operator(
    function=int8_matmul,
    equation=r"y_{to} = \sigma_o \sum_i W_{oi} x_{ti} + b_o",
    source="Dettmers et al. 2022 (arXiv:2208.07339)",
    axes=AXES,
    definition=definition,
    forms={
        "native": Form(native.int8_matmul, native.why_not, trains=False, fused=True),
        "dense": Form(dense),
    },
    sample=sample,
    extreme=with_extremes(sample, "x"),
    cases=[
        Case("plain", SIZES),
        Case("bias", {**SIZES, "I": 21, "O": 133}, {"bias": True}),
        Case("few", {**SIZES, "T": 3, "O": 19}, {"bias": True}),
        Case("fifteen", {**SIZES, "B": 3, "T": 5, "I": 130, "O": 300}),
        Case("strips", {**SIZES, "T": 53, "I": 577, "O": 70}),
        Case("nine", {**SIZES, "B": 3, "T": 3, "I": 65, "O": 33}, {"bias": True}),
        Case("one", {"B": 1, "T": 1, "I": 7, "O": 5}),
    ],
    timing=[
        Case("prefill", TIMING),
        Case("batch", {**TIMING, "T": 32}),
        Case("decode", {**TIMING, "T": 1}),
        Case("head", {**TIMING, "T": 1, "O": 49152}),
    ],
    cost=cost,
)
