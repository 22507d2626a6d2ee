"""Softmax attention: every query reads an average of the values, weighted by how well their keys match.

    o_t = sum_j p_tj v_j        p_tj = exp(s_tj) / (sum_i exp(s_ti) [+ exp(sink)])
    s_tj = scale * q_t . k_j + bias_tj

over the keys j that t may see, or the best of them. Queries stand at the end of the keys: query t has position
t + S - T.
Axes: B batch, T queries, S keys, H query heads, G key heads (query head h reads key head h // (H // G)),
K key width, V value width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Generator, Tensor

from seqmix.core.cost import Cost
from seqmix.core.errors import RangeError, ShapeError
from seqmix.core.numerics import widen
from seqmix.ops._arguments import check_tensors
from seqmix.ops._attention_forms import (
    BLOCK,
    Rule,
    blocked,
    compiled,
    definition,
    part,
    sdpa,
    why_not_compiled,
    why_not_sdpa,
)
from seqmix.ops._operator import Case, Form, Operator
from seqmix.ops._packing import Packing

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
    best: int | None = None,
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
        best: only the keys with so many highest scores are read, for each query and head; None for all.
        scale: factor on q . k, K**-0.5 by default.
        bias: added to the scores, broadcastable to [B, H, T, S]; -inf hides. A query that sees nothing gives 0.
        sinks: an int n keeps the first n keys of a text visible beyond the window; a tensor [H] holds logits
            that join each head's denominator and write nothing.
        cu_seqlens: boundaries [N+1] of N texts packed in one row (B = 1, S = T) that do not see each other.
        form: forces one form (`native`, `sdpa`, `blocked`, `definition`).

    Returns:
        o [B, T, H, V] in the dtype of v.

    Raises:
        ShapeError, DtypeError, RangeError: for an argument that does not fit, with what to do.
        NoUsableForm: when `form` cannot run here.

    Source: Vaswani et al. 2017, eq. 1; Ainslie et al. 2023 (grouped queries); Beltagy et al. 2020 (windows);
    Gupta et al. 2021 (arXiv:2106.06899; best keys); Xiao et al. 2023 (first keys as sinks); OpenAI 2025, gpt-oss
    model card, section 2 (learned sinks).
    """
    sizes = check_tensors("attention", AXES, {"q": q, "k": k, "v": v})
    _check(sizes, causal, window, best, bias, cu_seqlens)
    first, logits = (sinks, None) if isinstance(sinks, int) else (0, sinks)
    if first < 0:
        raise RangeError(
            f"attention: `sinks` is {sinks}, wanted 0 or more first keys, or logits [H]."
        )
    check_tensors("attention", AXES, {"sinks": logits}, H=sizes["H"])
    best = None if best is not None and best >= sizes["S"] else best
    rule = Rule(causal, window, first, sizes["K"] ** -0.5 if scale is None else scale, best)
    packing = None if cu_seqlens is None else Packing("attention", cu_seqlens, q)

    if compute := OPERATOR.fused(form, q, k, v, bias, logits, rule):
        joined: Tensor = compute(q, k, v, bias, logits, rule, cu_seqlens)
        return joined

    dtype = v.dtype
    q, k, v, bias, logits = widen(q, k, v, bias, logits)
    if bias is not None:
        bias = bias[(None,) * (4 - bias.ndim)]
    if packing is None:
        o: Tensor = OPERATOR.run(form, q, k, v, bias, logits, rule)
        return o.to(dtype)
    lengths = packing.lengths.tolist()
    parts, start = [], 0
    for length, *texts in zip(lengths, *(x.split(lengths, dim=1) for x in (q, k, v)), strict=True):
        own = None if bias is None else part(part(bias, 2, start, length), 3, start, length)
        if length:
            parts.append(OPERATOR.run(form, *texts, own, logits, rule))
        start += length
    return torch.cat(parts, dim=1).to(dtype)


def _check(
    sizes: dict[str, int],
    causal: bool,
    window: int | None,
    best: int | None,
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
    if best is not None and best < 1:
        raise RangeError(f"attention: `best` is {best}, wanted at least 1, or None for every key.")
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


def sample(case: Case, generator: Generator) -> dict[str, Any]:
    """Random inputs in the legal range, as arguments of `attention`."""

    def normal(*letters: str) -> Tensor:
        return torch.randn(*(case[letter] for letter in letters), generator=generator)

    inputs: dict[str, Any] = {
        "q": normal("B", "T", "H", "K"),
        "k": normal("B", "S", "G", "K"),
        "v": normal("B", "S", "G", "V"),
    }
    for option in ("causal", "window", "best"):
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
    keys = values = min(S, T + near) * G
    read = pairs
    if best := case.get("best"):
        read = min(pairs, T * best)
        values = min(keys, H * read)
    moved = B * (T * H * (K + V) + keys * K + values * V)
    return Cost(
        flops=2 * B * H * (pairs * K + read * V),
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
    forms={
        "native": Form(compiled, why_not_compiled, trains=False, fused=True),
        "sdpa": Form(sdpa, why_not_sdpa),
        "blocked": Form(blocked),
    },
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
        Case("best_keys", SIZES, {"best": 4}),
        Case("best_keys_decoding", {**SIZES, "T": 1, "S": 50}, {"best": 3, "sinks": "logits"}),
        Case("best_keys_bias", SIZES, {"bias": "HTS", "best": 4, "window": 7, "causal": False}),
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
