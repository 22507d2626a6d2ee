"""Products with int8 weights by PyTorch's own kernels (FBGEMM), with activations in two digits of seven bits.

    x_t = s_t (a_t + b_t / 127),   s_t = max |x_t| / 63,   a_t, b_t whole numbers from -63 to 63
    y_to = sum_i x_ti W_oi scale_o

Seven bits, because the kernels for AVX2 add pairs of products in 16 bits. With one digit a token would lose about a
hundredth; with two it loses about 1e-4, and for few tokens, where reading the weights takes the time, the second costs
little. Digits belong to single tokens, so no token depends on another. For many tokens the time goes to arithmetic,
which twice as many products double: there the weight is turned to the dtype of x, and the product is a dense one.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

DIGIT = 63  # the largest
NEXT = 127  # a rounding error of at most half a step, times this, is again a digit
MANY = 32  # tokens, from which on the dense product is the faster one


def why_not_packed(x: Tensor, weight: Tensor) -> str | None:
    """Why the packed kernel cannot run; None if it can."""
    if torch.is_grad_enabled() and x.requires_grad:
        return "the packed kernel has no backward, and gradients are wanted"
    if not (x.device.type == "cpu" and weight.device.type == "cpu"):
        return "the packed kernel runs on the CPU"
    if x.shape[:-1].numel() >= MANY:
        return f"from {MANY} tokens on the dense product is faster"
    if torch.compiler.is_compiling():
        return "torch.compile does not see into packed weights"
    if "fbgemm" not in torch.backends.quantized.supported_engines:
        return "this PyTorch was built without FBGEMM"
    return None


def pack(weight: Tensor, scale: Tensor) -> Any:
    """The int8 weight [O, I] with a factor per output [O], laid out for the kernel."""
    before = torch.backends.quantized.engine
    zeros = torch.zeros(len(scale), dtype=torch.long)
    with warnings.catch_warnings():
        # PyTorch says that its tensors of quantised numbers will change; these do not leave this function.
        warnings.simplefilter("ignore")
        torch.backends.quantized.engine = "fbgemm"
        try:
            whole = torch._make_per_channel_quantized_tensor(weight, scale.double(), zeros, 0)
            return torch.ops.quantized.linear_prepack(whole, None)
        finally:
            torch.backends.quantized.engine = before


def packed_product(x: Tensor, packed: Any) -> Tensor:
    """x [..., I] to y [..., O] in the dtype of x."""
    rows = x.detach().float().flatten(0, -2)
    if not len(rows):
        return x.new_empty(*x.shape[:-1], packed.unpack()[0].shape[0])
    step = rows.abs().amax(-1, keepdim=True).clamp_min(1e-30) / DIGIT
    steps = rows / step
    first = steps.round()
    digits = torch.cat([first, (steps - first) * NEXT])
    multiply = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32
    high, low = multiply(digits, 1.0, DIGIT + 1, packed).chunk(2)
    y: Tensor = torch.add(high, low, alpha=1 / NEXT) * step
    return y.to(x.dtype).view(*x.shape[:-1], y.shape[-1])


def dense_product(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """The same by a dense product: for gradients, for many tokens, and where there is no packed kernel."""
    return F.linear(x, weight.to(x.dtype)) * scale.to(x.dtype)
