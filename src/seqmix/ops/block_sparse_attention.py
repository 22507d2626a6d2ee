"""Block-sparse attention: each block of queries reads only the blocks of keys that were chosen for it.

    o_t = sum_j p_tj v_j        p_t = softmax of scale * q_t . k_j over the keys j <= t of the chosen blocks

and XAttention's way to choose them: the sums along the antidiagonals of every stride-th key and query tell how
much attention a block receives, and the fewest blocks that hold a share of it are taken.
Axes: B batch, T queries, S keys, H query heads, G key heads (query head h reads key head h // (H // G)),
K key width, V value width; M blocks of queries, N blocks of keys, C places in a block.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from seqmix.core.cost import Cost
from seqmix.core.errors import DtypeError, RangeError, ShapeError
from seqmix.core.numerics import widen
from seqmix.kernels import block_sparse_attention as native
from seqmix.kernels import missing
from seqmix.ops import _attention_forms as dense
from seqmix.ops._arguments import check_tensors
from seqmix.ops._operator import Case, Form, Operator

BLOCK = 128
STRIDE = 16
SCORES_AT_ONCE = 2**22  # entries of antidiagonal scores that exist at once
AXES: dict[str, str | tuple[str, ...]] = {"q": "B T H K", "k": "B S G K", "v": "B S G V"}


def block_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    blocks: Tensor,
    *,
    block: int = BLOCK,
    causal: bool = True,
    scale: float | None = None,
    form: str | None = None,
) -> Tensor:
    """o_t = sum_j softmax_j(scale * q_t . k_j) v_j over the keys of the blocks that the block of t reads.

    Args:
        q: queries, [B, T, H, K].
        k, v: keys [B, S, G, K] and values [B, S, G, V]; H is a multiple of G, and query head h reads key
            head h // (H // G). Queries are aligned to the end of the keys: query t is at position t + S - T.
        blocks: bool [B, H, M, N] or [H, M, N]: whether queries m * block ... (m + 1) * block - 1 read the keys
            n * block ... (n + 1) * block - 1; M = ceil(T / block) and N = ceil(S / block).
        block: queries, and keys, of a block.
        causal: whether a position also sees no key after it; needs S >= T. A query that sees nothing gives 0.
        scale: factor on q . k, K**-0.5 by default.
        form: forces one form (`native`, `gathered`, `definition`).

    Returns:
        o [B, T, H, V] in the dtype of v.

    Raises:
        ShapeError, DtypeError, RangeError: for an argument that does not fit, with what to do.
        NoUsableForm: when `form` cannot run here.

    Source: Child et al. 2019 (arXiv:1904.10509); Xu et al. 2025 (arXiv:2503.16428), section 2.
    """
    sizes = check_tensors("block_sparse_attention", AXES, {"q": q, "k": k, "v": v})
    _check(sizes, blocks, block, causal)
    blocks = blocks.expand(sizes["B"], -1, -1, -1)
    scale = sizes["K"] ** -0.5 if scale is None else scale
    if compute := OPERATOR.fused(form, q, k, v, blocks, block, causal, scale):
        fused: Tensor = compute(q, k, v, blocks, block, causal, scale)
        return fused
    dtype = v.dtype
    q, k, v = widen(q, k, v)
    o: Tensor = OPERATOR.run(form, q, k, v, blocks, block, causal, scale)
    return o.to(dtype)


def antidiagonal_mass(
    q: Tensor,
    k: Tensor,
    *,
    block: int = BLOCK,
    stride: int = STRIDE,
    causal: bool = True,
    scale: float | None = None,
) -> Tensor:
    """The share of its attention that each block of queries gives to each block of keys, estimated, [B, H, M, N].

    In every square of `stride` x `stride` scores only the antidiagonal is summed: one score of each query and of
    each key. A softmax over all squares of a row turns the sums into shares, which are averaged over the
    rows of a block. Takes `stride` times less work than the scores. Arguments as in `block_sparse_attention`;
    `block` is a multiple of `stride`, and T differs from S by whole blocks. float32, rows sum to 1.

    Source: Xu et al. 2025 (arXiv:2503.16428), section 2.1.
    """
    sizes = check_tensors("antidiagonal_mass", AXES, {"q": q, "k": k})
    B, T, S, H, G, K = (sizes[letter] for letter in "BTSHGK")
    _check_heads("antidiagonal_mass", H, G)
    if stride < 1 or block % stride:
        raise RangeError(
            f"antidiagonal_mass: `stride` is {stride}, wanted a divisor of block={block}."
        )
    if causal and (S < T or (S - T) % block):
        raise ShapeError(
            f"antidiagonal_mass: `k` has {S} positions and `q` {T}, wanted a difference of whole blocks of "
            f"{block}. Pass the queries from the beginning of a block."
        )
    factor = (K**-0.5 if scale is None else scale) / stride
    squares, steps = -(-S // stride), block // stride
    rows, columns = -(-T // block), -(-S // block)
    shift = (S - T) // stride  # squares before the first query
    keys = F.pad(k.float(), (0, 0, 0, 0, 0, columns * block - S))
    keys = (
        keys.unflatten(1, (-1, stride)).permute(0, 3, 2, 4, 1).flatten(2, 3)
    )  # [B, G, stride K, squares]
    queries = F.pad(q.float() * factor, (0, 0, 0, 0, 0, rows * block - T))
    queries = queries.unflatten(1, (-1, stride)).flip(2)
    queries = queries.permute(0, 3, 1, 2, 4).flatten(3, 4)  # [B, H, squares, stride K]
    filled = -(-T // stride)  # squares that hold a query
    together = max(1, SCORES_AT_ONCE // (B * H * columns * steps * steps)) * steps
    parts = []
    for start in range(0, rows * steps, together):
        stop = min(start + together, rows * steps)
        wide = (
            min(columns * steps, -(-(stop + shift) // steps) * steps) if causal else columns * steps
        )
        part = queries[:, :, start:stop].unflatten(1, (G, -1)).flatten(2, 3)
        scores = (part @ keys[..., :wide]).unflatten(2, (H // G, -1)).flatten(1, 2)
        place = torch.arange(wide, device=q.device)
        hidden = place >= squares
        if causal:
            hidden = hidden | (place > torch.arange(start, stop, device=q.device)[:, None] + shift)
        share = scores.masked_fill_(hidden, -torch.inf).softmax(-1)
        share[:, :, max(filled - start, 0) :] = 0
        mass = share.unflatten(3, (-1, steps)).sum(-1).unflatten(2, (-1, steps)).sum(3)
        parts.append(F.pad(mass, (0, columns - mass.shape[-1])))
    mass = torch.cat(parts, dim=2)
    return mass / mass.sum(-1, keepdim=True)


def choose_blocks(mass: Tensor, share: float | Tensor, *, causal: bool = True) -> Tensor:
    """The fewest blocks of each row of `mass` [B, H, M, N] that hold at least `share` of it, bool.

    `share` is a number, or one per head [H]. With `causal` the first block and the block of the queries
    themselves are always among them and counted first, and later ones never.

    Source: Xu et al. 2025 (arXiv:2503.16428), section 2.2.
    """
    M, N = mass.shape[-2:]
    wanted = torch.as_tensor(share, dtype=mass.dtype, device=mass.device)
    wanted = wanted[..., None, None] if wanted.ndim else wanted
    if bool(((wanted < 0) | (wanted > 1)).any()):
        raise RangeError(f"choose_blocks: `share` is {share}, wanted numbers from 0 to 1.")
    order = mass
    kept = torch.zeros(M, N, dtype=torch.bool, device=mass.device)
    if causal:
        own = torch.arange(N - M, N, device=mass.device)[:, None]
        column = torch.arange(N, device=mass.device)
        kept = (column == own) | (column == 0)
        order = mass.masked_fill(kept, 2.0)
    order, index = order.sort(dim=-1, descending=True, stable=True)
    sorted_mass = mass.gather(-1, index)
    before = sorted_mass.cumsum(-1) - sorted_mass
    taken = before < wanted * mass.sum(-1, keepdim=True)
    blocks = torch.zeros_like(mass, dtype=torch.bool).scatter(-1, index, taken) | kept
    return blocks & (column <= own) if causal else blocks


def lower_shares(quality: Tensor, steps: int) -> Tensor:
    """How often the share of each head is lowered, so that `steps` lowerings in all cost least quality, [H].

    `quality` [H, A + 1] is what head h achieves after a lowerings, on any additive scale (the attention that
    it keeps, say). By dynamic programming over heads:

        D[h][m] = max_a D[h - 1][m - a] + quality[h][a]

    Source: Xu et al. 2025 (arXiv:2503.16428), section 2.3, which lowers shares to nine tenths at a time; where
    it compares one head at a time, this adds heads up.
    """
    heads, levels = quality.shape
    if not 0 <= steps <= heads * (levels - 1):
        raise RangeError(
            f"lower_shares: `steps` is {steps}, wanted 0 to {heads * (levels - 1)}, all that {heads} heads have."
        )
    best = torch.full((steps + 1,), -torch.inf, dtype=torch.float64)
    best[0] = 0.0
    chosen = []
    for row in quality.double().cpu():
        options = torch.full((levels, steps + 1), -torch.inf, dtype=torch.float64)
        for a in range(min(levels, steps + 1)):
            options[a, a:] = best[: steps + 1 - a] + row[a]
        best, lowered = options.max(0)
        chosen.append(lowered)
    left, result = steps, []
    for lowered in reversed(chosen):
        result.append(int(lowered[left]))
        left -= result[-1]
    return torch.tensor(result[::-1])


def _check_heads(operator: str, heads: int, groups: int) -> None:
    if heads % groups:
        raise ShapeError(
            f"{operator}: `k` has {groups} heads, wanted a divisor of the {heads} heads of `q`. "
            "Repeat or drop key heads."
        )


def _check(sizes: dict[str, int], blocks: Tensor, block: int, causal: bool) -> None:
    B, T, S, H, G = (sizes[letter] for letter in "BTSHG")
    _check_heads("block_sparse_attention", H, G)
    if causal and S < T:
        raise ShapeError(
            f"block_sparse_attention: `k` has {S} positions, wanted at least {T}, one per query. "
            "Pass the keys of the whole text, or causal=False."
        )
    if block < 1:
        raise RangeError(f"block_sparse_attention: `block` is {block}, wanted at least 1.")
    if not isinstance(blocks, Tensor) or blocks.dtype != torch.bool:
        raise DtypeError(
            "block_sparse_attention: `blocks` must be a tensor of bool, such as `choose_blocks` gives."
        )
    wanted = [H, -(-T // block), -(-S // block)]
    if list(blocks.shape) not in ([B, *wanted], [1, *wanted], wanted):
        raise ShapeError(
            f"block_sparse_attention: `blocks` has shape {list(blocks.shape)}, wanted [B, H, M, N] = "
            f"{[B, *wanted]} or [H, M, N] for blocks of {block}."
        )


def definition(
    q: Tensor, k: Tensor, v: Tensor, blocks: Tensor, block: int, causal: bool, scale: float
) -> Tensor:
    """Attention with every other score hidden."""
    seen = blocks.repeat_interleave(block, 2).repeat_interleave(block, 3)
    seen = seen[:, :, : q.shape[1], : k.shape[1]]
    bias = torch.zeros(seen.shape, dtype=q.dtype, device=q.device).masked_fill(~seen, -torch.inf)
    return dense.definition(q, k, v, bias, None, dense.Rule(causal, None, 0, scale))


def gathered(
    q: Tensor, k: Tensor, v: Tensor, blocks: Tensor, block: int, causal: bool, scale: float
) -> Tensor:
    """A block of queries at a time, with its keys copied together."""
    B, T, H = q.shape[:3]
    S, share = k.shape[1], H // k.shape[2]
    missing_keys = blocks.shape[3] * block - S
    k, v = (
        F.pad(x, (0, 0, 0, 0, 0, missing_keys)).unflatten(1, (-1, block)).permute(0, 3, 1, 2, 4)
        for x in (k, v)
    )  # [B, G, N, C, K]
    row = torch.arange(B, device=q.device)[:, None, None]
    group = (torch.arange(H, device=q.device) // share)[:, None]
    place = torch.arange(block, device=q.device)
    outputs = []
    for m in range(blocks.shape[2]):
        start, stop = m * block, min((m + 1) * block, T)
        chosen = blocks[:, :, m]
        most = max(1, int(chosen.sum(-1).max()))
        real, index = chosen.to(torch.uint8).sort(dim=-1, descending=True, stable=True)
        index, real = index[..., :most], real[..., :most].bool()
        keys, values = (x[row, group, index].flatten(2, 3) for x in (k, v))
        position = (index[..., None] * block + place).flatten(2)  # [B, H, most C]
        seen = real.repeat_interleave(block, -1) & (position < S)
        seen = seen.unsqueeze(2).expand(-1, -1, stop - start, -1)
        if causal:
            own = torch.arange(start + S - T, stop + S - T, device=q.device)[:, None]
            seen = seen & (position.unsqueeze(2) <= own)
        o = F.scaled_dot_product_attention(
            q[:, start:stop].transpose(1, 2), keys, values, attn_mask=seen, scale=scale
        )
        outputs.append(o.transpose(1, 2))
    return torch.cat(outputs, dim=1)


def compiled(
    q: Tensor, k: Tensor, v: Tensor, blocks: Tensor, block: int, causal: bool, scale: float
) -> Tensor:
    """A block of queries at a time, its keys read where they lie, with a running softmax."""
    return native.block_sparse_attention(q, k, v, blocks, block=block, causal=causal, scale=scale)


def why_not_compiled(
    q: Tensor, k: Tensor, v: Tensor, blocks: Tensor, block: int, causal: bool, scale: float
) -> str | None:
    if torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v)):
        return "the compiled kernel has no backward pass, and a gradient is wanted"
    return missing(q, k, v)


def sample(case: Case, generator: Generator) -> dict[str, Any]:
    """Random inputs in the legal range, as arguments of `block_sparse_attention`."""

    def normal(*letters: str) -> Tensor:
        return torch.randn(*(case[letter] for letter in letters), generator=generator)

    block, T, S = case["block"], case["T"], case["S"]
    shape = (case["H"], -(-T // block), -(-S // block))
    return {
        "q": normal("B", "T", "H", "K"),
        "k": normal("B", "S", "G", "K"),
        "v": normal("B", "S", "G", "V"),
        "blocks": torch.rand(shape, generator=generator) < case.get("density", 0.5),
        "block": block,
        "causal": case.get("causal", True),
    }


def extreme(case: Case, generator: Generator) -> dict[str, Any]:
    """Sharp weights, and a block that reads nothing."""
    inputs = sample(case, generator)
    inputs["q"] = inputs["q"] * 10
    inputs["blocks"][:, 0] = False
    return inputs


def cost(case: Case) -> Cost:
    """Scores and reads of the pairs in chosen blocks, `density` of those that are visible."""
    B, T, S, H, G, K, V = (case[letter] for letter in "BTSHGKV")
    pairs = case.get("density", 0.5) * (T * S - (T * T / 2 if case.get("causal", True) else 0))
    return Cost(
        flops=2 * B * H * pairs * (K + V),
        bytes=4 * B * (T * H * (K + V) + S * G * (K + V)),
        state_bytes=4 * B * S * G * (K + V),
    )


SIZES = {"B": 2, "T": 37, "S": 37, "H": 4, "G": 2, "K": 8, "V": 12}
TIMING = {"B": 1, "T": 8192, "S": 8192, "H": 4, "G": 4, "K": 64, "V": 64}

OPERATOR = Operator(
    function=block_sparse_attention,
    equation=r"o_t = \sum_{j \in \mathrm{blocks}(t)} "
    r"\frac{e^{s_{tj}}}{\sum_{i \in \mathrm{blocks}(t)} e^{s_{ti}}} v_j,\quad "
    r"s_{tj} = \mathrm{scale}\; q_t^\top k_j",
    source="Child et al. 2019 (arXiv:1904.10509); Xu et al. 2025 (arXiv:2503.16428)",
    axes=AXES,
    definition=definition,
    forms={
        "native": Form(compiled, why_not_compiled, trains=False, fused=True),
        "gathered": Form(gathered),
    },
    sample=sample,
    extreme=extreme,
    cases=[
        Case("causal", SIZES, {"block": 8}),
        Case("equal_heads", {**SIZES, "G": 4, "V": 8}, {"block": 16, "density": 0.3}),
        Case("longer_keys", {**SIZES, "S": 53}, {"block": 8}),
        Case("bidirectional", SIZES, {"block": 8, "causal": False}),
        Case("wide_blocks", {**SIZES, "T": 150, "S": 150}, {"block": 70, "density": 0.7}),
    ],
    timing=[
        Case("tenth", TIMING, {"block": BLOCK, "density": 0.1}),
        Case("half", TIMING, {"block": BLOCK, "density": 0.5}),
    ],
    cost=cost,
    value="v",
    chunk=16,
)
