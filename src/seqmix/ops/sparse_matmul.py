"""Block-sparse product: a linear layer whose weight is zero but for some blocks.

    y_t = W x_t + bias        W = sum over n of block n at rows r P to r P + P - 1, columns c_n Q to c_n Q + Q - 1

where r is the row of blocks with offsets[r] <= n < offsets[r + 1] and c = columns.
Axes: B batch, T time, I inputs, O outputs, N nonzero blocks of P outputs by Q inputs.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from seqmix.core.cost import Cost
from seqmix.core.errors import ShapeError
from seqmix.core.numerics import widen
from seqmix.kernels import sparse_matmul as native
from seqmix.ops._arguments import check_tensors
from seqmix.ops._block_sparse import check_pattern, rows_of_blocks
from seqmix.ops._operator import Case, Form, Operator, with_extremes

AXES = {"x": "B T I", "blocks": "N P Q", "bias": "O"}


def sparse_matmul(
    x: Tensor,
    blocks: Tensor,
    columns: Tensor,
    offsets: Tensor,
    bias: Tensor | None = None,
    *,
    form: str | None = None,
) -> Tensor:
    """y_t = W x_t + bias, with W given by its nonzero blocks.

    Args:
        x: inputs, [B, T, I].
        blocks: nonzero blocks of W [O, I], [N, P, Q], row of blocks by row of blocks; I is a multiple of Q.
        columns: which column of blocks each is in, [N] integers.
        offsets: the blocks offsets[r] to offsets[r + 1] are those of outputs r P to r P + P - 1, [O / P + 1]
            integers from 0 to N.
        bias: [O]; none by default.
        form: forces one form (`native`, `dense`, `definition`).

    Returns:
        y [B, T, O] in the dtype of x, computed in float32 (float64 for float64 inputs).

    Raises:
        ShapeError, DtypeError, RangeError: for an argument that does not fit, with what to do.
        NoUsableForm: when `form` cannot run here.

    Source: Shen et al. 2023 (arXiv:2306.16601), section 3; blocks of 4 outputs by one input are theirs.
    """
    like = blocks  # a matrix of zeros has none, but they still have a shape
    if isinstance(blocks, Tensor) and blocks.ndim and not len(blocks):
        like = blocks.new_empty(1, *blocks.shape[1:])
    sizes = check_tensors("sparse_matmul", AXES, {"x": x, "blocks": like})
    inputs, height, width = (sizes[letter] for letter in "IPQ")
    if inputs % width:
        raise ShapeError(
            f"sparse_matmul: `blocks` are {width} inputs wide, wanted a divisor of the {inputs} inputs of `x`. "
            "Choose another block shape."
        )
    check_pattern("sparse_matmul", columns, offsets, (len(blocks),), inputs // width)
    outputs = (len(offsets) - 1) * height
    check_tensors("sparse_matmul", AXES, {"bias": bias}, O=outputs)

    if compute := OPERATOR.fused(form, x, blocks, columns, offsets, bias):
        fused: Tensor = compute(x, blocks, columns, offsets, bias)
        return fused
    dtype = x.dtype
    x, blocks, bias = widen(x, blocks, bias)
    y: Tensor = OPERATOR.run(form, x, blocks, columns, offsets, bias)
    return y.to(dtype)


def definition(
    x: Tensor, blocks: Tensor, columns: Tensor, offsets: Tensor, bias: Tensor | None
) -> Tensor:
    """Block by block."""
    height, width = blocks.shape[1:]
    rows = []
    for row in range(len(offsets) - 1):
        y = x.new_zeros(*x.shape[:2], height)
        for n in range(int(offsets[row]), int(offsets[row + 1])):
            first = int(columns[n]) * width
            y = y + x[..., first : first + width] @ blocks[n].T
        rows.append(y)
    whole = torch.cat(rows, dim=-1)
    return whole if bias is None else whole + bias


def dense(
    x: Tensor, blocks: Tensor, columns: Tensor, offsets: Tensor, bias: Tensor | None
) -> Tensor:
    """The whole matrix with its zeros, and one product: what training takes."""
    num_blocks, height, width = blocks.shape
    rows = rows_of_blocks(offsets, num_blocks)
    weight = blocks.new_zeros(len(offsets) - 1, x.shape[2] // width, height, width)
    weight = weight.index_put((rows, columns.long()), blocks, accumulate=True)
    return F.linear(x, weight.transpose(1, 2).reshape(-1, x.shape[2]), bias)


def _why_not_native(
    x: Tensor, blocks: Tensor, columns: Tensor, offsets: Tensor, bias: Tensor | None
) -> str | None:
    return native.without_gradients(x, blocks, bias)


def sample(case: Case, generator: Generator) -> dict[str, Any]:
    """Random inputs and a random pattern, as arguments of `sparse_matmul`; the first row of blocks is empty."""

    def normal(*sizes: int) -> Tensor:
        return torch.randn(*sizes, generator=generator)

    B, T, inputs, outputs, height, width = (case[letter] for letter in "BTIOPQ")
    there = torch.rand(outputs // height, inputs // width, generator=generator) < case["density"]
    there[0] = outputs == height  # the only row, or an empty one
    offsets = torch.cat([torch.zeros(1, dtype=torch.long), there.sum(1).cumsum(0)])
    columns = there.nonzero()[:, 1]
    blocks = normal(len(columns), height, width) * (case["density"] * inputs) ** -0.5
    arguments = {"x": normal(B, T, inputs), "blocks": blocks, "columns": columns.int()}
    bias = {"bias": normal(outputs)} if case.get("bias") else {}
    return {**arguments, "offsets": offsets, **bias}


def cost(case: Case) -> Cost:
    """Of the nonzero weights alone; each is read once, and inputs and outputs once."""
    B, T, inputs, outputs = (case[letter] for letter in "BTIO")
    nonzero = case["density"] * inputs * outputs
    return Cost(flops=2 * B * T * nonzero, bytes=4 * (nonzero + B * T * (inputs + outputs)))


SIZES = {"B": 2, "T": 37, "I": 40, "O": 24, "P": 4, "Q": 1}
TIMING = {"B": 1, "T": 512, "I": 768, "O": 3072, "P": 4, "Q": 1}  # of BERT-base

OPERATOR = Operator(
    function=sparse_matmul,
    equation=r"y_t = W x_t + b,\quad W = \sum_n E_{r_n}^\top B_n E_{c_n}",
    source="Shen et al. 2023 (arXiv:2306.16601)",
    axes=AXES,
    definition=definition,
    forms={
        "native": Form(native.sparse_matmul, _why_not_native, trains=False, fused=True),
        "dense": Form(dense),
    },
    sample=sample,
    extreme=with_extremes(sample, "x"),
    cases=[
        Case("columns_of_four", SIZES, {"density": 0.3}),
        Case("bias", {**SIZES, "I": 21}, {"density": 0.3, "bias": True}),
        Case("squares", {**SIZES, "Q": 4}, {"density": 0.3}),
        Case("odd", {**SIZES, "O": 35, "P": 7, "Q": 5}, {"density": 0.4, "bias": True}),
        Case("high", {**SIZES, "O": 320, "P": 160}, {"density": 0.1}),
        Case("nothing_is_zero", {**SIZES, "O": 13, "P": 13}, {"density": 1.1}),
    ],
    timing=[
        Case("tenth", TIMING, {"density": 0.1}),
        Case("third", TIMING, {"density": 0.3}),
        Case("tenth_decode", {**TIMING, "T": 1}, {"density": 0.1}),
    ],
    cost=cost,
)
