"""Delta rule: a matrix memory that replaces what it holds under a key instead of adding to it.

    S <- exp(g_t) S, then for each of the token's steps  S <- S + beta k (v - S^T k)^T;    o_t = scale * S^T q_t

g is absent (DeltaNet), one number per head (Gated DeltaNet) or one per key dimension (Kimi Delta Attention);
several steps per token give DeltaProduct. With |k| = 1 the eigenvalue along k becomes 1 - beta: beta in
[0, 1] keeps it in [0, 1], beta up to 2 reaches [-1, 1].
Axes: B batch, T time, H heads of values, G heads of queries and keys (each read by H / G heads), K key width,
V value width; M chunks, C rows (token steps) in a chunk.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from seqmix.core.cost import Cost
from seqmix.core.errors import RangeError, ShapeError
from seqmix.core.numerics import widen
from seqmix.kernels import delta_rule as native
from seqmix.kernels import missing
from seqmix.ops._arguments import check_not_positive, check_tensors
from seqmix.ops._chunks import (
    decay_matrix,
    decayed_scores,
    from_chunks,
    into_chunks,
    running_total,
)
from seqmix.ops._operator import Case, Form, Operator, longer_than
from seqmix.ops._packing import in_rows

CHUNK = 64
SHORT = 6  # up to here the loop over tokens beats a chunk
AXES: dict[str, str | tuple[str, ...]] = {
    "q": "B T G K",
    "k": "B T*steps G K",
    "v": "B T*steps H V",
    "beta": "B T*steps H",
    "g": ("B T H", "B T H K"),
    "initial_state": "R H K V",
}
EPSILON = 1e-6  # under the root of qk_l2norm


def delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    g: Tensor | None = None,
    *,
    steps: int = 1,
    scale: float | None = None,
    qk_l2norm: bool = False,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    form: str | None = None,
) -> tuple[Tensor, Tensor | None]:
    """S <- exp(g_t) S, then `steps` times S <- S + beta k (v - S^T k)^T; o_t = scale * S^T q_t.

    Args:
        q: queries, [B, T, G, K]; value head h reads head h // (H / G), G = H for heads of their own.
        k, v: keys [B, T*steps, G, K] and values [B, T*steps, H, V]; a token's steps are neighbours.
        beta: writing strengths in [0, 2], [B, T*steps, H]; up to 1 for eigenvalues in [0, 1].
        g: log decays of at most 0, once per token, [B, T, H] or [B, T, H, K]; None for no decay.
        steps: Householder steps per token.
        scale: factor on the output, K**-0.5 by default.
        qk_l2norm: divides q and k by their lengths; otherwise k is used as given and should have length
            at most 1, or the state can grow without bound.
        initial_state: S before the first token, [B, H, K, V]; zeros by default.
        output_final_state: whether to return S after the last token.
        cu_seqlens: boundaries [N+1] (in tokens) of N texts packed in one row (B = 1); states then have N rows.
        form: forces one form (`native`, `recurrent`, `chunked`, `definition`).

    Returns:
        o [B, T, H, V] in the dtype of v, and S [B, H, K, V] in float32 (float64 for float64 inputs) or None.

    Raises:
        ShapeError, DtypeError, RangeError: for an argument that does not fit, with what to do.
        NoUsableForm: when `form` cannot run here.

    Source: Yang et al. 2024 (DeltaNet), eq. 5-11; Yang et al. 2024 (Gated DeltaNet), eq. 10; Kimi Team 2025
    (KDA), eq. 1; Siems et al. 2025 (DeltaProduct), eq. 3; Grazzi et al. 2024 for beta up to 2.
    """
    if not isinstance(steps, int) or steps < 1:
        raise RangeError(f"delta_rule: steps={steps!r}, wanted a whole number of at least 1.")
    tensors = {"q": q, "k": k, "v": v, "beta": beta, "g": g}
    sizes = check_tensors("delta_rule", AXES, tensors, steps=steps)
    if sizes["H"] % sizes["G"]:
        raise ShapeError(
            f"delta_rule: `q` and `k` have {sizes['G']} heads, `v` has {sizes['H']}, wanted a divisor of the "
            "number of heads of `v`. Choose a number of key heads that divides it."
        )
    check_not_positive("delta_rule", "g", g)
    _check_beta(beta)
    texts = in_rows("delta_rule", cu_seqlens, q)
    bound = {"R": texts.num_texts, "H": sizes["H"], "K": sizes["K"], "V": sizes["V"]}
    check_tensors("delta_rule", AXES, {"initial_state": initial_state}, **bound)

    if compute := OPERATOR.fused(form, q, k, v, beta, g, initial_state):
        o, state = compute(
            *(q, k, v, beta, g, initial_state),
            steps=steps,
            scale=scale,
            qk_l2norm=qk_l2norm,
            cu_seqlens=cu_seqlens,
        )
        return o, state if output_final_state else None

    dtype = v.dtype
    q, k, v, beta, g, state = widen(q, k, v, beta, g, initial_state)
    if qk_l2norm:
        q, k = (x * (x.square().sum(-1, keepdim=True) + EPSILON).rsqrt() for x in (q, k))
    if sizes["G"] != sizes["H"]:
        q, k = (x.repeat_interleave(sizes["H"] // sizes["G"], dim=2) for x in (q, k))
    if state is None:
        state = v.new_zeros(texts.num_texts, sizes["H"], sizes["K"], sizes["V"])
    factor = sizes["K"] ** -0.5 if scale is None else scale
    o, state = texts.run(partial(OPERATOR.run, form), (q * factor, k, v, beta, g), state)
    return o.to(dtype), state if output_final_state else None


def _check_beta(beta: Tensor) -> None:
    if not beta.numel():
        return
    low, high = (float(end) for end in torch.aminmax(beta.detach()))
    if not (low >= -1e-5 and high <= 2 + 1e-5):  # a NaN is neither
        raise RangeError(
            f"delta_rule: `beta` runs from {low:.4g} to {high:.4g}, wanted [0, 2] (and no NaN). "
            "Pass beta.sigmoid(), or 2 * beta.sigmoid() for eigenvalues down to -1."
        )


def definition(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor | None, state: Tensor
) -> tuple[Tensor, Tensor]:
    """The recurrence, token by token and step by step; scale is already in q."""
    steps = k.shape[1] // q.shape[1]
    outputs = []
    for t in range(q.shape[1]):
        if g is not None:
            decay = g[:, t].exp()
            state = state * (decay[..., None] if decay.ndim == 3 else decay[..., None, None])
        for row in range(t * steps, (t + 1) * steps):
            key = k[:, row, :, :, None]
            held = (key * state).sum(-2)
            change = beta[:, row, :, None] * (v[:, row] - held)
            state = state + key * change[..., None, :]
        outputs.append((q[:, t, :, None, :] @ state).squeeze(-2))
    return torch.stack(outputs, dim=1), state


def chunked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    g: Tensor | None,
    state: Tensor,
    *,
    chunk: int = CHUNK,
) -> tuple[Tensor, Tensor]:
    """All rows of a chunk at once by a triangular solve, an affine recurrence between chunks.

    Row i writes k[i] u[i]^T, and u = beta (v - what the decayed state holds under k) reads earlier writes:
    (I + L) u = beta (v - (k exp(b)) S), L[i, j] = beta[i] sum_c k[i, c] k[j, c] exp(b[i, c] - b[j, c]) for
    i > j, b the running sum of g. One solve gives u = U - W S, hence S <- (D - R^T W) S + R^T U over the
    chunk with R = k exp(b[C] - b), D = exp(b[C]). No factor exceeds 1 (the WY form of DeltaNet, section 3).
    """
    length, steps = q.shape[1], k.shape[1] // q.shape[1]
    tokens = max(1, chunk >> (steps - 1).bit_length())  # a power of two, which halves well
    tokens = min(tokens, length)
    q = into_chunks(q, tokens)
    k, v, beta = (into_chunks(x, tokens * steps) for x in (k, v, beta))
    beta = beta.unsqueeze(-1)
    keys = k  # as read at the start of the chunk: decayed since then
    if g is None:
        among_keys = k @ k.transpose(-1, -2)
        scores = _reads(q, k, steps)
        decay = torch.ones_like(k[..., :1, :])
    else:
        g = into_chunks(g, tokens)
        if g.ndim == q.ndim:
            total = running_total(g, -2)
            by_row = total.repeat_interleave(steps, -2)
            among_keys = decayed_scores(k, k, by_row)
            readers = q.repeat_interleave(steps, -2)
            scores = decayed_scores(readers, k, by_row)[..., steps - 1 :: steps, :]
        else:
            total = running_total(g, -1).unsqueeze(-1)
            by_row = total.repeat_interleave(steps, -2)
            weight = decay_matrix(_first_rows(g, steps))
            among_keys = (k @ k.transpose(-1, -2)) * weight
            scores = (q @ k.transpose(-1, -2)) * weight[..., steps - 1 :: steps, :]
        last = total[..., -1:, :]
        q = q * total.to(q.dtype).exp()
        keys = k * by_row.to(k.dtype).exp()
        k = k * (last - by_row).to(k.dtype).exp()
        decay = last.to(k.dtype).exp().expand_as(k[..., :1, :])
    lower = (beta * among_keys).tril(-1)
    solved = torch.linalg.solve_triangular(
        lower, beta * torch.cat([v, keys], dim=-1), upper=False, unitriangular=True
    )
    values, erased = solved.split([v.shape[-1], k.shape[-1]], dim=-1)
    moved = k.transpose(-1, -2) @ solved  # [B, H, M, K, V + K]
    written, forgotten = moved.split([v.shape[-1], k.shape[-1]], dim=-1)
    transition = torch.diag_embed(decay.squeeze(-2)) - forgotten
    before = []
    for move, write in zip(transition.unbind(2), written.unbind(2), strict=True):
        before.append(state)
        state = write + move @ state
    starts = torch.stack(before, dim=2)
    o = scores @ (values - erased @ starts) + q @ starts
    return from_chunks(o, length), state


def _reads(q: Tensor, k: Tensor, steps: int) -> Tensor:
    """q k^T where token i has seen the rows before (i + 1) * steps."""
    row = torch.arange(k.shape[-2], device=k.device)
    token = torch.arange(q.shape[-2], device=k.device).unsqueeze(-1)
    return (q @ k.transpose(-1, -2)).masked_fill(row >= (token + 1) * steps, 0.0)


def _first_rows(g: Tensor, steps: int) -> Tensor:
    """`[..., C]` per token to `[..., C * steps]` per row: a token decays the state before its first step."""
    return F.pad(g.unsqueeze(-1), [0, steps - 1]).flatten(-2)


def sample(case: Case, generator: Generator) -> dict[str, Any]:
    """Random inputs in the legal range, as arguments of `delta_rule`: keys of length 1."""

    def normal(*letters: str, times: int = 1) -> Tensor:
        sizes = [case[letter] for letter in letters]
        return torch.randn(sizes[0], sizes[1] * times, *sizes[2:], generator=generator)

    steps = case.get("steps", 1)
    grouped = "G" if case.get("G") else "H"
    inputs: dict[str, Any] = {
        "q": normal("B", "T", grouped, "K"),
        "k": normal("B", "T", grouped, "K", times=steps),
        "v": normal("B", "T", "H", "V", times=steps),
        "beta": normal("B", "T", "H", times=steps).sigmoid() * case.get("largest_beta", 1.0),
        "steps": steps,
    }
    if case.get("qk_l2norm"):
        inputs["qk_l2norm"] = True
    else:
        inputs["k"] = F.normalize(inputs["k"], dim=-1)
    if gate := case.get("gate"):
        letters = ("B", "T", "H", "K") if gate == "vector" else ("B", "T", "H")
        inputs["g"] = F.logsigmoid(normal(*letters) + case.get("bias", 1.0))
    inputs["initial_state"] = normal("B", "H", "K", "V")
    return inputs


def extreme(case: Case, generator: Generator) -> dict[str, Any]:
    """Decays from none to a complete reset, strengths 0, 1 and the largest, and one key again and again."""
    inputs = sample(case, generator)
    if inputs.get("g") is not None:
        levels = torch.tensor([0.0, -1e-6, -0.7, -1.0, -30.3, -1e4, -torch.inf])
        inputs["g"] = levels[torch.randint(len(levels), inputs["g"].shape, generator=generator)]
    levels = torch.tensor([0.0, 1.0, case.get("largest_beta", 1.0)])
    inputs["beta"] = levels[torch.randint(len(levels), inputs["beta"].shape, generator=generator)]
    inputs["k"] = inputs["k"][:, :1].expand_as(inputs["k"]).clone()
    return inputs


def cost(case: Case) -> Cost:
    """Of the chunked form: scores among rows, the solve, moving and reading the state, per chunk."""
    B, T, H, K, V = (case[letter] for letter in "BTHKV")
    rows = T * case.get("steps", 1)
    C = min(CHUNK, rows)
    chunks = -(-rows // C)
    solve = rows * (2 * C * K + C * (K + V) + 2 * K * (K + V)) + chunks * 2 * K * K * V
    read = T * (2 * C * K + 2 * C * V + 2 * K * V) + rows * 2 * K * V
    moved = rows * (4 * K + 4 * V) + T * (K + V) + chunks * (2 * K * V + 2 * K * K)
    return Cost(
        flops=B * H * (solve + read), bytes=4 * B * H * moved, state_bytes=4 * B * H * K * V
    )


SIZES = {"B": 2, "T": 37, "H": 2, "K": 8, "V": 12}
TIMING = {"B": 1, "T": 2048, "H": 4, "K": 64, "V": 64}

OPERATOR = Operator(
    function=delta_rule,
    equation=r"S \leftarrow e^{g_t} S,\quad S \leftarrow S + \beta k (v - S^\top k)^\top \text{ per step},"
    r"\quad o_t = \mathrm{scale}\; S^\top q_t",
    source="Yang et al. 2024 (arXiv:2406.06484, arXiv:2412.06464); Kimi Team 2025 (arXiv:2510.26692); "
    "Siems et al. 2025 (arXiv:2502.10297)",
    axes=AXES,
    definition=definition,
    forms={
        "native": Form(native.delta_rule, missing, fused=True),
        "recurrent": Form(definition, longer_than(SHORT)),
        "chunked": Form(chunked),
    },
    sample=sample,
    extreme=extreme,
    cases=[
        Case("plain", SIZES),
        Case("negative_eigenvalues", SIZES, {"largest_beta": 2.0, "qk_l2norm": True}),
        Case("scalar_gate", SIZES, {"gate": "scalar"}),
        Case("vector_gate", SIZES, {"gate": "vector"}),
        Case("strong_vector_gate", SIZES, {"gate": "vector", "bias": -4.0}),
        Case("two_steps", SIZES, {"gate": "scalar", "steps": 2, "largest_beta": 2.0}),
        Case("three_steps", {**SIZES, "T": 19}, {"gate": "vector", "steps": 3}),
        Case("two_plain_steps", SIZES, {"steps": 2}),
        Case("grouped", {**SIZES, "H": 6, "G": 2}, {"gate": "scalar", "qk_l2norm": True}),
        Case("grouped_vector_gate", {**SIZES, "H": 4, "G": 1}, {"gate": "vector", "steps": 2}),
    ],
    timing=[
        Case("plain", TIMING),
        Case("scalar_gate", TIMING, {"gate": "scalar"}),
        Case("vector_gate", TIMING, {"gate": "vector"}),
        Case("two_steps", TIMING, {"gate": "scalar", "steps": 2}),
    ],
    cost=cost,
    value="v",
    chunk=CHUNK,
)
