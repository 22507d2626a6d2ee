"""RWKV-7 time mixing: a memory with a decay and a learning rate per channel, which removes under one key and
writes under another.

    x^c_t = x_t + mu_c * (x_{t-1} - x_t)   for c = r, w, k, v, a, g
    r, k, v = W_c x^c,   w = -exp(-1/2) sigmoid(w_0 + L_w tanh(L'_w x^w)),   a = sigmoid(a_0 + L_a L'_a x^a)
    n = k * kappa / |k * kappa| per head,   k~ = k * (1 + alpha * (a - 1)),   gate = L_g sigmoid(L'_g x^g)
    S_t = (diag(exp(w_t)) - (n_t * a_t) n_t^T) S_{t-1} + k~_t v_t^T
    y_t = W_o (gate_t * (group_norm(S_t^T r_t) + (sum over the head of r_t * rho * k~_t) v_t))

Peng et al. 2025 (arXiv:2503.14456), section 4 and eq. 1-25. The values of the first layer, which the paper's
language models mix into those of later layers, are left out: a mixer sees only its own input.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from seqmix.core.errors import ConfigError
from seqmix.core.numerics import widen
from seqmix.core.state import State
from seqmix.mixers._mixer import HeadsConfig, Mixer
from seqmix.mixers._token_shift import token_before
from seqmix.ops import Case
from seqmix.ops.generalized_delta_rule import generalized_delta_rule

STRONGEST_LOG_DECAY = -math.exp(-0.5)
# Initial mu_c = 1 - (channel / width) ** exponent for r, w, k, v, a, g: the paper's, for the middle layer.
EXPONENTS = (0.1, 0.45, 0.35, 0.35, 0.45, 0.1)


@dataclass(frozen=True, kw_only=True)
class Config(HeadsConfig):
    rank: int = 32  # of the maps that make decays and learning rates
    gate_rank: int = 64

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("rank", "gate_rank"):
            if getattr(self, name) < 1:
                raise ConfigError(f"rwkv7: {name}={getattr(self, name)}, wanted at least 1.")


class RWKV7(Mixer):
    """Linear time; state [B, H, K, K] and the token before, [B, 1, D]."""

    Config = Config
    no_weight_decay: ClassVar = (
        "mix",
        "decay_bias",
        "rate_bias",
        "removal",
        "replacement",
        "bonus",
    )
    operator = "generalized_delta_rule"
    examples: ClassVar = {"ranks": {"rank": 3, "gate_rank": 5}}

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        width, heads = config.width, config.heads
        place = torch.arange(width) / width  # 0 to 1 over the channels
        within = torch.arange(width) % config.head_width / max(1, config.head_width - 1) * 2 - 1
        zigzag = within * within.abs()  # -1 to 1 over the channels of a head

        mixes = torch.stack([1 - place**exponent for exponent in EXPONENTS])
        self.mix = nn.Parameter(mixes)
        self.receptance = nn.Linear(width, width, bias=False)
        self.key = nn.Linear(width, width, bias=False)
        self.value = nn.Linear(width, width, bias=False)
        self.decay = low_rank(width, config.rank, nn.Tanh(), from_zero=True)
        self.decay_bias = nn.Parameter(6 * place**1.8 - 5.5 + 2.5 * zigzag)
        self.rate = low_rank(width, config.rank, nn.Identity(), from_zero=True)
        self.rate_bias = nn.Parameter(0.3 * zigzag + 0.4 * (place - 0.5) - 0.19)
        self.gate = low_rank(width, config.gate_rank, nn.Sigmoid())
        self.removal = nn.Parameter(0.71 - 0.1 * (place - 0.5))
        self.replacement = nn.Parameter(torch.full((width,), 1.02))
        self.bonus = nn.Parameter(torch.full((heads, config.head_width), -0.04))
        self.norm = nn.GroupNorm(heads, width, eps=1e-5 * config.head_width)
        self.output = nn.Linear(width, width, bias=False)

    def initial_state(self, batch: int, like: Tensor) -> State:
        c = self.config
        return {
            "previous": like.new_zeros(batch, 1, c.width).float(),
            "recurrent": like.new_zeros(batch, c.heads, c.head_width, c.head_width).float(),
        }

    def operands(
        self, x: Tensor, state: State = None, cu_seqlens: Tensor | None = None
    ) -> tuple[dict[str, Any], State]:
        mixed, after = self._shift(x, state, cu_seqlens)
        return self._operands(*mixed[:5]), after

    def forward(
        self, x: Tensor, state: State = None, *, cu_seqlens: Tensor | None = None
    ) -> tuple[Tensor, State]:
        (*mixed, for_gate), after = self._shift(x, state, cu_seqlens)
        arguments = self._operands(*mixed)
        o, recurrent = generalized_delta_rule(
            **arguments,
            initial_state=None if state is None else state["recurrent"],
            output_final_state=True,
            cu_seqlens=cu_seqlens,
        )
        q, k, v = (arguments[name] for name in "qkv")
        current = (q * k * self.bonus).sum(-1, keepdim=True) * v  # what this token says of itself
        normed = self.norm(o.flatten(0, 1).flatten(1)).view_as(x)
        y = self.output((normed + current.flatten(-2).to(x.dtype)) * self.gate(for_gate))
        return y, {**after, "recurrent": recurrent}

    def _shift(
        self, x: Tensor, state: State, cu_seqlens: Tensor | None
    ) -> tuple[tuple[Tensor, ...], State]:
        """x mixed with the token before, once for each of r, w, k, v, a, g."""
        before, last = token_before(x, None if state is None else state["previous"], cu_seqlens)
        mixed = x + self.mix[:, None, None].to(x.dtype) * (before - x)
        return mixed.unbind(0), {"previous": last}

    def _operands(
        self, for_r: Tensor, for_w: Tensor, for_k: Tensor, for_v: Tensor, for_a: Tensor
    ) -> dict[str, Any]:
        heads = (self.config.heads, -1)
        k = self.key(for_k)
        decay, rate, scaled = widen(
            self.decay(for_w) + self.decay_bias, self.rate(for_a) + self.rate_bias, k * self.removal
        )
        rate = rate.sigmoid()
        direction = F.normalize(scaled.unflatten(-1, heads), dim=-1)
        k = k * (1 + (rate - 1) * self.replacement).to(k.dtype)
        return {
            "q": self.receptance(for_r).unflatten(-1, heads),
            "k": k.unflatten(-1, heads),
            "v": self.value(for_v).unflatten(-1, heads),
            "a": -direction,
            "b": direction * rate.unflatten(-1, heads),
            "g": (STRONGEST_LOG_DECAY * decay.sigmoid()).unflatten(-1, heads),
            "scale": 1.0,
        }

    def operator_case(self, tokens: int, context: int) -> Case:
        c = self.config
        sizes = {"B": 1, "T": tokens, "H": c.heads, "K": c.head_width, "V": c.head_width}
        return Case("mixer", sizes)


def low_rank(
    width: int, rank: int, activation: nn.Module, *, from_zero: bool = False
) -> nn.Sequential:
    """A map of the width to itself through `rank` channels; `from_zero` for one that starts as nothing."""
    down = nn.Linear(width, rank, bias=False)
    if from_zero:
        nn.init.zeros_(down.weight)
        down.keeps_initialisation = True  # type: ignore[assignment]
    return nn.Sequential(down, activation, nn.Linear(rank, width, bias=False))


MIXER = RWKV7
