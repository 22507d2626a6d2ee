"""Selective scan (Mamba): a diagonal state space whose step size, input and output maps follow the token.

    h_t = exp(delta_t A) h_{t-1} + delta_t u_t B_t        y_t = C_t . h_t + D u_t

Each of the E channels has a state of width N of its own; B_t and C_t are shared by all channels.
Axes: B batch, T time, E channels, N state width; C places in a chunk.
The arguments B and C keep the paper's names, which are not the axes B and C.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Generator, Tensor
from torch.autograd.function import once_differentiable

from seqmix.core.cost import Cost
from seqmix.core.numerics import widen
from seqmix.kernels import missing
from seqmix.kernels import selective_scan as native
from seqmix.ops._arguments import check_tensors
from seqmix.ops._chunks import run_recurrence
from seqmix.ops._operator import Case, Form, Operator, longer_than
from seqmix.ops._packing import in_rows
from seqmix.ops._step_size import check_decay_rate, step_size

CHUNK = 32
SHORT = 4  # up to here the loop over tokens beats a chunk
AXES = {
    "u": "B T E",
    "delta": "B T E",
    "A": "E N",
    "B": "B T N",
    "C": "B T N",
    "D": "E",
    "z": "B T E",
    "delta_bias": "E",
    "initial_state": "R E N",
}


def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    *,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    form: str | None = None,
) -> tuple[Tensor, Tensor | None]:
    """h_t = exp(delta_t A) h_{t-1} + delta_t u_t B_t, y_t = (C_t . h_t + D u_t) * silu(z_t).

    Args:
        u: inputs, [B, T, E].
        delta: step sizes, [B, T, E]; with `delta_bias` added and after the softplus, if any, at least 0.
        A: decay rates, [E, N], finite and at most 0.
        B, C: input and output maps, [B, T, N].
        D: weight of the input in the output, [E]; none by default.
        z: gate of the output, [B, T, E]; none by default.
        delta_bias: added to delta, [E].
        delta_softplus: whether delta passes through log(1 + exp(.)), after the bias.
        initial_state: h before the first token, [B, E, N]; zeros by default.
        output_final_state: whether to return h after the last token.
        cu_seqlens: boundaries [R+1] of R texts packed in one row (B = 1); states then have R rows.
        form: forces one form (`native`, `recurrent`, `chunked`, `definition`).

    Returns:
        y [B, T, E] in the dtype of u, and h [B, E, N] in float32 (float64 for float64 inputs) or None.

    Raises:
        ShapeError, DtypeError, RangeError: for an argument that does not fit, with what to do.
        NoUsableForm: when `form` cannot run here.

    Source: Gu & Dao 2023 (Mamba), eq. 2a and 4 with B discretised as delta * B, algorithm 2.
    """
    return scan(
        OPERATOR,
        u,
        delta,
        A,
        B,
        C,
        D,
        z=z,
        delta_bias=delta_bias,
        delta_softplus=delta_softplus,
        initial_state=initial_state,
        output_final_state=output_final_state,
        cu_seqlens=cu_seqlens,
        form=form,
    )


def scan(
    operator: Operator,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    *,
    z: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    initial_state: Tensor | None,
    output_final_state: bool,
    cu_seqlens: Tensor | None,
    form: str | None,
) -> tuple[Tensor, Tensor | None]:
    """What the public functions of both selective scans do around the forms of `operator`."""
    tensors = {"u": u, "delta": delta, "A": A, "B": B, "C": C, "D": D, "z": z}
    sizes = check_tensors(operator.name, AXES, {**tensors, "delta_bias": delta_bias})
    check_decay_rate(operator.name, "A", A)
    texts = in_rows(operator.name, cu_seqlens, u)
    bound = {"R": texts.num_texts, "E": sizes["E"], "N": sizes["N"]}
    check_tensors(operator.name, AXES, {"initial_state": initial_state}, **bound)

    given = (u, delta, A, B, C, D, z, delta_bias, initial_state)
    if fused := operator.fused(form, *given, delta_softplus=delta_softplus, cu_seqlens=cu_seqlens):
        if not delta_softplus:
            step_size(operator.name, "delta", delta.detach(), delta_bias, softplus=False)
        y, state = fused(*given, delta_softplus=delta_softplus, cu_seqlens=cu_seqlens)
        return y, state if output_final_state else None

    dtype = u.dtype
    u, delta, A, B, C, D, z, delta_bias, state = widen(
        u, delta, A, B, C, D, z, delta_bias, initial_state
    )
    delta = step_size(operator.name, "delta", delta, delta_bias, softplus=delta_softplus)
    if state is None:
        state = u.new_zeros(texts.num_texts, sizes["E"], sizes["N"])

    def compute(u: Tensor, delta: Tensor, B: Tensor, C: Tensor, state: Tensor) -> Any:
        return operator.run(form, u, delta, A, B, C, state)

    # After the softplus, so that padding has a step of 0 and leaves the state alone.
    y, state = texts.run(compute, (u, delta, B, C), state)
    if D is not None:
        y = y + D * u
    if z is not None:
        y = y * F.silu(z)
    return y.to(dtype), state if output_final_state else None


def definition(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    state: Tensor,
    *,
    negative: bool = False,
) -> tuple[Tensor, Tensor]:
    """The recurrence, token by token."""
    outputs = []
    for u_t, delta_t, B_t, C_t in zip(*(x.unbind(1) for x in (u, delta, B, C)), strict=True):
        decay = (delta_t[..., None] * A).exp()
        if negative:
            decay = 2 * decay - 1
        state = decay * state + (delta_t * u_t)[..., None] * B_t[:, None, :]
        outputs.append((state @ C_t[..., None]).squeeze(-1))
    return torch.stack(outputs, dim=1), state


def chunked(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    state: Tensor,
    *,
    negative: bool = False,
) -> tuple[Tensor, Tensor]:
    """Exponentials, reads and writes of a chunk at once, one operation per token between them.

    Only the states at the borders of chunks are kept for the backward pass; those in between are computed
    again there, so training takes the memory of T / CHUNK states.
    """
    y, state = _Scan.apply(delta, delta * u, A, B, C, state, negative)
    return y, state


class _Scan(torch.autograd.Function):
    """h_t = d_t h_{t-1} + w_t B_t, y_t = C_t . h_t, chunk by chunk; d_t = e_t or 2 e_t - 1, e_t = exp(delta_t A).

    Adjoint: with G_t the gradient of h_t,
        G_t = y'_t C_t + d_{t+1} G_{t+1}        (from the last token back)
        C'_t = sum_e y'_t h_t,  w'_t = G_t . B_t,  B'_t = sum_e w_t G_t
        delta'_t = sum_n A L_t,  A' = sum_t delta_t L_t,  L_t = G_t d'_t h_{t-1}, the gradient of delta_t A,
        where d'_t = e_t = d_t, or 2 e_t = d_t + 1.
    """

    @staticmethod
    def forward(
        ctx: Any,
        delta: Tensor,
        w: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        state: Tensor,
        negative: bool,
    ) -> tuple[Tensor, Tensor]:
        outputs, borders = [], []
        for d, w_, B_, C_ in _split(delta, w, B, C):
            borders.append(state)
            _, h = _states(d, w_, A, B_, state, negative)
            outputs.append(h @ C_.unsqueeze(-1))
            state = h[-1].clone()  # not a view, which would keep the whole chunk
        ctx.save_for_backward(delta, w, A, B, C, *borders)
        ctx.negative = negative
        return torch.cat(outputs).squeeze(-1).transpose(0, 1), state

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor, grad_state: Tensor) -> tuple[Tensor | None, ...]:
        delta, w, A, B, C, *borders = ctx.saved_tensors
        grad_A = torch.zeros_like(A)
        parts = []
        chunks = _split(delta, w, B, C, grad_y)
        for (d, w_, B_, C_, y_), border in zip(chunks[::-1], borders[::-1], strict=True):
            decay, h = _states(d, w_, A, B_, border, ctx.negative)
            g = y_.unsqueeze(-1) * C_.unsqueeze(2)
            g[-1] += grad_state
            run_recurrence(decay.unbind()[:0:-1], g.unbind()[-2::-1], g[-1])
            grad_w = (g @ B_.unsqueeze(-1)).squeeze(-1)
            grad_B, grad_C = (w_.unsqueeze(2) @ g).squeeze(2), (y_.unsqueeze(2) @ h).squeeze(2)
            grad_state = g[0] * decay[0]
            g *= decay.add_(1) if ctx.negative else decay
            g[0] *= border
            g[1:] *= h[:-1]  # from here on the L of the docstring
            parts.append(((g * A).sum(-1), grad_w, grad_B, grad_C))
            grad_A += g.mul_(d.unsqueeze(-1)).sum((0, 1))
        grad_delta, grad_w, grad_B, grad_C = (
            torch.cat(part[::-1]).transpose(0, 1) for part in zip(*parts, strict=True)
        )
        return grad_delta, grad_w, grad_A, grad_B, grad_C, grad_state, None


def _split(*tensors: Tensor) -> list[tuple[Tensor, ...]]:
    """The chunks of `[B, T, ...]`, each with time first, `[C, B, ...]`: steps are then contiguous."""
    return list(zip(*(x.transpose(0, 1).split(CHUNK) for x in tensors), strict=True))


def _states(
    d: Tensor, w: Tensor, A: Tensor, B: Tensor, state: Tensor, negative: bool
) -> tuple[Tensor, Tensor]:
    """The transitions and the states of one chunk, both [C, B, E, N]."""
    decay = (d.unsqueeze(-1) * A).exp_()
    if negative:
        decay.mul_(2).sub_(1)
    h = w.unsqueeze(-1) * B.unsqueeze(2)
    run_recurrence(decay.unbind(), h.unbind(), state)
    return decay, h


def sample(case: Case, generator: Generator) -> dict[str, Any]:
    """Random inputs in the legal range, as arguments of `selective_scan`."""

    def normal(*letters: str) -> Tensor:
        return torch.randn(*(case[letter] for letter in letters), generator=generator)

    inputs: dict[str, Any] = {"u": normal("B", "T", "E")}
    if case.get("softplus"):
        inputs |= {"delta": normal("B", "T", "E"), "delta_bias": normal("E") - 1.0}
        inputs["delta_softplus"] = True
    else:
        inputs["delta"] = F.softplus(normal("B", "T", "E") + case.get("bias", -1.0))
    inputs |= {"A": -normal("E", "N").exp(), "B": normal("B", "T", "N"), "C": normal("B", "T", "N")}
    if case.get("gated"):
        inputs |= {"D": normal("E"), "z": normal("B", "T", "E")}
    return inputs | {"initial_state": normal("B", "E", "N")}


def extreme(case: Case, generator: Generator) -> dict[str, Any]:
    """Steps and rates from nothing to a complete reset, side by side."""
    inputs = sample(case, generator)
    steps = torch.tensor([0.0, 1e-6, 1.0, 30.0, 1e3])
    if case.get("softplus"):
        steps = torch.tensor([-1e4, -20.0, 0.0, 30.0, 1e3])
    rates = torch.tensor([0.0, -1e-6, -1.0, -1e4])
    for name, levels in (("delta", steps), ("A", rates)):
        inputs[name] = levels[torch.randint(len(levels), inputs[name].shape, generator=generator)]
    return inputs


def cost(case: Case) -> Cost:
    """Per token, channel and state entry: the decay (an exponential counts as one), h, and C . h."""
    B, T, E, N = (case[letter] for letter in "BTEN")
    flops = B * T * E * (7 * N + 1)
    moved = 4 * B * (T * (3 * E + 2 * N) + -(-T // CHUNK) * 2 * E * N)
    return Cost(flops=flops, bytes=moved, state_bytes=4 * B * E * N)


SIZES = {"B": 2, "T": 37, "E": 6, "N": 4}
TIMING = {"B": 1, "T": 2048, "E": 256, "N": 16}

OPERATOR = Operator(
    function=selective_scan,
    equation=r"h_t = e^{\Delta_t A} h_{t-1} + \Delta_t u_t B_t,\quad y_t = C_t^\top h_t + D u_t",
    source="Gu & Dao 2023 (arXiv:2312.00752)",
    axes=AXES,
    definition=definition,
    forms={
        "native": Form(native.selective_scan, missing, fused=True),
        "recurrent": Form(definition, longer_than(SHORT)),
        "chunked": Form(chunked),
    },
    sample=sample,
    extreme=extreme,
    cases=[
        Case("plain", SIZES),
        Case("gated", SIZES, {"gated": True}),
        Case("softplus", SIZES, {"softplus": True, "gated": True}),
        Case("strong_decay", SIZES, {"bias": 4.0}),
        Case("weak_decay", {**SIZES, "T": 150}, {"bias": -7.0}),
    ],
    timing=[
        Case("one_text", TIMING),
        Case("batch", {**TIMING, "B": 4}, {"gated": True, "softplus": True}),
    ],
    cost=cost,
    value="u",
    chunk=CHUNK,
)
