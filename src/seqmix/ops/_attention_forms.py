"""The forms of attention: the definition, blocks of queries, torch's fused kernel, and the compiled one.

Axes: B batch, T queries, S keys, H query heads, G key heads (query head h reads key head h // (H // G)),
K key width, V value width; C queries in a block, L keys that a block reads.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from seqmix.kernels import attention as native
from seqmix.kernels import missing

BLOCK = 128


class Rule(NamedTuple):
    """Which keys a position sees, and the factor on the scores."""

    causal: bool
    window: int | None
    first: int  # keys that stay visible beyond the window
    scale: float
    best: int | None = (
        None  # how many of the keys that it sees it reads, those with the highest scores
    )


def part(x: Tensor, dim: int, start: int, length: int) -> Tensor:
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


def _read_best(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    seen: Tensor | None,
    logits: Tensor | None,
    scale: float,
    best: int,
) -> Tensor:
    """As `_read`, of the `best` keys of every query and head: no other value is read.

    Row by row of the batch, so that a strided cache is not copied.
    """
    heads, (length, groups, width) = q.shape[2], v.shape[1:]
    share = heads // groups
    group = torch.arange(heads, device=q.device).view(-1, 1, 1) // share
    outputs = []
    for row, (queries, keys, values) in enumerate(zip(q * scale, k, v, strict=True)):
        grouped = queries.unflatten(1, (groups, share)).permute(1, 2, 0, 3).flatten(1, 2)
        scores = (grouped @ keys.permute(1, 2, 0)).unflatten(1, (share, -1)).flatten(0, 1)
        if bias is not None:
            scores = scores + bias[row if len(bias) > 1 else 0]
        if seen is not None:
            scores = scores.masked_fill(~seen, -torch.inf)
        highest, places = scores.topk(min(best, length), dim=-1, sorted=False)  # [H, C, best]
        if logits is not None:
            highest = torch.cat([highest, logits.view(-1, 1, 1).expand(-1, len(queries), 1)], -1)
        nothing = highest.amax(-1, keepdim=True) == -torch.inf
        weights = highest.masked_fill(nothing, 0.0).softmax(-1).masked_fill(nothing, 0.0)
        o = F.embedding_bag(
            (places * groups + group).flatten(0, 1),
            values.reshape(-1, width),
            per_sample_weights=weights[..., : places.shape[-1]].flatten(0, 1),
            mode="sum",
        )
        outputs.append(o.view(heads, -1, width).transpose(0, 1))
    return torch.stack(outputs)


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
            scores = scores + part(bias, 2, t, 1)[:, :, 0]
        seen = _visible(position, keys, rule)
        if seen is not None:
            scores = scores.masked_fill(~seen, -torch.inf)
        if rule.best is not None:
            places = scores.topk(min(rule.best, len(keys)), dim=-1).indices
            read = torch.zeros_like(scores, dtype=torch.bool).scatter(-1, places, True)
            scores = scores.masked_fill(~read, -torch.inf)
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
            near = part(x, dim, low, high - low)
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
        own = None if bias is None else keys(part(bias, 2, start, stop - start), 3)
        near = (q[:, start:stop], keys(k, 1), keys(v, 1), own, seen, logits, rule.scale)
        outputs.append(_read(*near) if rule.best is None else _read_best(*near, rule.best))
    return torch.cat(outputs, dim=1)


def compiled(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    logits: Tensor | None,
    rule: Rule,
    cu_seqlens: Tensor | None,
) -> Tensor:
    """Tile by tile with a running softmax; a few queries are cut along the keys, so that all threads read them.

    Source: Sanovar et al. 2024 (arXiv:2405.10480); Dao et al. 2022 (arXiv:2205.14135).
    """
    return native.attention(
        q,
        k,
        v,
        bias,
        logits,
        cu_seqlens,
        causal=rule.causal,
        window=rule.window,
        first=rule.first,
        scale=rule.scale,
    )


def why_not_compiled(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, logits: Tensor | None, rule: Rule
) -> str | None:
    inputs = [x for x in (q, k, v, bias, logits) if x is not None]
    if torch.is_grad_enabled() and any(x.requires_grad for x in inputs):
        return "the compiled kernel has no backward pass, and a gradient is wanted"
    if rule.best is not None:
        return f"the compiled kernel reads every key that is visible, not the {rule.best} best"
    return missing(*inputs)


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


def why_not_sdpa(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, logits: Tensor | None, rule: Rule
) -> str | None:
    length, total = q.shape[1], k.shape[1]
    if rule.best is not None:
        return f"scaled_dot_product_attention reads every key that is visible, not the {rule.best} best"
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
