"""Softmax attention: every query reads an average of the values, weighted by how well their keys match.

    o_t = sum_j p_tj v_j        p_tj = exp(s_tj) / (sum_i exp(s_ti) [+ exp(sink)])
    s_tj = scale * q_t . k_j + bias_tj

over the keys j that t may see. Queries stand at the end of the keys: query t has position t + S - T.
Axes: B batch, T queries, S keys, H query heads, G key heads (query head h reads key head h // (H // G)),
K key width, V value width; C queries in a block, L keys that a block reads.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from seqmix.core.cost import Cost
from seqmix.core.errors import RangeError, ShapeError
from seqmix.core.numerics import widen
from seqmix.ops._arguments import check_tensors
from seqmix.ops._operator import Case, Form, Operator
from seqmix.ops._packing import Packing

BLOCK = 128


class Rule(NamedTuple):
    """Which keys a position sees, and the factor on the scores."""

    causal: bool
    window: int | None
    first: int  # keys that stay visible beyond the window
    scale: float


AXES: dict[str, str | tuple[str, ...]] = {
    "q": "B T H K",
    "k": "B S G K",
    "v": "B S G V",
    "bias": ("B H T S", "H T S", "T S"),
    "sinks": "H",
}


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = True,
    window: int | None = None,
    scale: float | None = None,
    bias: Tensor | None = None,
    sinks: int | Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    form: str | None = None,
) -> Tensor:
    """o_t = sum_j softmax_j(scale * q_t . k_j + bias_tj) v_j over the keys that t may see.

    Args:
        q: queries, [B, T, H, K].
        k, v: keys [B, S, G, K] and values [B, S, G, V]; H is a multiple of G, and query head h reads key
            head h // (H // G). Queries are aligned to the end of the keys: query t is at position t + S - T.
        causal: whether position p sees only keys up to p; needs S >= T.
        window: p sees the keys p - window + 1 to p, or |p - j| < window if not causal; None for all.
        scale: factor on q . k, K**-0.5 by default.
        bias: added to the scores, broadcastable to [B, H, T, S]; -inf hides. A query that sees nothing gives 0.
        sinks: an int n keeps the first n keys of a text visible beyond the window; a tensor [H] holds logits
            that join each head's denominator and write nothing.
        cu_seqlens: boundaries [N+1] of N texts packed in one row (B = 1, S = T) that do not see each other.
        form: forces one form (`sdpa`, `blocked`, `definition`).

    Returns:
        o [B, T, H, V] in the dtype of v.

    Raises:
        ShapeError, DtypeError, RangeError: for an argument that does not fit, with what to do.
        NoUsableForm: when `form` cannot run here.

    Source: Vaswani et al. 2017, eq. 1; Ainslie et al. 2023 (grouped queries); Beltagy et al. 2020 (windows);
    Xiao et al. 2023 (first keys as sinks); OpenAI 2025, gpt-oss model card, section 2 (learned sinks).
    """
    sizes = check_tensors("attention", AXES, {"q": q, "k": k, "v": v})
    _check(sizes, causal, window, bias, cu_seqlens)
    first, logits = (sinks, None) if isinstance(sinks, int) else (0, sinks)
    if first < 0:
        raise RangeError(
            f"attention: `sinks` is {sinks}, wanted 0 or more first keys, or logits [H]."
        )
    check_tensors("attention", AXES, {"sinks": logits}, H=sizes["H"])
    rule = Rule(causal, window, first, sizes["K"] ** -0.5 if scale is None else scale)
    dtype = v.dtype
    q, k, v, bias, logits = widen(q, k, v, bias, logits)
    if bias is not None:
        bias = bias[(None,) * (4 - bias.ndim)]
    if cu_seqlens is None:
        o: Tensor = OPERATOR.run(form, q, k, v, bias, logits, rule)
        return o.to(dtype)
    lengths = Packing("attention", cu_seqlens, q).lengths.tolist()
    parts, start = [], 0
    for length, *texts in zip(lengths, *(x.split(lengths, dim=1) for x in (q, k, v)), strict=True):
        own = None if bias is None else _part(_part(bias, 2, start, length), 3, start, length)
        if length:
            parts.append(OPERATOR.run(form, *texts, own, logits, rule))
        start += length
    return torch.cat(parts, dim=1).to(dtype)


def _check(
    sizes: dict[str, int],
    causal: bool,
    window: int | None,
    bias: Tensor | None,
    cu_seqlens: Tensor | None,
) -> None:
    T, S, H, G = (sizes[letter] for letter in "TSHG")
    if H % G:
        raise ShapeError(
            f"attention: `k` has {G} heads, wanted a divisor of the {H} heads of `q`. "
            "Repeat or drop key heads."
        )
    if (causal and S < T) or (cu_seqlens is not None and S != T):
        wanted = (
            f"{T}, as many as queries" if cu_seqlens is not None else f"at least {T}, one per query"
        )
        raise ShapeError(
            f"attention: `k` has {S} positions, wanted {wanted}. Pass the keys of the whole text"
            + ("." if cu_seqlens is not None else ", or causal=False.")
        )
    if window is not None and window < 1:
        raise RangeError(
            f"attention: `window` is {window}, wanted at least 1, or None for no window."
        )
    if bias is not None:
        check_tensors("attention", {"bias": ("b h t s", "h t s", "t s")}, {"bias": bias})
        full = [sizes["B"], H, T, S]
        if any(
            had not in (1, want) for had, want in zip(bias.shape[::-1], full[::-1], strict=False)
        ):
            raise ShapeError(
                f"attention: `bias` has shape {list(bias.shape)}, wanted one that broadcasts to "
                f"[B, H, T, S] = {full}. Give each axis this size or 1."
            )


def _part(x: Tensor, dim: int, start: int, length: int) -> Tensor:
    """Entries `start` to `start + length`; a broadcast axis stays."""
    return x if x.shape[dim] == 1 else x.narrow(dim, start, length)


def _visible(positions: Tensor, keys: Tensor, rule: Rule) -> Tensor | None:
    """Which keys each position sees, [C, L]; None for all."""
    distance = positions.unsqueeze(-1) - keys
    seen = torch.ones_like(distance, dtype=torch.bool)
    if rule.window is not None:
        seen = (distance.abs() < rule.window) | (keys < rule.first)
    if rule.causal:
        seen = seen & (distance >= 0)
    return None if bool(seen.all()) else seen


def _read(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    seen: Tensor | None,
    logits: Tensor | None,
    scale: float,
) -> Tensor:
    """Attention of [B, C, H, K] over [B, L, G, K], all of whose scores fit in memory."""
    batch, length, heads = q.shape[:3]
    groups = k.shape[2]
    mask = bias if seen is None else seen
    if bias is not None and seen is not None:
        mask = bias.masked_fill(~seen, -torch.inf)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    if logits is None and length > 1:
        o = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, scale=scale, enable_gqa=groups != heads
        )
        return o.transpose(1, 2)
    # Queries that share a key head become the rows of one product: keys are read once, without a copy.
    share = heads // groups
    q = q.reshape(batch, groups, share * length, -1)
    if mask is not None:
        mask = mask.expand(batch, heads, length, k.shape[2]).reshape(
            batch, groups, share * length, -1
        )
    if logits is None:
        o = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
    else:
        # Row by row: the two batch axes of a strided cache cannot be merged without a copy.
        scores = torch.stack([a @ b.mT for a, b in zip(q * scale, k, strict=True)])
        if mask is not None:
            scores = (
                scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
            )
        sink = logits.view(1, groups, share, 1, 1).expand(batch, -1, -1, length, 1)
        sink = sink.reshape(batch, groups, share * length, 1)
        weights = torch.cat([scores, sink], dim=-1).softmax(-1)[..., :-1]
        o = torch.stack([a @ b for a, b in zip(weights, v, strict=True)])
    return o.reshape(batch, heads, length, -1).transpose(1, 2)


def definition(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, logits: Tensor | None, rule: Rule
) -> Tensor:
    """One query at a time, with everything that it sees."""
    length, keys = q.shape[1], torch.arange(k.shape[1], device=q.device)
    share = q.shape[2] // k.shape[2]
    k, v = (x.repeat_interleave(share, dim=2) for x in (k, v))
    outputs = []
    for t in range(length):
        position = keys.new_tensor([t + k.shape[1] - length])
        scores = rule.scale * (q[:, t, None] * k).sum(-1).transpose(1, 2)  # [B, H, S]
        if bias is not None:
            scores = scores + _part(bias, 2, t, 1)[:, :, 0]
        seen = _visible(position, keys, rule)
        if seen is not None:
            scores = scores.masked_fill(~seen, -torch.inf)
        highest = scores.detach().amax(-1, keepdim=True)
        if logits is not None:
            highest = torch.maximum(highest, logits.detach()[:, None])
        highest = highest.masked_fill(highest == -torch.inf, 0.0)
        weights = (scores - highest).exp()
        total = weights.sum(-1, keepdim=True)
        if logits is not None:
            total = total + (logits[:, None] - highest).exp()
        weights = weights / total.masked_fill(total == 0, 1.0)
        outputs.append((weights.transpose(1, 2).unsqueeze(-1) * v).sum(1))
    return torch.stack(outputs, dim=1)


def blocked(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, logits: Tensor | None, rule: Rule
) -> Tensor:
    """A block of queries at a time, with only the keys that some query of the block sees.

    A window w costs O(T (w + C)), and no more than H C S scores exist at once.
    """
    length, total = q.shape[1], k.shape[1]
    shift = total - length
    outputs = []
    for start in range(0, length, BLOCK):
        stop = min(start + BLOCK, length)
        low, high = 0, stop + shift if rule.causal else total
        if rule.window is not None:
            low = start + shift - rule.window + 1
            high = min(high, stop + shift + rule.window - 1)
        low = min(max(low, 0), total - 1)
        high = max(min(high, total), low + 1)
        low, head = (0, 0) if low <= rule.first else (low, rule.first)

        def keys(x: Tensor, dim: int, low: int = low, high: int = high, head: int = head) -> Tensor:
            near = _part(x, dim, low, high - low)
            if head == 0 or x.shape[dim] == 1:
                return near
            return torch.cat([x.narrow(dim, 0, head), near], dim)

        device = q.device
        places = (
            keys(torch.arange(total, device=device), 0)
            if total > 1
            else torch.zeros(1, device=device)
        )
        positions = torch.arange(start + shift, stop + shift, device=device)
        seen = _visible(positions, places, rule)
        own = None if bias is None else keys(_part(bias, 2, start, stop - start), 3)
        outputs.append(
            _read(q[:, start:stop], keys(k, 1), keys(v, 1), own, seen, logits, rule.scale)
        )
    return torch.cat(outputs, dim=1)


def sdpa(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, logits: Tensor | None, rule: Rule
) -> Tensor:
    """One call of torch's fused attention."""
    if not rule.causal or q.shape[1] == 1:
        return _read(q, k, v, bias, None, None, rule.scale)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    grouped = q.shape[1] != k.shape[1]
    o = F.scaled_dot_product_attention(
        q, k, v, is_causal=True, scale=rule.scale, enable_gqa=grouped
    )
    return o.transpose(1, 2)


def _why_not_sdpa(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, logits: Tensor | None, rule: Rule
) -> str | None:
    length, total = q.shape[1], k.shape[1]
    if logits is not None:
        return "learned sinks need a denominator that scaled_dot_product_attention does not show"
    if rule.window is not None and rule.window < max(length, total):
        return f"a window of {rule.window} would take a mask of {length} x {total}"
    if rule.causal and length not in (1, total):
        return (
            f"{length} queries at the end of {total} keys would take a mask of {length} x {total}"
        )
    if rule.causal and length > 1 and bias is not None:
        return "it takes either a causal mask or a bias"
    return None


def sample(case: Case, generator: Generator) -> dict[str, Any]:
    """Random inputs in the legal range, as arguments of `attention`."""

    def normal(*letters: str) -> Tensor:
        return torch.randn(*(case[letter] for letter in letters), generator=generator)

    inputs: dict[str, Any] = {
        "q": normal("B", "T", "H", "K"),
        "k": normal("B", "S", "G", "K"),
        "v": normal("B", "S", "G", "V"),
    }
    for option in ("causal", "window"):
        if option in case.options:
            inputs[option] = case[option]
    if shape := case.get("bias"):
        inputs["bias"] = normal(*shape)
    if sinks := case.get("sinks"):
        inputs["sinks"] = normal("H") if sinks == "logits" else sinks
    return inputs


def extreme(case: Case, generator: Generator) -> dict[str, Any]:
    """Sharp weights, hidden keys, and where there is a bias a query that sees nothing.

    Not sharper: the backward of torch's fused kernel loses |score| roundings, where the definition loses one.
    """
    inputs = sample(case, generator)
    inputs["q"] = inputs["q"] * 10
    if "bias" in inputs:
        hidden = torch.rand(inputs["bias"].shape, generator=generator) < 0.3
        hidden[..., case["T"] // 2, :] = True
        inputs["bias"] = inputs["bias"].masked_fill(hidden, -torch.inf)
    return inputs


def cost(case: Case) -> Cost:
    """Scores and reads of the visible pairs; `state_bytes` is the key-value cache that decoding keeps."""
    B, T, S, H, G, K, V = (case[letter] for letter in "BTSHGKV")
    window = min(case.get("window") or S, S)
    near = window if case.get("causal", True) else min(2 * window, S)
    pairs = T * min(near, S)
    if case.get("causal", True) and T > 1:
        pairs -= min(T, near) ** 2 / 2
    moved = B * (T * H * (K + V) + min(S, T + near) * G * (K + V))
    return Cost(
        flops=2 * B * H * pairs * (K + V),
        bytes=4 * moved,
        state_bytes=4 * B * min(S, near) * G * (K + V),
    )


SIZES = {"B": 2, "T": 37, "S": 37, "H": 4, "G": 2, "K": 8, "V": 12}
TIMING = {"B": 1, "T": 2048, "S": 2048, "H": 4, "G": 4, "K": 64, "V": 64}

OPERATOR = Operator(
    function=attention,
    equation=r"o_t = \sum_j \frac{e^{s_{tj}}}{\sum_i e^{s_{ti}}} v_j,\quad "
    r"s_{tj} = \mathrm{scale}\; q_t^\top k_j + \mathrm{bias}_{tj}",
    source="Vaswani et al. 2017 (arXiv:1706.03762); Ainslie et al. 2023 (arXiv:2305.13245); "
    "Xiao et al. 2023 (arXiv:2309.17453)",
    axes=AXES,
    definition=definition,
    forms={"sdpa": Form(sdpa, _why_not_sdpa), "blocked": Form(blocked)},
    sample=sample,
    extreme=extreme,
    cases=[
        Case("causal", {**SIZES, "G": 4, "V": 8}),
        Case("grouped", SIZES),
        Case("one_key_head", {**SIZES, "G": 1}),
        Case("bidirectional", SIZES, {"causal": False}),
        Case("window", SIZES, {"window": 5}),
        Case("bidirectional_window", SIZES, {"window": 5, "causal": False}),
        Case("longer_keys", {**SIZES, "S": 50}),
        Case("longer_keys_window", {**SIZES, "S": 50}, {"window": 9, "sinks": 2}),
        Case("decoding", {**SIZES, "T": 1, "S": 50}),
        Case("decoding_learned_sinks", {**SIZES, "T": 1, "S": 50}, {"sinks": "logits"}),
        Case("first_keys", SIZES, {"window": 5, "sinks": 3}),
        Case("learned_sinks", SIZES, {"sinks": "logits"}),
        Case("bias", SIZES, {"bias": "BHTS"}),
        Case("bidirectional_bias", SIZES, {"bias": "HTS", "causal": False}),
        Case("all", SIZES, {"bias": "HTS", "sinks": "logits", "window": 7}),
    ],
    timing=[
        Case("causal", TIMING),
        Case("window", TIMING, {"window": 256}),
        Case("decode", {**TIMING, "T": 1, "S": 8192}),
        Case("decode_grouped", {**TIMING, "T": 1, "S": 8192, "G": 1}),
    ],
    cost=cost,
    value="v",
    chunk=BLOCK,
)
