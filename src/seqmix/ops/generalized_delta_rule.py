"""Generalised delta rule: a decaying matrix memory changed by what it held in a direction of its own.

    u_t = S_{t-1}^T a_t        S_t = diag(exp(g_t)) S_{t-1} + b_t u_t^T + k_t v_t^T        o_t = scale * S_t^T q_t

The transition diag(exp(g_t)) + b_t a_t^T is diagonal plus low rank. RWKV-7 removes with a = -n, b = n * rate
(|n| = 1, rates in [0, 1] per dimension) and writes with another key; the delta rule is the case in which all
three are one direction. What is removed is read before the decay.
Axes: B batch, T time, H heads, K key width, V value width; M chunks, C places in a chunk.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from seqmix.core.cost import Cost
from seqmix.core.numerics import widen
from seqmix.ops._arguments import check_not_positive, check_tensors
from seqmix.ops._chunks import decayed_scores, from_chunks, into_chunks, running_total
from seqmix.ops._operator import Case, Form, Operator, longer_than
from seqmix.ops._packing import in_rows

CHUNK = 64
SHORT = 4  # up to here the loop over tokens beats a chunk
AXES = {
    "q": "B T H K",
    "k": "B T H K",
    "v": "B T H V",
    "a": "B T H K",
    "b": "B T H K",
    "g": "B T H K",
    "initial_state": "R H K V",
}


def generalized_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    g: Tensor,
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    form: str | None = None,
) -> tuple[Tensor, Tensor | None]:
    """S_t = diag(exp(g_t)) S_{t-1} + b_t (S_{t-1}^T a_t)^T + k_t v_t^T, o_t = scale * S_t^T q_t.

    Args:
        q: queries, [B, T, H, K].
        k, v: what is written: keys [B, T, H, K] and values [B, T, H, V].
        a, b: the direction that is read from the state and the direction in which that is put back,
            [B, T, H, K]. The state can grow without bound unless diag(exp(g)) + b a^T contracts, as for
            a = -n, b = n * rate with |n| = 1 and rates in [0, 1].
        g: log decays of at most 0, [B, T, H, K].
        scale: factor on the output, K**-0.5 by default.
        initial_state: S before the first token, [B, H, K, V]; zeros by default.
        output_final_state: whether to return S after the last token.
        cu_seqlens: boundaries [N+1] of N texts packed in one row (B = 1); states then have N rows.
        form: forces one form (`recurrent`, `chunked`, `definition`).

    Returns:
        o [B, T, H, V] in the dtype of v, and S [B, H, K, V] in float32 (float64 for float64 inputs) or None.

    Raises:
        ShapeError, DtypeError, RangeError: for an argument that does not fit, with what to do.
        NoUsableForm: when `form` cannot run here.

    Source: Peng et al. 2025 (RWKV-7), eq. 1 and section 4.
    """
    tensors = {"q": q, "k": k, "v": v, "a": a, "b": b, "g": g}
    sizes = check_tensors("generalized_delta_rule", AXES, tensors)
    check_not_positive("generalized_delta_rule", "g", g)
    texts = in_rows("generalized_delta_rule", cu_seqlens, q)
    bound = {"R": texts.num_texts, "H": sizes["H"], "K": sizes["K"], "V": sizes["V"]}
    check_tensors("generalized_delta_rule", AXES, {"initial_state": initial_state}, **bound)

    dtype = v.dtype
    q, k, v, a, b, g, state = widen(q, k, v, a, b, g, initial_state)
    if state is None:
        state = v.new_zeros(texts.num_texts, sizes["H"], sizes["K"], sizes["V"])
    factor = sizes["K"] ** -0.5 if scale is None else scale
    o, state = texts.run(partial(OPERATOR.run, form), (q * factor, k, v, a, b, g), state)
    return o.to(dtype), state if output_final_state else None


def definition(
    q: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, g: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """The recurrence, token by token; scale is already in q."""
    outputs = []
    for t in range(q.shape[1]):
        held = (a[:, t, :, :, None] * state).sum(-2, keepdim=True)
        state = g[:, t, :, :, None].exp() * state
        state = state + b[:, t, :, :, None] * held + k[:, t, :, :, None] * v[:, t, :, None, :]
        outputs.append((q[:, t, :, None, :] @ state).squeeze(-2))
    return torch.stack(outputs, dim=1), state


def chunked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    g: Tensor,
    state: Tensor,
    *,
    chunk: int = CHUNK,
) -> tuple[Tensor, Tensor]:
    """All tokens of a chunk at once by a triangular solve, an affine recurrence between chunks.

    With r the running sum of g and e[i] = r[i-1], what token i reads is
    u[i] = (a[i] exp(e[i])) S + sum_{j < i} (a[i] exp(e[i] - r[j])) . (b[j] u[j] + k[j] v[j]), so that
    (I - A_b) u = A_k v + (a exp(e)) S. One solve gives u = U + W S, and with R = exp(r[C] - r) over the chunk
    S <- (diag(exp(r[C])) + (b R)^T W) S + (k R)^T v + (b R)^T U. No factor exceeds 1.
    """
    length, value_width = q.shape[1], v.shape[-1]
    chunk = min(chunk, length)
    q, k, v, a, b, g = (into_chunks(x, chunk) for x in (q, k, v, a, b, g))
    total = running_total(g, -2)
    before = F.pad(total, [0, 0, 1, 0])[..., :-1, :]  # up to the token before
    # The row of token i - 1 holds a[i]: scores up to the diagonal are then those with a decay up to i - 1.
    shifted = F.pad(a[..., 1:, :], [0, 0, 0, 1])
    writers = torch.stack([k, b])
    read_keys, read_removed = decayed_scores(q.expand_as(writers), writers, total)
    held_keys, held_removed = (
        F.pad(x, [0, 0, 1, 0])[..., :-1, :]
        for x in decayed_scores(shifted.expand_as(writers), writers, total)
    )
    last = total[..., -1:, :]
    q = q * total.to(q.dtype).exp()
    a = a * before.to(a.dtype).exp()
    remaining = (last - total).to(k.dtype).exp()
    k, b = k * remaining, b * remaining
    solved = torch.linalg.solve_triangular(
        -held_removed, torch.cat([held_keys @ v, a], dim=-1), upper=False, unitriangular=True
    )
    moved = b.transpose(-1, -2) @ solved  # [B, H, M, K, V + K]
    written = k.transpose(-1, -2) @ v + moved[..., :value_width]
    transition = torch.diag_embed(last.squeeze(-2).to(k.dtype).exp()) + moved[..., value_width:]
    starts = []
    for move, write in zip(transition.unbind(2), written.unbind(2), strict=True):
        starts.append(state)
        state = write + move @ state
    start = torch.stack(starts, dim=2)
    removed = solved[..., :value_width] + solved[..., value_width:] @ start
    o = read_keys @ v + read_removed @ removed + q @ start
    return from_chunks(o, length), state


def sample(case: Case, generator: Generator) -> dict[str, Any]:
    """Random inputs in the legal range, as arguments of `generalized_delta_rule`: removals that contract."""

    def normal(*letters: str) -> Tensor:
        return torch.randn(*(case[letter] for letter in letters), generator=generator)

    inputs = {"q": normal("B", "T", "H", "K"), "k": normal("B", "T", "H", "K") * case["K"] ** -0.5}
    inputs["v"] = normal("B", "T", "H", "V")
    direction = F.normalize(normal("B", "T", "H", "K"), dim=-1)
    inputs["a"] = -direction
    inputs["b"] = direction * normal("B", "T", "H", "K").sigmoid()
    inputs["g"] = F.logsigmoid(normal("B", "T", "H", "K") + case.get("bias", 1.0))
    inputs["initial_state"] = normal("B", "H", "K", "V")
    return inputs


def extreme(case: Case, generator: Generator) -> dict[str, Any]:
    """Decays from none to a complete reset, and one direction removed again and again, or not at all."""
    inputs = sample(case, generator)
    levels = torch.tensor([0.0, -1e-6, -0.7, -30.3, -1e4, -torch.inf])
    inputs["g"] = levels[torch.randint(len(levels), inputs["g"].shape, generator=generator)]
    inputs["a"] = inputs["a"][:, :1].expand_as(inputs["a"]).clone()
    rate = torch.randint(2, inputs["a"].shape[:-1], generator=generator).unsqueeze(-1)
    inputs["b"] = -inputs["a"] * rate
    return inputs


def cost(case: Case) -> Cost:
    """Of the chunked form: four scores, the solve, moving and reading the state, per chunk."""
    B, T, H, K, V = (case[letter] for letter in "BTHKV")
    C = min(CHUNK, T)
    chunks = -(-T // C)
    scores = T * (8 * C * K + 6 * C * V + C * (K + V))
    states = T * (2 * K * (K + V) + 2 * K * V + 4 * K * V) + chunks * 2 * K * K * V
    moved = T * (7 * K + 3 * V) + chunks * (2 * K * V + 2 * K * K)
    return Cost(
        flops=B * H * (scores + states), bytes=4 * B * H * moved, state_bytes=4 * B * H * K * V
    )


SIZES = {"B": 2, "T": 37, "H": 2, "K": 8, "V": 12}
TIMING = {"B": 1, "T": 2048, "H": 4, "K": 64, "V": 64}

OPERATOR = Operator(
    function=generalized_delta_rule,
    equation=r"S_t = \mathrm{diag}(e^{g_t}) S_{t-1} + b_t (S_{t-1}^\top a_t)^\top + k_t v_t^\top,"
    r"\quad o_t = \mathrm{scale}\; S_t^\top q_t",
    source="Peng et al. 2025 (arXiv:2503.14456)",
    axes=AXES,
    definition=definition,
    forms={
        "recurrent": Form(definition, longer_than(SHORT)),
        "chunked": Form(chunked),
    },
    sample=sample,
    extreme=extreme,
    cases=[
        Case("removal", SIZES),
        Case("strong_decay", SIZES, {"bias": -4.0}),
        Case("weak_decay", {**SIZES, "T": 150}, {"bias": 7.0}),
        Case("narrow_values", {**SIZES, "K": 10, "V": 3}),
    ],
    timing=[Case("removal", TIMING)],
    cost=cost,
    value="v",
    chunk=CHUNK,
)
