"""What the mixers around the delta rule share: projections, one short convolution, strengths, read-out."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from seqmix.core.errors import ConfigError
from seqmix.core.numerics import widen
from seqmix.core.state import State
from seqmix.layers.convolution import ShortConvolution
from seqmix.layers.initialization import initial_log_rate, initial_step_bias
from seqmix.layers.norm import RMSNorm
from seqmix.mixers._mixer import HeadsConfig, Mixer
from seqmix.ops import Case
from seqmix.ops.delta_rule import delta_rule


@dataclass(frozen=True, kw_only=True)
class DeltaConfig(HeadsConfig):
    key_ratio: float = 1.0  # key width of all heads as a share of the width
    value_expansion: float = 1.0  # value width of a head as a multiple of its key width
    convolution_size: int = 4
    negative_eigenvalues: bool = False  # strengths up to 2: transitions can reflect, not only erase

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.convolution_size < 1:
            raise ConfigError(f"convolution_size={self.convolution_size}, wanted at least 1.")
        if self.key_width < 1 or self.value_width < 1:
            raise ConfigError(
                f"key_ratio={self.key_ratio} and value_expansion={self.value_expansion} leave heads of width "
                f"{self.key_width} and {self.value_width}, wanted at least 1. Make them larger."
            )

    @property
    def key_width(self) -> int:
        return int(self.width * self.key_ratio) // self.heads

    @property
    def value_width(self) -> int:
        return int(self.key_width * self.value_expansion)


class DeltaMixer(Mixer):
    """[q, k, v] = silu(conv([W_q x, W_k x, W_v x])), beta = sigmoid(W_b x); subclasses decay and read out.

    k, v and beta have `steps` rows per token. State: the matrix [B, H, K, V] and the convolution's history.
    """

    operator = "delta_rule"

    def __init__(self, config: DeltaConfig, *, steps: int = 1) -> None:
        super().__init__(config)
        self.steps = steps
        width, keys = config.width, config.key_width * config.heads
        values = config.value_width * config.heads
        self.widths = [keys, keys * steps, values * steps]
        self.query = nn.Linear(width, keys, bias=False)
        self.key = nn.Linear(width, keys * steps, bias=False)
        self.value = nn.Linear(width, values * steps, bias=False)
        self.strength = nn.Linear(width, config.heads * steps, bias=False)
        self.convolution = ShortConvolution(sum(self.widths), config.convolution_size)
        self.norm = RMSNorm(config.value_width, eps=1e-5)
        self.output = nn.Linear(values, width, bias=False)

    @abstractmethod
    def log_decay(self, x: Tensor) -> Tensor | None:
        """[B, T, H], [B, T, H, K] or None."""

    @abstractmethod
    def read_out(self, o: Tensor, x: Tensor) -> Tensor:
        """o [B, T, H, V] of the operator to [B, T, H * V], normalised and gated."""

    def initial_state(self, batch: int, like: Tensor) -> State:
        c = self.config
        return {
            "convolution": self.convolution.initial_state(batch, like),
            "recurrent": like.new_zeros(batch, c.heads, c.key_width, c.value_width).float(),
        }

    def operands(
        self, x: Tensor, state: State = None, cu_seqlens: Tensor | None = None
    ) -> tuple[dict[str, Any], State]:
        mixed = torch.cat([self.query(x), self.key(x), self.value(x)], dim=-1)
        history = None if state is None else state["convolution"]
        mixed, history = self.convolution(mixed, history, cu_seqlens)
        q, k, v = mixed.split(self.widths, dim=-1)
        rows = (self.steps, self.config.heads, -1)
        (strength,) = widen(self.strength(x))
        beta = strength.sigmoid() * (2.0 if self.config.negative_eigenvalues else 1.0)
        return {
            "q": q.unflatten(-1, rows[1:]),
            "k": k.unflatten(-1, rows).flatten(1, 2),
            "v": v.unflatten(-1, rows).flatten(1, 2),
            "beta": beta.unflatten(-1, rows[:2]).flatten(1, 2),
            "g": self.log_decay(x),
            "steps": self.steps,
            "qk_l2norm": True,
        }, {"convolution": history}

    def forward(
        self, x: Tensor, state: State = None, *, cu_seqlens: Tensor | None = None
    ) -> tuple[Tensor, State]:
        arguments, after = self.operands(x, state, cu_seqlens)
        o, recurrent = delta_rule(
            **arguments,
            initial_state=None if state is None else state["recurrent"],
            output_final_state=True,
            cu_seqlens=cu_seqlens,
        )
        return self.output(self.read_out(o, x)), {**after, "recurrent": recurrent}

    def operator_case(self, tokens: int, context: int) -> Case:
        c = self.config
        sizes = {"B": 1, "T": tokens, "H": c.heads, "K": c.key_width, "V": c.value_width}
        return Case("mixer", sizes, {"steps": self.steps})


class DecayRate(nn.Module):
    """g = -exp(A_log) * softplus(a + dt_bias), a [..., H] or [..., H, K] projected from the token.

    A_log, one rate per head, starts between log 1 and log 16; dt_bias so that the softplus starts between
    0.001 and 0.1 (as in Mamba-2). Both are kept from weight decay, and g is computed in float32.
    """

    no_weight_decay: ClassVar = ("A_log", "dt_bias")

    def __init__(self, heads: int, *key_width: int) -> None:
        super().__init__()
        self.A_log = nn.Parameter(initial_log_rate(heads))
        bias = initial_step_bias(torch.Size((heads, *key_width)).numel())
        self.dt_bias = nn.Parameter(bias.reshape(heads, *key_width))

    def forward(self, a: Tensor) -> Tensor:
        a, A_log, dt_bias = widen(a, self.A_log, self.dt_bias)
        rate = A_log.exp().reshape(-1, *[1] * (dt_bias.ndim - 1))
        return -rate * F.softplus(a + dt_bias)
