"""Long convolution: each channel is filtered by a kernel that may reach over the whole text.

    y_t = sum_{s <= t} kernel[:, s] u_{t-s} + D u_t

Axes: B batch, T time, E channels, L kernel length (shorter or longer than T).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from seqmix.core.cost import Cost
from seqmix.core.numerics import widen
from seqmix.ops._arguments import check_tensors
from seqmix.ops._operator import Case, Form, Operator, with_extremes
from seqmix.ops._packing import in_rows

LONGEST_DIRECT = 32  # up to here a product per tap beats the transforms, on a CPU and in training
AXES = {"u": "B T E", "kernel": "E L", "D": "E"}


def long_convolution(
    u: Tensor,
    kernel: Tensor,
    D: Tensor | None = None,
    *,
    cu_seqlens: Tensor | None = None,
    form: str | None = None,
) -> Tensor:
    """y_t = sum_{s <= t} kernel[:, s] u_{t-s} + D u_t.

    Args:
        u: inputs, [B, T, E].
        kernel: filter of each channel, [E, L], beginning with the weight of the current token; what lies
            beyond T is not used.
        D: weight of the input in the output, [E]; none by default.
        cu_seqlens: boundaries [N+1] of N texts packed in one row (B = 1); no text sees another.
        form: forces one form (`fft`, `direct`, `definition`).

    Returns:
        y [B, T, E] in the dtype of u, computed in float32 (float64 for float64 inputs).

    Raises:
        ShapeError, DtypeError, RangeError: for an argument that does not fit, with what to do.
        NoUsableForm: when `form` cannot run here.

    Source: Gu et al. 2021 (S4), section 2.4; Poli et al. 2023 (Hyena), section 2.
    """
    check_tensors("long_convolution", AXES, {"u": u, "kernel": kernel, "D": D})
    texts = in_rows("long_convolution", cu_seqlens, u)

    dtype = u.dtype
    u, kernel, D = widen(u, kernel, D)

    def compute(u: Tensor, state: None) -> tuple[Tensor, None]:
        return OPERATOR.run(form, u, kernel[:, : u.shape[1]]), None

    y, _ = texts.run(compute, (u,))
    if D is not None:
        y = y + D * u
    return y.to(dtype)


def definition(u: Tensor, kernel: Tensor) -> Tensor:
    """The sum, token by token; the kernel is at most as long as u."""
    outputs = []
    for t in range(u.shape[1]):
        reach = min(t + 1, kernel.shape[1])
        seen = u[:, t + 1 - reach : t + 1].flip(1)  # the current token first
        outputs.append(torch.einsum("bse,es->be", seen, kernel[:, :reach]))
    return torch.stack(outputs, dim=1)


def fft(u: Tensor, kernel: Tensor) -> Tensor:
    """A product of spectra, over a length at which nothing wraps around."""
    length = u.shape[1]
    size = fast_size(length + kernel.shape[1] - 1)
    signal = torch.fft.rfft(u.transpose(1, 2), n=size)
    response = torch.fft.rfft(kernel, n=size)
    y: Tensor = torch.fft.irfft(signal * response, n=size)
    return y[..., :length].transpose(1, 2)


def fast_size(size: int) -> int:
    """The smallest 2^n or 3 * 2^n that is at least `size`: transforms of large prime lengths are slow."""
    power = 1 << max(size - 1, 0).bit_length()
    return power * 3 // 4 if power >= 4 and power * 3 // 4 >= size else power


def direct(u: Tensor, kernel: Tensor) -> Tensor:
    """The library's grouped convolution, one group per channel."""
    reach = kernel.shape[1]
    extended = F.pad(u.transpose(1, 2), [reach - 1, 0])
    y = F.conv1d(extended, kernel.flip(1).unsqueeze(1), groups=kernel.shape[0])
    return y.transpose(1, 2)


def sample(case: Case, generator: Generator) -> dict[str, Any]:
    """Random inputs, as arguments of `long_convolution`; the kernel fades as those of state spaces do."""

    def normal(*letters: str) -> Tensor:
        return torch.randn(*(case[letter] for letter in letters), generator=generator)

    fading = torch.exp(-torch.linspace(0, 3, case["L"]))
    inputs = {"u": normal("B", "T", "E"), "kernel": normal("E", "L") * fading}
    if case.get("skip"):
        inputs["D"] = normal("E")
    return inputs


def cost(case: Case) -> Cost:
    """Of the fft form: three real transforms of 2.5 n log2(n) operations, and the complex product."""
    B, T, E, L = (case[letter] for letter in "BTEL")
    size = fast_size(T + min(L, T) - 1)
    transform = 2.5 * size * max(1, size.bit_length() - 1)
    flops = E * ((2 * B + 1) * transform + B * 3 * size)
    return Cost(flops=flops, bytes=4 * E * ((2 * B * T) + L + (2 * B + 1) * size))


SIZES = {"B": 2, "T": 37, "E": 6, "L": 37}
TIMING = {"B": 1, "T": 2048, "E": 256, "L": 2048}

OPERATOR = Operator(
    function=long_convolution,
    equation=r"y_t = \sum_{s=0}^{t} k_s \odot u_{t-s} + D \odot u_t",
    source="Gu et al. 2021 (arXiv:2111.00396); Poli et al. 2023 (arXiv:2302.10866)",
    axes=AXES,
    definition=definition,
    forms={
        "direct": Form(
            direct,
            lambda u, kernel: (
                None
                if kernel.shape[1] <= LONGEST_DIRECT
                else f"{kernel.shape[1]} taps are more than {LONGEST_DIRECT}: use form='fft'"
            ),
        ),
        "fft": Form(fft),
    },
    sample=sample,
    extreme=with_extremes(sample, "u"),
    cases=[
        Case("whole", SIZES),
        Case("skip", SIZES, {"skip": True}),
        Case("short_kernel", {**SIZES, "L": 5}),
        Case("long_kernel", {**SIZES, "L": 90}, {"skip": True}),
    ],
    timing=[
        Case("whole", TIMING),
        Case("short_kernel", {**TIMING, "L": 32}),
    ],
    cost=cost,
    value="u",
)
