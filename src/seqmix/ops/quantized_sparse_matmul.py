"""Block-sparse product in whole numbers of 8 bits, of weights beforehand and of activations on the way.

    q_t = round(x_t / s_t),  s_t = max |x_t| / 127        y_to = s_t scale_o sum_i W_oi q_ti + bias_o

The sum is exact. W [O, I] is given by blocks of four outputs and any four inputs: block n holds the weights of the
outputs 4 r to 4 r + 3 for the inputs columns[n], where offsets[r] <= n < offsets[r + 1].
Axes: B batch, T time, I inputs, O outputs, N blocks.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Generator, Tensor

from seqmix.core.cost import Cost
from seqmix.core.errors import DtypeError, ShapeError
from seqmix.core.numerics import widen
from seqmix.kernels import sparse_matmul as native
from seqmix.ops._arguments import check_tensors
from seqmix.ops._block_sparse import check_pattern, rows_of_blocks
from seqmix.ops._operator import Case, Form, Operator

SIDE = 4  # outputs and inputs of a block
LARGEST = 127
SMALLEST = 1e-30  # a token whose entries are all below counts as zero
AXES = {"x": "B T I", "scales": "O", "bias": "O"}


def quantized_sparse_matmul(
    x: Tensor,
    scales: Tensor,
    blocks: Tensor,
    columns: Tensor,
    offsets: Tensor,
    bias: Tensor | None = None,
    *,
    form: str | None = None,
) -> Tensor:
    """y_to = s_t scale_o sum_i W_oi round(x_ti / s_t) + bias_o with s_t = max |x_t| / 127; for inference only.

    Args:
        x: inputs, [B, T, I]. They are rounded in float32, ties to even; a token with an infinite entry gives NaN.
        scales: factor of each output, [O]; O is a multiple of 4.
        blocks: int8 weights from -127 to 127, [N, 4, 4], outputs by inputs; what has no weight is 0.
        columns: the inputs that a block reads, [N, 4] integers.
        offsets: the blocks offsets[r] to offsets[r + 1] are those of the outputs 4 r to 4 r + 3, [O / 4 + 1]
            integers from 0 to N.
        bias: [O]; none by default.
        form: forces one form (`native`, `dense`, `definition`).

    Returns:
        y [B, T, O] in the dtype of x. No gradient reaches x, whose rounding has none.

    Raises:
        ShapeError, DtypeError, RangeError: for an argument that does not fit, with what to do.
        NoUsableForm: when `form` cannot run here.

    Source: Shen et al. 2023 (arXiv:2306.16601), section 3; activations are scaled per token here.
    """
    sizes = check_tensors("quantized_sparse_matmul", AXES, {"x": x, "scales": scales, "bias": bias})
    _check_blocks(blocks, sizes["O"], offsets)
    shape = (blocks.shape[0], SIDE)
    check_pattern("quantized_sparse_matmul", columns, offsets, shape, sizes["I"])

    if compute := OPERATOR.fused(form, x, scales, blocks, columns, offsets, bias):
        fused: Tensor = compute(x, scales, blocks, columns, offsets, bias)
        return fused
    dtype = x.dtype
    x, scales, bias = widen(x, scales, bias)
    y: Tensor = OPERATOR.run(form, x, scales, blocks, columns, offsets, bias)
    return y.to(dtype)


def _check_blocks(blocks: Tensor, outputs: int, offsets: Tensor) -> None:
    if blocks.dtype != torch.int8:
        raise DtypeError(
            f"quantized_sparse_matmul: `blocks` has dtype {blocks.dtype}, wanted int8. "
            "Use QuantizedBlockSparse, which rounds weights."
        )
    if blocks.ndim != 3 or tuple(blocks.shape[1:]) != (SIDE, SIDE):
        raise ShapeError(
            f"quantized_sparse_matmul: `blocks` has shape {list(blocks.shape)}, wanted [N, {SIDE}, {SIDE}]: four "
            "outputs by four inputs. Split larger blocks, and fill up smaller ones with zeros."
        )
    if outputs != (len(offsets) - 1) * SIDE:
        raise ShapeError(
            f"quantized_sparse_matmul: `scales` has {outputs} entries, wanted {SIDE} for each of the "
            f"{len(offsets) - 1} rows of blocks that `offsets` bounds."
        )


def quantize_tokens(x: Tensor) -> tuple[Tensor, Tensor]:
    """Whole numbers from -127 to 127 [..., I] and the factor [..., 1] of each token, in float32."""
    x = x.detach().float()
    peak = x.abs().amax(-1, keepdim=True)
    inverse = torch.full_like(peak, LARGEST) / peak
    small, strange = peak < SMALLEST, ~peak.isfinite()
    factor = (peak / LARGEST).masked_fill(small, 0.0).masked_fill(strange, torch.nan)
    return (x * inverse.masked_fill(small | strange, 0.0)).round(), factor


def definition(
    x: Tensor,
    scales: Tensor,
    blocks: Tensor,
    columns: Tensor,
    offsets: Tensor,
    bias: Tensor | None,
) -> Tensor:
    """Block by block, the sums in float64, where they are exact."""
    whole, factor = quantize_tokens(x)
    rows = []
    for row in range(len(offsets) - 1):
        total = torch.zeros(*x.shape[:2], SIDE, dtype=torch.float64, device=x.device)
        for n in range(int(offsets[row]), int(offsets[row + 1])):
            total = total + whole[..., columns[n].long()].double() @ blocks[n].T.double()
        rows.append(total)
    return _rescaled(torch.cat(rows, dim=-1), factor, scales, bias)


def dense(
    x: Tensor,
    scales: Tensor,
    blocks: Tensor,
    columns: Tensor,
    offsets: Tensor,
    bias: Tensor | None,
) -> Tensor:
    """The whole matrix with its zeros, and one product in float64, where sums are exact."""
    whole, factor = quantize_tokens(x)
    rows = rows_of_blocks(offsets, len(blocks))
    weight = torch.zeros(len(offsets) - 1, x.shape[2], SIDE, dtype=torch.float64, device=x.device)
    places = (rows.unsqueeze(1).expand(-1, SIDE), columns.long())
    weight.index_put_(places, blocks.transpose(1, 2).double(), accumulate=True)
    total = whole.double() @ weight.transpose(1, 2).flatten(0, 1).T
    return _rescaled(total, factor, scales, bias)


def _rescaled(total: Tensor, factor: Tensor, scales: Tensor, bias: Tensor | None) -> Tensor:
    y = total.to(scales.dtype) * scales * factor
    return y if bias is None else y + bias


def _why_not_native(
    x: Tensor,
    scales: Tensor,
    blocks: Tensor,
    columns: Tensor,
    offsets: Tensor,
    bias: Tensor | None,
) -> str | None:
    return native.without_gradients(x, scales, bias)


def sample(case: Case, generator: Generator) -> dict[str, Any]:
    """Random inputs and blocks, as arguments of `quantized_sparse_matmul`; the first row of blocks is empty."""

    def normal(*sizes: int) -> Tensor:
        return torch.randn(*sizes, generator=generator)

    B, T, inputs, outputs = (case[letter] for letter in "BTIO")
    most = max(1, round(case["density"] * inputs / SIDE))
    counts = torch.randint(most, 2 * most, (outputs // SIDE,), generator=generator)
    counts[0] = most if outputs == SIDE else 0
    num_blocks = int(counts.sum())
    columns = torch.rand(num_blocks, inputs, generator=generator).topk(SIDE).indices
    arguments = {
        "x": normal(B, T, inputs),
        "scales": torch.rand(outputs, generator=generator) * (LARGEST * (SIDE * most) ** 0.5) ** -1,
        "blocks": torch.randint(-127, 128, (num_blocks, SIDE, SIDE), generator=generator).to(
            torch.int8
        ),
        "columns": columns.int(),
        "offsets": torch.cat([torch.zeros(1, dtype=torch.long), counts.cumsum(0)]),
    }
    return {**arguments, "bias": normal(outputs)} if case.get("bias") else arguments


def extreme(case: Case, generator: Generator) -> dict[str, Any]:
    """Tokens from nothing to very large."""
    inputs = sample(case, generator)
    levels = torch.tensor([0.0, 1e-35, 1e-20, 1.0, 1e10])
    tokens = levels[torch.randint(len(levels), inputs["x"].shape[:2], generator=generator)]
    inputs["x"] = inputs["x"] * tokens.unsqueeze(-1)
    return inputs


def cost(case: Case) -> Cost:
    """Of the blocks alone: a byte per weight and an index per column of a block."""
    B, T, inputs, outputs = (case[letter] for letter in "BTIO")
    weights = case["density"] * inputs * outputs
    return Cost(flops=2 * B * T * weights, bytes=2 * weights + 4 * B * T * (inputs + outputs))


SIZES = {"B": 2, "T": 37, "I": 40, "O": 24}
TIMING = {"B": 1, "T": 512, "I": 768, "O": 3072}  # of BERT-base

OPERATOR = Operator(
    function=quantized_sparse_matmul,
    equation=r"y_{to} = s_t \sigma_o \sum_i W_{oi} \lfloor x_{ti} / s_t \rceil + b_o,\quad "
    r"s_t = \max_i |x_{ti}| / 127",
    source="Shen et al. 2023 (arXiv:2306.16601)",
    axes=AXES,
    definition=definition,
    forms={
        "native": Form(native.quantized_sparse_matmul, _why_not_native, trains=False, fused=True),
        "dense": Form(dense),
    },
    sample=sample,
    extreme=extreme,
    cases=[
        Case("plain", SIZES, {"density": 0.3}),
        Case("bias", {**SIZES, "I": 21, "O": 132}, {"density": 0.5, "bias": True}),
        Case("long_sums", {**SIZES, "T": 5, "I": 2100, "O": 8}, {"density": 1.0}),
    ],
    timing=[
        Case("tenth", TIMING, {"density": 0.1}),
        Case("third", TIMING, {"density": 0.3}),
    ],
    cost=cost,
)
