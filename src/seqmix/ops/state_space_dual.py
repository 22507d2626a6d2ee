"""State space dual (Mamba-2): a selective state space with one decay per head, computed as attention.

    h_t = exp(dt_t A) h_{t-1} + B_t (dt_t x_t)^T        y_t = h_t^T C_t + D x_t

This is linear attention with q = C, k = B, v = dt x and the scalar log decay dt A. Neighbouring heads form
G groups, each of which shares its B and C. With negative eigenvalues the transition is 2 exp(dt_t A) - 1,
from -1 to 1, so that a state can flip.
Axes: B batch, T time, H heads, G groups of R heads, N key width, P value width; M chunks, C places in a chunk.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from seqmix.core.cost import Cost
from seqmix.core.errors import ShapeError
from seqmix.core.numerics import widen
from seqmix.core.tree import Tree
from seqmix.kernels import missing
from seqmix.kernels import state_space_dual as native
from seqmix.ops._arguments import check_tensors
from seqmix.ops._branches import read_branches, signs
from seqmix.ops._chunks import decay_matrix, from_chunks, into_chunks, running_total
from seqmix.ops._operator import Case, Form, Operator, longer_than
from seqmix.ops._packing import in_rows
from seqmix.ops._step_size import check_decay_rate, step_size

CHUNK = 32
SHORT = 4  # up to here the loop over tokens beats a chunk
AXES = {
    "x": "B T H P",
    "dt": "B T H",
    "A": "H",
    "B": "B T G N",
    "C": "B T G N",
    "D": "H",
    "dt_bias": "H",
    "initial_state": "R H N P",
}


def state_space_dual(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    *,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    negative_eigenvalues: bool = False,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    form: str | None = None,
) -> tuple[Tensor, Tensor | None]:
    """h_t = exp(dt_t A) h_{t-1} + B_t (dt_t x_t)^T, y_t = h_t^T C_t + D x_t.

    Args:
        x: inputs, [B, T, H, P].
        dt: step sizes, [B, T, H]; with `dt_bias` added and after the softplus, if any, at least 0.
        A: decay rate of each head, [H], finite and at most 0.
        B, C: input and output maps, [B, T, G, N] with H a multiple of G; head h reads group h // (H / G).
        D: weight of the input in the output, [H]; none by default.
        dt_bias: added to dt, [H].
        dt_softplus: whether dt passes through log(1 + exp(.)), after the bias.
        negative_eigenvalues: whether h_{t-1} is multiplied by 2 exp(dt_t A) - 1 instead.
        initial_state: h before the first token, [B, H, N, P]; zeros by default.
        output_final_state: whether to return h after the last token.
        cu_seqlens: boundaries [R+1] of R texts packed in one row (B = 1); states then have R rows.
        form: forces one form (`native`, `recurrent`, `chunked`, `definition`).

    Returns:
        y [B, T, H, P] in the dtype of x, and h [B, H, N, P] in float32 (float64 for float64 inputs) or None.

    Raises:
        ShapeError, DtypeError, RangeError: for an argument that does not fit, with what to do.
        NoUsableForm: when `form` cannot run here.

    Source: Dao & Gu 2024 (Mamba-2), sections 3, 5 and 6; Grazzi et al. 2024, section 4.3 (negative eigenvalues).
    """
    tensors = {"x": x, "dt": dt, "A": A, "B": B, "C": C, "D": D, "dt_bias": dt_bias}
    sizes = check_tensors("state_space_dual", AXES, tensors)
    if sizes["G"] == 0 or sizes["H"] % sizes["G"]:
        raise ShapeError(
            f"state_space_dual: `B` and `C` have {sizes['G']} groups, `x` has {sizes['H']} heads, wanted a "
            "divisor of the number of heads. Choose a number of groups that divides it."
        )
    check_decay_rate("state_space_dual", "A", A)
    texts = in_rows("state_space_dual", cu_seqlens, x)
    bound = {"R": texts.num_texts, "H": sizes["H"], "N": sizes["N"], "P": sizes["P"]}
    check_tensors("state_space_dual", AXES, {"initial_state": initial_state}, **bound)

    if fused := OPERATOR.fused(form, x, dt, A, B, C, D, dt_bias, initial_state):
        if not dt_softplus:
            bias = None if dt_bias is None else dt_bias.float()
            dt = step_size("state_space_dual", "dt", dt.float(), bias, softplus=False)
            dt_bias = None
        y, state = fused(
            *(x, dt, A, B, C, D, dt_bias, initial_state),
            softplus=dt_softplus,
            negative_eigenvalues=negative_eigenvalues,
            cu_seqlens=cu_seqlens,
        )
        return y, state if output_final_state else None

    dtype = x.dtype
    x, dt, A, B, C, D, dt_bias, state = widen(x, dt, A, B, C, D, dt_bias, initial_state)
    dt = step_size("state_space_dual", "dt", dt, dt_bias, softplus=dt_softplus)
    if state is None:
        state = x.new_zeros(texts.num_texts, sizes["H"], sizes["N"], sizes["P"])

    def compute(x: Tensor, dt: Tensor, B: Tensor, C: Tensor, state: Tensor) -> Any:
        return OPERATOR.run(form, x, dt, A, B, C, state, negative=negative_eigenvalues)

    # After the softplus, so that padding has a step of 0 and leaves the state alone.
    y, state = texts.run(compute, (x, dt, B, C), state)
    if D is not None:
        y = y + D[:, None] * x
    return y.to(dtype), state if output_final_state else None


def state_space_dual_on_tree(
    tree: Tree,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    *,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    negative_eigenvalues: bool = False,
    initial_state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`state_space_dual` where the last tokens are the nodes of a tree; the state is the one before them.

    Arguments have the shapes there with T = n + len(tree), n of at least 1; y [B, T, H, P].
    """
    parts = (part.tensor_split([x.shape[1] - len(tree)], dim=1) for part in (x, dt, B, C))
    (x, nodes), (dt, step), (B, k), (C, q) = parts
    options: dict[str, Any] = {"dt_bias": dt_bias, "dt_softplus": dt_softplus}
    options |= {"negative_eigenvalues": negative_eigenvalues, "initial_state": initial_state}
    y, state = state_space_dual(x, dt, A, B, C, D, **options, output_final_state=True)
    assert state is not None
    nodes, step, A, k, q, D, dt_bias, wide = widen(nodes, step, A, k, q, D, dt_bias, state)
    step = step_size("state_space_dual", "dt", step, dt_bias, softplus=dt_softplus)
    k, q = (maps.repeat_interleave(nodes.shape[2] // maps.shape[2], dim=2) for maps in (k, q))
    v, log_decay = step.unsqueeze(-1) * nodes, step * A
    if negative_eigenvalues:
        log_decay, transition = _log_size(log_decay)
        sign = signs(tree, transition).unsqueeze(-1)
        branches = sign * read_branches(tree, q, k, sign * v, log_decay, wide)
    else:
        branches = read_branches(tree, q, k, v, log_decay, wide)
    if D is not None:
        branches = branches + D[:, None] * nodes
    return torch.cat([y, branches.to(y.dtype)], dim=1), state


def definition(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    state: Tensor,
    *,
    negative: bool = False,
) -> tuple[Tensor, Tensor]:
    """The recurrence, token by token."""
    B, C = (maps.repeat_interleave(x.shape[2] // maps.shape[2], dim=2) for maps in (B, C))
    outputs = []
    for x_t, dt_t, B_t, C_t in zip(*(tensor.unbind(1) for tensor in (x, dt, B, C)), strict=True):
        decay = (dt_t * A).exp()
        if negative:
            decay = 2 * decay - 1
        written = B_t[..., None] * (dt_t[..., None] * x_t)[..., None, :]
        state = decay[..., None, None] * state + written
        outputs.append((C_t[..., None, :] @ state).squeeze(-2))
    return torch.stack(outputs, dim=1), state


def chunked(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    state: Tensor,
    *,
    negative: bool = False,
) -> tuple[Tensor, Tensor]:
    """Attention inside chunks, the recurrence between them, in log space.

    A transition d_t of either sign is |d_t| with the running product of signs s_t pulled out: s_t h_t follows
    |d_t| and is written s_t x_t, exactly, since s_t s_t = 1. Its logarithm is taken of 2 exp(dt A) - 1 with the
    cancellation at dt A = 0 avoided.
    """
    values, log_decay = dt.unsqueeze(-1) * x, dt * A
    if not negative:
        return _attend(values, log_decay, B, C, state)
    size, transition = _log_size(log_decay)
    sign = torch.where(transition < 0, -1.0, 1.0).to(x.dtype).cumprod(1).unsqueeze(-1)
    y, state = _attend(sign * values, size, B, C, state)
    return sign * y, state * sign[:, -1].unsqueeze(-1)


def _log_size(log_decay: Tensor) -> tuple[Tensor, Tensor]:
    """log |d| and d = 2 exp(log_decay) - 1."""
    transition = 1 + 2 * torch.expm1(log_decay)
    return transition.abs().clamp_min(torch.finfo(transition.dtype).tiny).log(), transition


def _attend(
    values: Tensor, log_decay: Tensor, B: Tensor, C: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """h_t = exp(a_t) h_{t-1} + B_t v_t^T and y_t = h_t^T C_t (Mamba-2, section 6), with b the running sum of a:

    y[i] = sum_j (C[i] . B[j]) exp(b[i] - b[j]) v[j] + exp(b[i]) h^T C[i] inside a chunk, j <= i, and between
    chunks h <- exp(b[C]) h + sum_j exp(b[C] - b[j]) B[j] v[j]^T.

    This is the chunked form of linear attention, but the heads of a group share keys and queries: C[i] . B[j]
    is computed once for all, and their values are columns of one product with B or C, which is never repeated.
    """
    length, groups = values.shape[1], B.shape[2]
    chunk = min(CHUNK, length)
    log_decay = into_chunks(log_decay, chunk)  # [B, H, M, C]
    values = into_chunks(values.unflatten(2, (groups, -1)), chunk)  # [B, G, M, C, R, P]
    keys, queries = into_chunks(B, chunk), into_chunks(C, chunk)  # [B, G, M, C, N]
    heads = values.shape[-2]

    def decays(log: Tensor) -> Tensor:
        """[B, H, M, places] as factors of the values, [B, G, M, places, R, 1]."""
        factor: Tensor = log.to(values.dtype).exp().unflatten(1, (groups, heads))
        return factor.movedim(2, -1).unsqueeze(-1)

    total = running_total(log_decay, -1)
    last = total[..., -1:]
    shared = (queries @ keys.transpose(-1, -2)).unsqueeze(2)
    scores = shared * decay_matrix(log_decay).unflatten(1, (groups, heads))
    inside = (scores @ values.movedim(-2, 2)).movedim(2, -2)

    written = keys.transpose(-1, -2) @ (values * decays(last - total)).flatten(-2)
    state = state.unflatten(1, (groups, heads)).movedim(2, 3)  # [B, G, N, R, P]
    before = []
    for added, decay in zip(
        written.unflatten(-1, (heads, -1)).unbind(2), decays(last).unbind(2), strict=True
    ):
        before.append(state)
        state = torch.addcmul(added, decay, state)
    read = (queries @ torch.stack(before, dim=2).flatten(-2)).unflatten(-1, (heads, -1))
    y = torch.addcmul(inside, decays(total), read)
    return from_chunks(y, length).flatten(2, 3), state.movedim(3, 2).flatten(1, 2)


def sample(case: Case, generator: Generator) -> dict[str, Any]:
    """Random inputs in the legal range, as arguments of `state_space_dual`."""

    def normal(*letters: str) -> Tensor:
        return torch.randn(*(case[letter] for letter in letters), generator=generator)

    inputs: dict[str, Any] = {"x": normal("B", "T", "H", "P")}
    if case.get("softplus"):
        inputs |= {"dt": normal("B", "T", "H"), "dt_bias": normal("H") - 1.0, "dt_softplus": True}
    else:
        inputs["dt"] = F.softplus(normal("B", "T", "H") + case.get("bias", -1.0))
    if case.get("negative"):
        inputs["negative_eigenvalues"] = True
    inputs["A"] = -normal("H").exp()
    inputs |= {name: normal("B", "T", "G", "N") for name in ("B", "C")}
    if case.get("skip"):
        inputs["D"] = normal("H")
    return inputs | {"initial_state": normal("B", "H", "N", "P")}


def extreme(case: Case, generator: Generator) -> dict[str, Any]:
    """Steps and rates from nothing to a complete reset, side by side."""
    inputs = sample(case, generator)
    steps = torch.tensor([0.0, 1e-6, 1.0, 30.0, 1e3])
    if case.get("softplus"):
        steps = torch.tensor([-1e4, -20.0, 0.0, 30.0, 1e3])
    rates = torch.tensor([0.0, -1e-6, -1.0, -1e4])
    for name, levels in (("dt", steps), ("A", rates)):
        inputs[name] = levels[torch.randint(len(levels), inputs[name].shape, generator=generator)]
    return inputs


def cost(case: Case) -> Cost:
    """Of the chunked form: scores per group; their product with x, writing and reading the state per head."""
    B, T, H, G, N, P = (case[letter] for letter in "BTHGNP")
    C = min(CHUNK, T)
    flops = B * T * (2 * G * C * N + H * (2 * C * P + 4 * N * P))
    moved = 4 * B * (T * (2 * H * P + 2 * G * N + H) + -(-T // C) * 2 * H * N * P)
    return Cost(flops=flops, bytes=moved, state_bytes=4 * B * H * N * P)


SIZES = {"B": 2, "T": 37, "H": 4, "G": 1, "N": 8, "P": 6}
TIMING = {"B": 1, "T": 2048, "H": 8, "G": 1, "N": 64, "P": 64}

OPERATOR = Operator(
    function=state_space_dual,
    equation=(
        r"h_t = e^{\Delta_t A} h_{t-1} + B_t (\Delta_t x_t)^\top,\quad y_t = h_t^\top C_t + D x_t"
    ),
    source="Dao & Gu 2024 (arXiv:2405.21060); Grazzi et al. 2024 (arXiv:2411.12537)",
    axes=AXES,
    definition=definition,
    forms={
        "native": Form(native.state_space_dual, missing, fused=True),
        "recurrent": Form(definition, longer_than(SHORT)),
        "chunked": Form(chunked),
    },
    sample=sample,
    extreme=extreme,
    cases=[
        Case("one_group", SIZES),
        Case("two_groups", {**SIZES, "G": 2}, {"skip": True}),
        Case("own_group", {**SIZES, "G": 4}, {"softplus": True, "skip": True}),
        Case("strong_decay", SIZES, {"bias": 4.0}),
        Case("weak_decay", {**SIZES, "T": 150}, {"bias": -7.0}),
        Case("negative_eigenvalues", {**SIZES, "T": 150}, {"bias": 1.0, "negative": True}),
    ],
    timing=[
        Case("one_group", TIMING),
        Case("four_groups", {**TIMING, "G": 4}, {"softplus": True, "skip": True}),
    ],
    cost=cost,
    value="x",
    chunk=CHUNK,
)
