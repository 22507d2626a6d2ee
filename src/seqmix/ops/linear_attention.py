"""Linear attention: a matrix that every token decays, writes to and reads from.

    S_t = exp(g_t) S_{t-1} + k_t v_t^T        o_t = scale * S_t^T q_t

g_t is absent (linear attention), one number per head (retention, simple gated linear attention) or one per
key dimension (gated linear attention, HGRN-2).
Axes: B batch, T time, H heads, K key width, V value width; M chunks, C places in a chunk.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Generator, Tensor

from seqmix.core.cost import Cost
from seqmix.core.numerics import widen
from seqmix.core.tree import Tree
from seqmix.kernels import linear_attention as native
from seqmix.kernels import missing
from seqmix.ops._arguments import check_not_positive, check_tensors
from seqmix.ops._branches import read_branches
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
SHORT = 4  # up to here the loop over tokens beats a chunk
AXES: dict[str, str | tuple[str, ...]] = {
    "q": "B T H K",
    "k": "B T H K",
    "v": "B T H V",
    "g": ("B T H", "B T H K"),
    "initial_state": "R H K V",
}
EPSILON = 1e-10  # keeps an empty normaliser from dividing by zero


def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None = None,
    *,
    scale: float | None = None,
    normalize: bool = False,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    form: str | None = None,
) -> tuple[Tensor, Tensor | None]:
    """S_t = exp(g_t) S_{t-1} + k_t v_t^T, o_t = scale * S_t^T q_t.

    With `normalize`, z_t = exp(g_t) z_{t-1} + k_t is kept beside S and o_t = S_t^T q_t / (z_t . q_t); the
    state then has one more column, V + 1, the last of which is z.

    Args:
        q, k: queries and keys, [B, T, H, K].
        v: values, [B, T, H, V].
        g: log decays of at most 0, [B, T, H] or [B, T, H, K]; None for no decay.
        scale: factor on the output, K**-0.5 by default; cancels out with `normalize`.
        initial_state: S before the first token, [B, H, K, V]; zeros by default.
        output_final_state: whether to return S after the last token.
        cu_seqlens: boundaries [N+1] of N texts packed in one row (B = 1); states then have N rows.
        form: forces one form (`native`, `recurrent`, `chunked`, `parallel`, `definition`).

    Returns:
        o [B, T, H, V] in the dtype of v, and S [B, H, K, V] in float32 (float64 for float64 inputs) or None.

    Raises:
        ShapeError, DtypeError, RangeError: for an argument that does not fit, with what to do.
        NoUsableForm: when `form` cannot run here.

    Source: Katharopoulos et al. 2020, eq. 16-20; Yang et al. 2023 (GLA), eq. 3.
    """
    tensors = {"q": q, "k": k, "v": v, "g": g}
    sizes = check_tensors("linear_attention", AXES, tensors)
    check_not_positive("linear_attention", "g", g)
    texts = in_rows("linear_attention", cu_seqlens, q)
    columns = sizes["V"] + normalize
    bound = {"R": texts.num_texts, "H": sizes["H"], "K": sizes["K"], "V": columns}
    check_tensors("linear_attention", AXES, {"initial_state": initial_state}, **bound)

    inputs, options = (q, k, v, g, initial_state), {"scale": scale, "normalize": normalize}
    if compute := OPERATOR.fused(form, *inputs):
        o, state = compute(*inputs, **options, cu_seqlens=cu_seqlens)
        return o, state if output_final_state else None

    dtype = v.dtype
    q, k, v, g, state = widen(q, k, v, g, initial_state)
    if normalize:
        v = torch.cat([v, torch.ones_like(v[..., :1])], dim=-1)
    if state is None:
        state = v.new_zeros(texts.num_texts, sizes["H"], sizes["K"], columns)
    factor = sizes["K"] ** -0.5 if scale is None else scale
    q = q if normalize else q * factor
    o, state = texts.run(partial(OPERATOR.run, form), (q, k, v, g), state)
    if normalize:
        o = o[..., :-1] / (o[..., -1:] + EPSILON)
    return o.to(dtype), state if output_final_state else None


def linear_attention_on_tree(
    tree: Tree,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None = None,
    *,
    scale: float | None = None,
    normalize: bool = False,
    initial_state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`linear_attention` where the last tokens are the nodes of a tree; the state is the one before them.

    Arguments have the shapes there with T = n + len(tree), n of at least 1; o [B, T, H, V].
    """
    parts = [
        (None, None) if x is None else x.tensor_split([x.shape[1] - len(tree)], dim=1)
        for x in (q, k, v, g)
    ]
    trunk, nodes = zip(*parts, strict=True)
    options: dict[str, Any] = {"scale": scale, "normalize": normalize}
    options["initial_state"] = initial_state
    o, state = linear_attention(*trunk, **options, output_final_state=True)
    assert state is not None
    q, k, v, g, wide = widen(*nodes, state)
    if normalize:
        v = torch.cat([v, torch.ones_like(v[..., :1])], dim=-1)
    else:
        q = q * (q.shape[-1] ** -0.5 if scale is None else scale)
    branches = read_branches(tree, q, k, v, g, wide)
    if normalize:
        branches = branches[..., :-1] / (branches[..., -1:] + EPSILON)
    return torch.cat([o, branches.to(o.dtype)], dim=1), state


def definition(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, state: Tensor
) -> tuple[Tensor, Tensor]:
    """The recurrence, token by token; scale is already in q."""
    outputs = []
    for t in range(q.shape[1]):
        if g is not None:
            decay = g[:, t].exp()
            state = state * (decay[..., None] if decay.ndim == 3 else decay[..., None, None])
        state = state + k[:, t, :, :, None] * v[:, t, :, None, :]
        outputs.append((q[:, t, :, None, :] @ state).squeeze(-2))
    return torch.stack(outputs, dim=1), state


def chunked(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, state: Tensor, *, chunk: int = CHUNK
) -> tuple[Tensor, Tensor]:
    """Attention inside chunks, the recurrence between them (GLA, section 4).

    Inside: A[i, j] = sum_c q[i, c] k[j, c] exp(b[i, c] - b[j, c]) for i >= j, b the running sum of g.
    Between: S <- exp(b[C]) S + sum_j (k[j] exp(b[C] - b[j])) v[j]^T. No factor exceeds 1.
    """
    length = q.shape[1]
    chunk = min(chunk, length)
    q, k, v = (into_chunks(x, chunk) for x in (q, k, v))
    if g is None:
        scores = (q @ k.transpose(-1, -2)).tril()
        decay = None
    else:
        g = into_chunks(g, chunk)
        if g.ndim == q.ndim:
            total = running_total(g, -2)
            scores = decayed_scores(q, k, total)
        else:
            total = running_total(g, -1).unsqueeze(-1)
            scores = (q @ k.transpose(-1, -2)) * decay_matrix(g)
        last = total[..., -1:, :]
        q = q * total.to(q.dtype).exp()
        k = k * (last - total).to(q.dtype).exp()
        decay = last.to(q.dtype).transpose(-1, -2).exp()  # [B, H, M, K or 1, 1]
    written = k.transpose(-1, -2) @ v  # [B, H, M, K, V]: what each chunk adds
    decays = [None] * q.shape[2] if decay is None else decay.unbind(2)
    before = []
    for write, fade in zip(
        written.unbind(2), decays, strict=True
    ):  # unbind: one node in the backward
        before.append(state)
        state = write + (state if fade is None else state * fade)
    o = scores @ v + q @ torch.stack(before, dim=2)
    return from_chunks(o, length), state


def parallel(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, state: Tensor
) -> tuple[Tensor, Tensor]:
    """One chunk of the whole length: the masked T x T matrix, all at once."""
    return chunked(q, k, v, g, state, chunk=-(-q.shape[1] // 64) * 64)


def sample(case: Case, generator: Generator) -> dict[str, Any]:
    """Random inputs in the legal range, as arguments of `linear_attention`."""

    def normal(*letters: str) -> Tensor:
        return torch.randn(*(case[letter] for letter in letters), generator=generator)

    columns = case["V"] + bool(case.get("normalize"))
    inputs: dict[str, Any] = {"q": normal("B", "T", "H", "K"), "k": normal("B", "T", "H", "K")}
    if case.get("normalize"):
        inputs = {name: x.abs() for name, x in inputs.items()} | {"normalize": True}
    inputs["v"] = normal("B", "T", "H", "V")
    if gate := case.get("gate"):
        letters = ("B", "T", "H", "K") if gate == "vector" else ("B", "T", "H")
        inputs["g"] = torch.nn.functional.logsigmoid(normal(*letters) + case.get("bias", 1.0))
    state = torch.randn(case["B"], case["H"], case["K"], columns, generator=generator)
    inputs["initial_state"] = state.abs() if case.get("normalize") else state
    return inputs


def extreme(case: Case, generator: Generator) -> dict[str, Any]:
    """Decays from none to a complete reset, side by side."""
    inputs = sample(case, generator)
    if inputs.get("g") is not None:
        levels = torch.tensor([0.0, -1e-6, -1.0, -30.0, -1e4, -torch.inf])
        pick = torch.randint(len(levels), inputs["g"].shape, generator=generator)
        inputs["g"] = levels[pick]
    return inputs


def cost(case: Case) -> Cost:
    """Of the chunked form: scores, their product with v, writing and reading the state, per chunk."""
    B, T, H, K, V = (case[letter] for letter in "BTHKV")
    V += bool(case.get("normalize"))
    C = min(CHUNK, T)
    flops = B * H * T * (2 * C * K + 2 * C * V + 4 * K * V)
    moved = 4 * B * H * (T * (2 * K + 2 * V) + -(-T // C) * 2 * K * V)
    return Cost(flops=flops, bytes=moved, state_bytes=4 * B * H * K * V)


SIZES = {"B": 2, "T": 37, "H": 2, "K": 8, "V": 12}
TIMING = {"B": 1, "T": 2048, "H": 4, "K": 64, "V": 64}

OPERATOR = Operator(
    function=linear_attention,
    equation=r"S_t = e^{g_t} S_{t-1} + k_t v_t^\top,\quad o_t = \mathrm{scale}\; S_t^\top q_t",
    source="Katharopoulos et al. 2020 (arXiv:2006.16236); Yang et al. 2023 (arXiv:2312.06635)",
    axes=AXES,
    definition=definition,
    forms={
        "native": Form(native.linear_attention, missing, fused=True),
        "recurrent": Form(definition, longer_than(SHORT)),
        "chunked": Form(chunked),
        "parallel": Form(parallel),
    },
    sample=sample,
    extreme=extreme,
    cases=[
        Case("no_decay", SIZES),
        Case("scalar_decay", SIZES, {"gate": "scalar"}),
        Case("vector_decay", SIZES, {"gate": "vector"}),
        Case("strong_decay", SIZES, {"gate": "vector", "bias": -4.0}),
        Case("weak_decay", {**SIZES, "T": 150}, {"gate": "scalar", "bias": 9.0}),
        Case("long_vector_decay", {**SIZES, "T": 150}, {"gate": "vector", "bias": -1.0}),
        Case("normalized", SIZES, {"gate": "scalar", "normalize": True}),
    ],
    timing=[
        Case("no_decay", TIMING),
        Case("scalar_decay", TIMING, {"gate": "scalar"}),
        Case("vector_decay", TIMING, {"gate": "vector"}),
    ],
    cost=cost,
    value="v",
    chunk=CHUNK,
)
