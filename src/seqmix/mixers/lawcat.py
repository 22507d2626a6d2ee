"""LAWCAT: linear attention with a short convolution across tokens on queries and keys, decays and a normaliser.

    q', k' = conv(q), conv(k)                          causal, per channel, `convolution_size` tokens
    S_t = exp(g_t) S_{t-1} + f'(k'_t) v_t^T,           z_t = exp(g_t) z_{t-1} + f'(k'_t)
    y_t = W_o S_t^T f(q'_t) / (z_t . f(q'_t)),         g_t = logsigmoid(W_g x_t + b) / temperature   per head

Liu et al. 2025 (arXiv:2509.18467). The abstract names the causal convolution and the normalised gated linear
attention; the rest is our reading: depthwise convolutions that begin as the identity, the feature maps of Hedgehog,
decays per head whose bias begins near no decay, positions turned after the convolution.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from seqmix.core.errors import ConfigError
from seqmix.core.numerics import widen
from seqmix.core.state import State
from seqmix.layers.convolution import ShortConvolution
from seqmix.mixers._mimicry import MimicMixer
from seqmix.mixers._projection import ProjectionConfig
from seqmix.ops import Case

FIRST_BIAS = 4.0  # a decay of exp(-0.018 / temperature) per token


@dataclass(frozen=True, kw_only=True)
class Config(ProjectionConfig):
    convolution_size: int = 4
    temperature: float = 16.0  # larger keeps decays nearer to 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.convolution_size < 1 or self.temperature <= 0:
            raise ConfigError(
                f"lawcat: convolution_size={self.convolution_size}, temperature={self.temperature}, wanted at least "
                "1 token and a temperature above 0."
            )


class Lawcat(MimicMixer):
    """Linear time; state [B, H, 2 K, K + 1], the histories of two convolutions and the number of tokens seen."""

    Config = Config
    config: Config
    no_weight_decay: ClassVar = ("decay_bias",)
    examples: ClassVar = {
        "grouped": {"heads": 4, "key_heads": 2, "qk_norm": True, "convolution_size": 3},
        "own_heads": {"head_width": 6, "bias": True, "output_bias": True},
        "long_texts": {"rope_factor": 2.0, "rope_original": 8, "rotary": 0.5},
    }

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.query_convolution = _identity(self.query.out_features, config.convolution_size)
        self.key_convolution = _identity(self.key.out_features, config.convolution_size)
        self.decay = nn.Linear(config.width, config.heads, bias=False)
        self.decay_bias = nn.Parameter(torch.full((config.heads,), FIRST_BIAS))

    def initial_state(self, batch: int, like: Tensor) -> State:
        return {
            "query": self.query_convolution.initial_state(batch, like),
            "key": self.key_convolution.initial_state(batch, like),
            **super().initial_state(batch, like),
        }

    def prepare(
        self, x: Tensor, q: Tensor, k: Tensor, state: State, cu_seqlens: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None, dict[str, Any]]:
        before = {"query": None, "key": None} if state is None else state
        query, key = (
            convolution(part.flatten(-2), before[name], cu_seqlens)
            for name, part, convolution in (
                ("query", q, self.query_convolution),
                ("key", k, self.key_convolution),
            )
        )
        logits, bias = widen(self.decay(x), self.decay_bias)
        decay = F.logsigmoid(logits + bias) / self.config.temperature
        own = {"query": query[1], "key": key[1]}
        return query[0].view_as(q), key[0].view_as(k), decay, own

    def operator_case(self, tokens: int, context: int) -> Case:
        case = super().operator_case(tokens, context)
        return Case("mixer", case.sizes, {**case.options, "gate": "scalar"})


def _identity(width: int, size: int) -> ShortConvolution:
    """A convolution that passes every token through as it is."""
    convolution = ShortConvolution(width, size, activation=None)
    with torch.no_grad():
        convolution.weight.zero_()
        convolution.weight[:, -1] = 1.0
    return convolution


MIXER = Lawcat
