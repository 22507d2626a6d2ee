"""Recurrences that transformers writes inside a module, without a function of its own: RWKV-4 and MiniMax."""

from __future__ import annotations

from functools import wraps
from typing import Any

import torch
from torch import Tensor

from seqmix.convert._functions import Function, computed_here
from seqmix.convert._texts import bounds_of, one_row
from seqmix.ops.diagonal_scan import diagonal_scan
from seqmix.ops.linear_attention import linear_attention


def rwkv_linear_attention(reference: Function) -> Function:
    """wkv_t = (sum_s<t e^{(t-1-s) w + k_s} v_s + e^{u + k_t} v_t) / (the same without v), as two diagonal scans.

    The reference keeps numerator, denominator and the largest exponent m_t = max(m_{t-1} + w, k_t) of both.
    m_t - t w is a running maximum, so all of them are known before the scans, whose log decays
    w + m_{t-1} - m_t are then at most 0. The result does not depend on m, which gets no gradient.
    """

    @wraps(reference)
    def accelerated(
        time_decay: Tensor,
        time_first: Tensor,
        key: Tensor,
        value: Tensor,
        state: list[Tensor] | None = None,
        return_state: bool = False,
    ) -> tuple[Tensor, list[Tensor] | None]:
        if not computed_here(key) or key.shape[1] == 1:  # one token is no scan
            return reference(time_decay, time_first, key, value, state, return_state)
        w = -time_decay.float().exp()
        k, v = key.float(), value.float()
        if state is None:
            numerator = denominator = torch.zeros_like(k[:, 0])
            largest = numerator - 1e38
        else:
            numerator, denominator, largest = (part.float() for part in state)
        with torch.no_grad():
            steps = torch.arange(k.shape[1] + 1, dtype=torch.float64).unsqueeze(-1) * w
            begun = torch.cat([largest.unsqueeze(1), k - steps[1:]], dim=1).double()
            m = begun.cummax(1).values + steps  # [B, T + 1, D], the first before all tokens
            decay = (m[:, :-1] - m[:, 1:]).float()
            m = m.float()
        weight = (k - m[:, 1:]).exp()
        scanned, _ = diagonal_scan(
            torch.cat([weight * v, weight], dim=-1),
            (decay + w).clamp(max=0.0).repeat(1, 1, 2),
            initial_state=torch.cat([numerator, denominator], dim=-1),
        )
        numerators, denominators = scanned.chunk(2, dim=-1)
        now = k + time_first
        top = torch.maximum(m[:, :-1], now).detach()
        kept, added = (m[:, :-1] - top).exp(), (now - top).exp()
        above = kept * torch.cat([numerator.unsqueeze(1), numerators[:, :-1]], dim=1) + added * v
        below = kept * torch.cat([denominator.unsqueeze(1), denominators[:, :-1]], dim=1) + added
        output = (above / below).to(key.dtype)
        if return_state or state is not None:
            return output, [numerators[:, -1], denominators[:, -1], m[:, -1]]
        return output, None

    return accelerated


def lightning_attention(reference: Function) -> Function:
    """S_t = e^{-slope} S_{t-1} + k_t v_t^T, o_t = S_t^T q_t in MiniMax's layer: linear attention, one decay a head."""

    @wraps(reference)
    def forward(
        self: Any,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        if not computed_here(hidden_states):
            return reference(
                self,
                hidden_states,
                position_embeddings,
                attention_mask,
                past_key_values,
                **kwargs,
            )
        batch, length, _ = hidden_states.shape
        qkv = self.act_fn(self.qkv_proj(hidden_states))
        if attention_mask is not None:
            qkv = qkv * attention_mask.unsqueeze(-1).to(qkv.dtype)
        qkv = qkv.view(batch, length, self.num_attention_heads, 3 * self.head_dim)
        g = -self.slope_rate.float().view(1, 1, -1).expand(batch, length, -1)
        bounds = bounds_of(kwargs, batch, length)
        if bounds is not None:
            qkv, g = one_row(qkv), one_row(g)
        held = None
        if past_key_values is not None:
            held = past_key_values.get_linear_cache(self.layer_idx)
        q, k, v = qkv.split(self.head_dim, dim=-1)
        o, held = linear_attention(
            q,
            k,
            v,
            g,
            scale=1.0,
            initial_state=held,
            output_final_state=True,
            cu_seqlens=bounds,
        )
        o = self.norm(o.reshape(batch, length, -1))
        o = self.out_proj(self.output_gate(hidden_states).sigmoid() * o)
        if past_key_values is not None:
            past_key_values.set_linear_cache(self.layer_idx, held)
        return o, held

    return forward
