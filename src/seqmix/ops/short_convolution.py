"""Short convolution: each channel mixes the last few tokens with weights of its own.

    y_t = activation(sum_i weight[:, W-1-i] x_{t-i} + bias),  i = 0 ... W-1

The state is the last W-1 inputs, oldest first, so a text can be continued and texts shorter than the
window hand on what they did not push out.
Axes: B batch, T time, D channels, W window; J = W-1 places of history.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from seqmix.core.cost import Cost
from seqmix.core.errors import RangeError, ShapeError
from seqmix.core.numerics import widen
from seqmix.kernels import missing
from seqmix.kernels import short_convolution as native
from seqmix.ops._arguments import check_tensors
from seqmix.ops._operator import Case, Form, Operator, with_extremes
from seqmix.ops._packing import Packing, in_rows

AXES = {"x": "B T D", "weight": "D W", "bias": "D", "initial_state": "R J D"}
ACTIVATIONS = (None, "silu")
WIDEST_SHIFTED = 8  # up to here a pass per tap beats the grouped convolution, on a CPU


def short_convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    form: str | None = None,
) -> tuple[Tensor, Tensor | None]:
    """y_t = activation(sum_i weight[:, W-1-i] x_{t-i} + bias): a causal depthwise convolution.

    Args:
        x: inputs, [B, T, D].
        weight: taps of each channel, [D, W]; the last one meets the current token.
        bias: added to every output, [D]; none by default.
        activation: None or "silu".
        initial_state: the W-1 inputs before the first token, oldest first, [B, W-1, D]; zeros by default.
        output_final_state: whether to return the last W-1 inputs.
        cu_seqlens: boundaries [N+1] of N texts packed in one row (B = 1); states then have N rows.
        form: forces one form (`native`, `shifted`, `conv1d`, `definition`).

    Returns:
        y [B, T, D] in the dtype of x, and the history [B, W-1, D] in float32 (float64 for float64 inputs)
        or None.

    Raises:
        ShapeError, DtypeError, RangeError: for an argument that does not fit, with what to do.
        NoUsableForm: when `form` cannot run here.

    Source: Gu & Dao 2023 (Mamba), section 3.4; Fu et al. 2022 (H3), the shift state space.
    """
    sizes = check_tensors("short_convolution", AXES, {"x": x, "weight": weight, "bias": bias})
    window = sizes["W"]
    if window < 1:
        raise ShapeError(
            "short_convolution: `weight` has no taps, wanted [D, W] with W of at least 1."
        )
    if activation not in ACTIVATIONS:
        raise RangeError(
            f"short_convolution: `activation` is {activation!r}, wanted None or 'silu'. "
            "Apply another function to the output."
        )
    texts = in_rows("short_convolution", cu_seqlens, x)
    bound = {"R": texts.num_texts, "J": window - 1, "D": sizes["D"]}
    check_tensors("short_convolution", AXES, {"initial_state": initial_state}, **bound)

    given, options = (x, weight, bias, initial_state), {"activation": activation}
    if fused := OPERATOR.fused(form, *given, **options):
        y, state = fused(*given, **options, cu_seqlens=cu_seqlens)
        return y, state if output_final_state else None

    dtype = x.dtype
    x, weight, bias, history = widen(x, weight, bias, initial_state)
    if history is None:
        history = x.new_zeros(texts.num_texts, window - 1, sizes["D"])
    if isinstance(texts, Packing):
        y, history = _in_one_row(x, history, texts, lambda row: OPERATOR.run(form, row, weight))
    else:
        extended = torch.cat([history, x], dim=1)  # [B, J + T, D]
        y = OPERATOR.run(form, extended, weight)
        # A copy, since a view would keep the whole text in memory for as long as the state.
        history = extended[:, sizes["T"] :].clone() if output_final_state else history
    if bias is not None:
        y = y + bias
    if activation == "silu":
        y = F.silu(y)
    return y.to(dtype), history if output_final_state else None


def _in_one_row(
    x: Tensor, history: Tensor, texts: Packing, convolve: Callable[[Tensor], Tensor]
) -> tuple[Tensor, Tensor]:
    """Packed texts [1, total, D], each behind its own history, need no padding.

    Text n then begins n * J places later than in x, and its history stands right before it. What is computed
    across a border falls on the places of histories, and is dropped.
    """
    num, reach, width = history.shape
    shift = reach * torch.arange(num, device=x.device)
    end = texts.lengths.cumsum(0)
    tokens = torch.arange(x.shape[1], device=x.device) + shift.repeat_interleave(texts.lengths)
    before = torch.arange(reach, device=x.device) + (end - texts.lengths + shift).unsqueeze(-1)
    row = x.new_zeros(x.shape[1] + num * reach, width)
    row = row.index_copy(0, before.flatten(), history.flatten(0, 1))
    row = row.index_copy(0, tokens + reach, x[0])
    y = convolve(row.unsqueeze(0)).index_select(1, tokens)
    last = before + texts.lengths.unsqueeze(-1)
    return y, row.index_select(0, last.flatten()).view(num, reach, width)


def definition(extended: Tensor, weight: Tensor) -> Tensor:
    """The sum, token by token; `extended [B, J + T, D]` begins with the history."""
    inputs, taps = extended.unbind(1), weight.unbind(1)
    outputs = []
    for t in range(len(inputs) - len(taps) + 1):
        y = inputs[t] * taps[0]
        for i in range(1, len(taps)):
            y = y + inputs[t + i] * taps[i]
        outputs.append(y)
    return torch.stack(outputs, dim=1)


def shifted(extended: Tensor, weight: Tensor) -> Tensor:
    """One product with the whole sequence per tap."""
    window = weight.shape[1]
    length = extended.shape[1] - window + 1
    y = extended[:, :length] * weight[:, 0]
    for tap in range(1, window):
        y = torch.addcmul(y, extended[:, tap : tap + length], weight[:, tap])
    return y


def conv1d(extended: Tensor, weight: Tensor) -> Tensor:
    """The library's grouped convolution, one group per channel."""
    y = F.conv1d(extended.transpose(1, 2), weight.unsqueeze(1), groups=weight.shape[0])
    return y.transpose(1, 2)


def sample(case: Case, generator: Generator) -> dict[str, Any]:
    """Random inputs, as arguments of `short_convolution`."""

    def normal(*letters: str) -> Tensor:
        return torch.randn(*(case[letter] for letter in letters), generator=generator)

    inputs: dict[str, Any] = {"x": normal("B", "T", "D"), "weight": normal("D", "W")}
    if case.get("bias"):
        inputs["bias"] = normal("D")
    if case.get("activation"):
        inputs["activation"] = case["activation"]
    state = torch.randn(case["B"], case["W"] - 1, case["D"], generator=generator)
    return inputs | {"initial_state": state}


def cost(case: Case) -> Cost:
    """One multiplication and one addition per tap; input read once, output written once."""
    B, T, D, W = (case[letter] for letter in "BTDW")
    return Cost(
        flops=2 * B * T * D * W,
        bytes=4 * (2 * B * T * D + D * W),
        state_bytes=4 * B * (W - 1) * D,
    )


SIZES = {"B": 2, "T": 37, "D": 6, "W": 4}
TIMING = {"B": 1, "T": 2048, "D": 512, "W": 4}

OPERATOR = Operator(
    function=short_convolution,
    equation=r"y_t = \sum_{i=0}^{W-1} w_{W-1-i} \odot x_{t-i} + b",
    source="Gu & Dao 2023 (arXiv:2312.00752); Fu et al. 2022 (arXiv:2212.14052)",
    axes=AXES,
    definition=definition,
    forms={
        "native": Form(native.short_convolution, missing, fused=True),
        "shifted": Form(
            shifted,
            lambda extended, weight: (
                None
                if weight.shape[1] <= WIDEST_SHIFTED
                else f"{weight.shape[1]} taps are more than {WIDEST_SHIFTED}: use form='conv1d'"
            ),
        ),
        "conv1d": Form(conv1d),
    },
    sample=sample,
    extreme=with_extremes(sample, "x"),
    cases=[
        Case("plain", SIZES),
        Case("biased", SIZES, {"bias": True, "activation": "silu"}),
        Case("one_tap", {**SIZES, "W": 1}),
        Case("wide", {**SIZES, "W": 9}, {"bias": True}),
    ],
    timing=[
        Case("four_taps", TIMING, {"bias": True, "activation": "silu"}),
        Case("sixteen_taps", {**TIMING, "W": 16}),
    ],
    cost=cost,
    chunk=4,
)
