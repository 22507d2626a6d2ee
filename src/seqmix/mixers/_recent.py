"""The last W tokens beside all earlier ones: what a mixer needs that reads the two in different ways.

`Timeline` lays every text after the W tokens that its state holds, so that a window of W tokens and a delay by W tokens
are the same at a first call, at a later one, and where texts are packed: no window reaches another text.
Axes: B batch (N rows of packed texts), T time, E entries of the timeline, W window, H heads, G key heads, S heads that
share a key head, K key width, V value width; M blocks of C queries, each of which reads L = C + W - 1 keys.
"""

from __future__ import annotations

import torch
from torch import Tensor

from seqmix.core.numerics import widen
from seqmix.mixers._projection import lengths_of


class Timeline:
    """The entries [held_0, text_0, held_1, text_1, ...], W held ones each, in a row per text or, packed, all in one.

    Held entries from before the beginning of a text are empty: `filled [B or 1, E]` is where there is a token.
    """

    def __init__(self, window: int, x: Tensor, seen: Tensor | None, cu_seqlens: Tensor | None):
        self.window, self.packed = window, cu_seqlens is not None
        lengths = lengths_of(x, cu_seqlens)
        seen = torch.zeros_like(lengths) if seen is None else seen
        self.seen_after = seen + lengths
        held = torch.arange(window, device=x.device)
        if not self.packed:
            self.tokens = window + torch.arange(x.shape[1], device=x.device)  # [T]: their entries
            entries = torch.arange(window + x.shape[1], device=x.device)
            self.filled = seen.unsqueeze(1) + entries >= window
            return
        text = torch.repeat_interleave(lengths)
        self.tokens = torch.arange(len(text), device=x.device) + window * (text + 1)
        ends = (lengths + window).cumsum(0)
        starts = (ends - lengths - window).unsqueeze(1) + held  # [N, W]: entries that are held
        self.ends = (ends - window).unsqueeze(1) + held  # [N, W]: those to hold afterwards
        self.order = torch.cat([starts.flatten(), self.tokens]).argsort()
        self.filled = torch.ones(1, len(self.order), dtype=torch.bool, device=x.device)
        self.filled[0, starts] = seen.unsqueeze(1) + held >= window

    def join(self, held: Tensor, x: Tensor) -> Tensor:
        """The entries [B or 1, E, ...] of held [B, W, ...] and x [B, T, ...] or [1, total, ...]."""
        if not self.packed:
            return torch.cat([held, x], dim=1)
        return torch.cat([held.flatten(0, 1), x[0]])[self.order].unsqueeze(0)

    def hold(self, entries: Tensor) -> Tensor:
        """The last W entries of every text, [B, W, ...]."""
        if not self.packed:
            return entries[:, -self.window :].clone()  # a view would keep the others in memory
        return entries[0, self.ends]

    def delayed(self, entries: Tensor) -> Tensor:
        """For every token, the entry W before its own, [B, T, ...] or [1, total, ...]."""
        return entries[:, self.tokens - self.window]

    def read(self, q: Tensor, keys: Tensor, values: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        """The window of every query: sum_j e_tj v_j [..., H, V] and sum_j e_tj [..., H, 1], widened.

        e_tj = exp(s_tj - max_i s_ti),   s_tj = scale q_t . k_j   over  t - W < j <= t
        q [B, T, H, K]; keys [B, E, G, K] and values [B, E, G, V] are entries.
        """
        places = self.tokens - self.window  # queries start W entries later than keys
        count = keys.shape[1] - self.window
        if self.packed:  # queries of held entries read what nobody asks for
            q = q.new_zeros(1, count, *q.shape[2:]).index_copy(1, places, q)
        read = _in_blocks(q, keys[:, 1:], values[:, 1:], self.filled[:, 1:], self.window, scale)
        return (read[0][:, places], read[1][:, places]) if self.packed else read


def _in_blocks(
    q: Tensor, keys: Tensor, values: Tensor, filled: Tensor, window: int, scale: float
) -> tuple[Tensor, Tensor]:
    """`Timeline.read` for query t at key t + W - 1, a block of up to W queries at a time."""
    q, keys, values = widen(q, keys, values)
    length, size = q.shape[1], min(window, q.shape[1])
    padding = -length % size
    q, keys, values = (_padded(part, padding) for part in (q, keys, values))
    span = size + window - 1
    k, v = (x.unfold(1, span, size) for x in (keys, values))  # [B, M, G, K, L]
    there = _padded(filled, padding).unfold(1, span, size)  # [B, M, L]
    q = q.unflatten(1, (-1, size)).unflatten(3, (keys.shape[2], -1))  # [B, M, C, G, S, K]
    distance = torch.arange(span, device=q.device) - torch.arange(size, device=q.device)[:, None]
    visible = ((distance >= 0) & (distance < window)) & there.unsqueeze(2)  # [B, M, C, L]
    scores = scale * torch.einsum("bmcgsk,bmgkl->bmcgsl", q, k)
    scores = scores.masked_fill(~visible[:, :, :, None, None], torch.finfo(scores.dtype).min)
    weights = (scores - scores.amax(-1, keepdim=True)).exp()
    read = torch.einsum("bmcgsl,bmgvl->bmcgsv", weights, v)
    total = weights.sum(-1, keepdim=True)
    both = (x.flatten(3, 4).flatten(1, 2)[:, :length] for x in (read, total))
    return tuple(both)  # type: ignore[return-value]


def _padded(x: Tensor, count: int) -> Tensor:
    """x [B, T, ...] with so many more entries of zero along T."""
    return torch.cat([x, x.new_zeros(x.shape[0], count, *x.shape[2:])], dim=1) if count else x
