"""RWKV-4 time mixing: per channel, a mean of all earlier values whose weights fade at a fixed rate.

    x^c_t = mu_c * x_t + (1 - mu_c) * x_{t-1}   for c = k, v, r;   k, v, r = W_c x^c
    o_t = (sum_{s<t} e^{-(t-1-s) w + k_s} v_s + e^{u + k_t} v_t) / (sum_{s<t} e^{-(t-1-s) w + k_s} + e^{u + k_t})
    y_t = W_o (sigmoid(r_t) * o_t),   w = e^d

The sums are kept as their logarithm and their quotient, so that no key is too large and nothing is divided:

    l_t = log(e^{l_{t-1} - w} + e^{k_t}),   m_t = e^{l_{t-1} - w - l_t} m_{t-1} + e^{k_t - l_t} v_t
    o_t = m_{t-1} + sigmoid(u + k_t - l_{t-1}) (v_t - m_{t-1})

Peng et al. 2023 (arXiv:2305.13048), section 3.1 and eq. 11-18.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from seqmix.core.numerics import widen
from seqmix.core.state import State
from seqmix.layers.precision import full_precision
from seqmix.mixers._mixer import Mixer, MixerConfig
from seqmix.mixers._token_shift import token_before
from seqmix.ops import Case
from seqmix.ops._packing import in_rows
from seqmix.ops.diagonal_scan import diagonal_scan

NOTHING = -1e30  # the logarithm of the weight of no token, finite so that gradients are
# Exponents of the initial mu_k, mu_v, mu_r = (channel / width) ** exponent: the paper's, for the middle layer.
EXPONENTS = (0.5, 0.5, 0.25)
MORE_OF_VALUES = 0.15


class RWKV4(Mixer):
    """Linear time; state: two numbers per channel and the token before, [B, 1, D]."""

    no_weight_decay: ClassVar = ("mix", "decay", "bonus")
    operator = "diagonal_scan"

    def __init__(self, config: MixerConfig) -> None:
        super().__init__(config)
        width = config.width
        channel = torch.arange(width)
        mixes = torch.stack([(channel / width) ** power for power in EXPONENTS])
        mixes[1] += MORE_OF_VALUES
        self.mix = nn.Parameter(mixes)
        self.decay = nn.Parameter(8 * (channel / max(1, width - 1)) ** 1.35 - 5)
        self.bonus = nn.Parameter(math.log(0.3) + 0.5 * ((channel + 1) % 3 - 1))
        self.key = nn.Linear(width, width, bias=False)
        self.value = nn.Linear(width, width, bias=False)
        self.receptance = nn.Linear(width, width, bias=False)
        self.output = nn.Linear(width, width, bias=False)

    def initial_state(self, batch: int, like: Tensor) -> State:
        memory = like.new_zeros(batch, self.config.width).float()
        return {
            "previous": like.new_zeros(batch, 1, self.config.width).float(),
            "weight": torch.full_like(memory, NOTHING),
            "mean": memory,
        }

    def operands(
        self, x: Tensor, state: State = None, cu_seqlens: Tensor | None = None
    ) -> tuple[dict[str, Any], State]:
        key, value, _, after = self._project(x, state, cu_seqlens)
        arguments, _, weight = self._scan(key, value, state, cu_seqlens)
        return arguments, {**after, "weight": weight}

    def forward(
        self, x: Tensor, state: State = None, *, cu_seqlens: Tensor | None = None
    ) -> tuple[Tensor, State]:
        key, value, receptance, after = self._project(x, state, cu_seqlens)
        arguments, surprise, weight = self._scan(key, value, state, cu_seqlens)
        given = None if state is None else state["mean"]
        mean, last = diagonal_scan(
            **arguments, initial_state=given, output_final_state=True, cu_seqlens=cu_seqlens
        )
        first = None if given is None else given.unsqueeze(1)
        before, _ = token_before(mean, first, cu_seqlens)
        o = before + surprise.sigmoid() * (value - before)
        y = self.output(receptance.sigmoid() * o.to(receptance.dtype))
        return y, {**after, "weight": weight, "mean": last}

    def _project(
        self, x: Tensor, state: State, cu_seqlens: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, State]:
        """Keys and values in full precision, receptances, and the last token."""
        before, last = token_before(x, None if state is None else state["previous"], cu_seqlens)
        mixed = before + self.mix[:, None, None].to(x.dtype) * (x - before)
        key, value = widen(self.key(mixed[0]), self.value(mixed[1]))
        return key, value, self.receptance(mixed[2]), {"previous": last}

    def _scan(
        self, key: Tensor, value: Tensor, state: State, cu_seqlens: Tensor | None
    ) -> tuple[dict[str, Tensor], Tensor, Tensor]:
        """What makes the means m [B, T, D], u + k_t - l_{t-1}, and the last l [B, D].

        The logarithms l are sums of w over time, which only float64 adds up without loss.
        """
        with full_precision(key):
            texts = in_rows("rwkv4", cu_seqlens, key)
            wide, rate = key.double(), self.decay.double().exp()
            given = state["weight"].double() if state is not None else None
            if given is None:
                given = wide.new_full((texts.num_texts, wide.shape[-1]), NOTHING)

            def logarithms(keys: Tensor, real: Tensor, first: Tensor) -> tuple[Tensor, Tensor]:
                passed = real.cumsum(1) * rate  # stands still where a shorter text has ended
                keys = torch.where(real > 0, keys + passed, NOTHING)
                sums = torch.cat([first.unsqueeze(1), keys], dim=1).logcumsumexp(1)
                after = sums[:, 1:] - passed
                before = torch.cat([first.unsqueeze(1), after[:, :-1]], dim=1)
                return torch.cat([before, after], dim=-1), after[:, -1]

            both, last = texts.run(logarithms, (wide, torch.ones_like(wide[..., :1])), given)
            before, after = both.chunk(2, dim=-1)
            decay = (before - rate - after).clamp_max(0).to(key.dtype)
            arguments = {"x": (wide - after).exp().to(key.dtype) * value, "a": decay}
            surprise = (self.bonus + wide - before).to(key.dtype)
        return arguments, surprise, last.to(key.dtype)

    def operator_case(self, tokens: int, context: int) -> Case:
        return Case("mixer", {"B": 1, "T": tokens, "D": self.config.width})


MIXER = RWKV4
