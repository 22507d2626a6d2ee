"""Diagonal scan: every channel remembers one number, which each token decays and adds to.

    h_t = exp(a_t) h_{t-1} + x_t

Axes: B batch, T time, D channels; M chunks, C places in a chunk.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Generator, Tensor
from torch.autograd.function import once_differentiable

from seqmix.core.cost import Cost
from seqmix.core.numerics import widen
from seqmix.kernels import diagonal_scan as native
from seqmix.kernels import missing
from seqmix.ops._arguments import check_not_positive, check_tensors
from seqmix.ops._chunks import run_recurrence
from seqmix.ops._operator import Case, Form, Operator, longer_than
from seqmix.ops._packing import in_rows

CHUNK = 32
SHORT = 4  # up to here the loop over tokens beats a chunk
AXES = {"x": "B T D", "a": "B T D", "initial_state": "R D"}


def diagonal_scan(
    x: Tensor,
    a: Tensor,
    *,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    form: str | None = None,
) -> tuple[Tensor, Tensor | None]:
    """h_t = exp(a_t) h_{t-1} + x_t.

    Args:
        x: what each token adds, [B, T, D].
        a: log decays of at most 0, [B, T, D].
        initial_state: h before the first token, [B, D]; zeros by default.
        output_final_state: whether to return h after the last token.
        cu_seqlens: boundaries [N+1] of N texts packed in one row (B = 1); states then have N rows.
        form: forces one form (`native`, `recurrent`, `chunked`, `definition`).

    Returns:
        h [B, T, D] in the dtype of x, and the last h [B, D] in float32 (float64 for float64 inputs) or None.

    Raises:
        ShapeError, DtypeError, RangeError: for an argument that does not fit, with what to do.
        NoUsableForm: when `form` cannot run here.

    Source: Blelloch 1990 (first-order recurrences); Martin & Cundy 2018, section 2.
    """
    sizes = check_tensors("diagonal_scan", AXES, {"x": x, "a": a})
    check_not_positive("diagonal_scan", "a", a)
    texts = in_rows("diagonal_scan", cu_seqlens, x)
    bound = {"R": texts.num_texts, "D": sizes["D"]}
    check_tensors("diagonal_scan", AXES, {"initial_state": initial_state}, **bound)

    if compute := OPERATOR.fused(form, x, a, initial_state):
        h, state = compute(x, a, initial_state, cu_seqlens)
        return h, state if output_final_state else None

    dtype = x.dtype
    x, a, state = widen(x, a, initial_state)
    if state is None:
        state = x.new_zeros(texts.num_texts, sizes["D"])
    h, state = texts.run(partial(OPERATOR.run, form), (x, a), state)
    return h.to(dtype), state if output_final_state else None


def definition(x: Tensor, a: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """The recurrence, token by token."""
    outputs = []
    for x_t, a_t in zip(x.unbind(1), a.unbind(1), strict=True):
        state = a_t.exp() * state + x_t
        outputs.append(state)
    return torch.stack(outputs, dim=1), state


def chunked(x: Tensor, a: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """All chunks step together through their places: about 2 C + T / C operations instead of T.

    A first pass finds what each chunk adds by its end, a loop over chunks the state before each, and a
    second pass the states within. Only decays are multiplied, so nothing overflows.
    """
    h = _Scan.apply(x, a.exp(), state)
    return h, h[:, -1].clone()  # a view would keep all of h for as long as the state


class _Scan(torch.autograd.Function):
    """h_t = d_t h_{t-1} + x_t with d_t the decay itself.

    Adjoint: the gradient of h_t, G_t = h'_t + d_{t+1} G_{t+1}, is the same scan from the last token back;
    x'_t = G_t, d'_t = G_t h_{t-1}, and the initial state gets d_1 G_1.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, decay: Tensor, state: Tensor) -> Tensor:
        h = _scan(x, decay, state)
        ctx.save_for_backward(decay, state, h)
        return h

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_h: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        decay, state, h = ctx.saved_tensors
        state = state.unsqueeze(1)
        later = torch.cat([decay[:, 1:], torch.zeros_like(state)], dim=1)
        grad = _scan(grad_h.flip(1), later.flip(1), torch.zeros_like(state[:, 0])).flip(1)
        before = torch.cat([state, h[:, :-1]], dim=1)
        return grad, grad * before, grad[:, 0] * decay[:, 0]


def _scan(x: Tensor, decay: Tensor, state: Tensor) -> Tensor:
    length = x.shape[1]
    missing = -length % CHUNK
    h, decay = (F.pad(t, [0, 0, 0, missing]).unflatten(1, (-1, CHUNK)) for t in (x, decay))
    if not missing:
        h = h.clone()  # padding has copied otherwise
    values, decays = h.unbind(2), decay.unbind(2)
    added = values[0]
    for value, factor in zip(values[1:], decays[1:], strict=True):
        added = torch.addcmul(value, factor, added)
    added = added.clone()
    run_recurrence(decay.prod(2).unbind(1), added.unbind(1), state)
    before = torch.cat([state.unsqueeze(1), added[:, :-1]], dim=1)
    run_recurrence(decays, values, before)
    joined: Tensor = h.flatten(1, 2)
    return joined[:, :length]


def sample(case: Case, generator: Generator) -> dict[str, Any]:
    """Random inputs in the legal range, as arguments of `diagonal_scan`."""

    def normal(*letters: str) -> Tensor:
        return torch.randn(*(case[letter] for letter in letters), generator=generator)

    return {
        "x": normal("B", "T", "D"),
        "a": F.logsigmoid(normal("B", "T", "D") + case.get("bias", 1.0)),
        "initial_state": normal("B", "D"),
    }


def extreme(case: Case, generator: Generator) -> dict[str, Any]:
    """Decays from none to a complete reset, side by side."""
    inputs = sample(case, generator)
    levels = torch.tensor([0.0, -1e-6, -1.0, -30.0, -1e4, -torch.inf])
    inputs["a"] = levels[torch.randint(len(levels), inputs["a"].shape, generator=generator)]
    return inputs


def cost(case: Case) -> Cost:
    """Of the chunked form: two passes over each entry, the decay counted as one operation."""
    B, T, D = (case[letter] for letter in "BTD")
    return Cost(flops=6 * B * T * D, bytes=4 * 6 * B * T * D, state_bytes=4 * B * D)


SIZES = {"B": 2, "T": 37, "D": 10}

OPERATOR = Operator(
    function=diagonal_scan,
    equation=r"h_t = e^{a_t} h_{t-1} + x_t",
    source="Blelloch 1990 (CMU-CS-90-190); Martin & Cundy 2018 (arXiv:1709.04057)",
    axes=AXES,
    definition=definition,
    forms={
        "native": Form(native.diagonal_scan, missing, fused=True),
        "recurrent": Form(definition, longer_than(SHORT)),
        "chunked": Form(chunked),
    },
    sample=sample,
    extreme=extreme,
    cases=[
        Case("plain", SIZES),
        Case("strong_decay", SIZES, {"bias": -4.0}),
        Case("weak_decay", {**SIZES, "T": 150}, {"bias": 9.0}),
    ],
    timing=[
        Case("one_text", {"B": 1, "T": 2048, "D": 256}),
        Case("batch", {"B": 8, "T": 2048, "D": 256}),
    ],
    cost=cost,
    value="x",
    chunk=CHUNK,
)
