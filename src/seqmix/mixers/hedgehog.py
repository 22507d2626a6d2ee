"""Hedgehog: linear attention whose feature map is trained to give the weights of softmax attention.

    y_t = W_o sum_{j <= t} w_tj v_j / sum_{j <= t} w_tj,   w_tj = f(q_t) . f'(k_j)
    f(x) = [softmax(W x), softmax(-W x)]   per head, over its channels; f' is another of this form

With a window of W tokens, those nearer than W have weights of softmax attention instead, under the same normaliser:

    w_tj = sigmoid(g) exp(s_tj - max_i s_ti),   s_tj = scale q_t . k_j   for  t - W < j <= t,   i in the same range

g is learned, one number per head. A window as long as the text is softmax attention.
Zhang et al. 2024 (arXiv:2402.04347), section 4; queries and keys turn before the feature map, as in the authors'
conversion of Llama. The window: Zhang et al. 2024 (LoLCATs, arXiv:2410.10254), section 3.2; its weight and how that
begins are those of the authors' code.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from seqmix.core.cost import Cost
from seqmix.core.errors import ConfigError
from seqmix.core.numerics import widen
from seqmix.core.state import State
from seqmix.mixers._mimicry import MimicMixer
from seqmix.mixers._projection import ProjectionConfig, positions_of
from seqmix.mixers._recent import Timeline
from seqmix.ops import OPERATORS, Case
from seqmix.ops.linear_attention import EPSILON, linear_attention

FIRST_GATE = -2.2  # g at first: a weight of 0.1


@dataclass(frozen=True, kw_only=True)
class Config(ProjectionConfig):
    window: int = 0  # last tokens with weights of softmax attention; 0 for none
    scale: float | None = None  # of their scores; head_width**-0.5 if none

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.window < 0:
            raise ConfigError(
                f"hedgehog: window={self.window}, wanted a number of tokens, or 0 for no window."
            )


class Hedgehog(MimicMixer):
    """Linear time; state [B, H, 2 K, K + 1], the number of tokens seen, and the keys and values of the window."""

    Config = Config
    config: Config
    examples: ClassVar = {
        "grouped": {"heads": 4, "key_heads": 2, "qk_norm": True, "rope_base": None},
        "own_heads": {"head_width": 6, "bias": True, "output_bias": True},
        "long_texts": {"rope_factor": 2.0, "rope_original": 8, "rotary": 0.5},
        "window": {"heads": 4, "key_heads": 2, "window": 5, "scale": 0.5},
        "one_token": {"window": 1, "qk_norm": True},
    }

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        if config.window:
            self.operator = None  # two ways of reading
            self.window_gate = nn.Parameter(torch.full((config.heads,), FIRST_GATE))

    def initial_state(self, batch: int, like: Tensor) -> State:
        c, state = self.config, super().initial_state(batch, like)
        if not c.window:
            return state
        empty = like.new_zeros(batch, c.window, c.groups, c.head_width)
        return {**state, "keys": empty, "values": empty.clone()}

    def prepare(
        self, x: Tensor, q: Tensor, k: Tensor, state: State, cu_seqlens: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None, dict[str, Any]]:
        return q, k, None, {}

    def operands(
        self, x: Tensor, state: State = None, cu_seqlens: Tensor | None = None
    ) -> tuple[dict[str, Any], State]:
        if self.config.window:
            raise ConfigError(
                "Hedgehog with a window reads in two ways, so it has no single operator."
            )
        return super().operands(x, state, cu_seqlens)

    def forward(
        self, x: Tensor, state: State = None, *, cu_seqlens: Tensor | None = None
    ) -> tuple[Tensor, State]:
        c = self.config
        if not c.window:
            return super().forward(x, state, cu_seqlens=cu_seqlens)
        q, k, v = self.project(x)
        seen = None if state is None else state["seen"]
        q, k = self.turn(q, k, positions_of(x, seen, cu_seqlens))
        texts = Timeline(c.window, x, seen, cu_seqlens)
        if state is None:
            state = self.initial_state(len(texts.seen_after), k)
        keys, values = texts.join(state["keys"], k), texts.join(state["values"], v)

        scale = c.head_width**-0.5 if c.scale is None else c.scale
        near, near_total = texts.read(q, keys, values, scale)
        there = texts.delayed(texts.filled).unsqueeze(-1)  # [B, T, 1]: a token has left the window
        old, read = (
            texts.delayed(entries).repeat_interleave(c.heads // c.groups, dim=2)
            for entries in (keys, values)
        )
        features = self.key_features(old) * there.unsqueeze(-1)
        ones = there.unsqueeze(-1).expand(*read.shape[:-1], 1).to(read.dtype)
        both, recurrent = linear_attention(
            *widen(self.query_features(q), features, torch.cat([read, ones], dim=-1)),
            scale=1.0,
            initial_state=state["recurrent"],
            output_final_state=True,
            cu_seqlens=cu_seqlens,
        )
        far, far_total = both[..., :-1], both[..., -1:]
        share = self.window_gate.to(near.dtype).sigmoid().unsqueeze(-1)
        o = (share * near + far) / (share * near_total + far_total + EPSILON)
        after = {"seen": texts.seen_after, "recurrent": recurrent}
        return self.output(o.to(v.dtype).flatten(-2)), {
            **after,
            "keys": texts.hold(keys),
            "values": texts.hold(values),
        }

    def cost(self, length: int, *, context: int = 0) -> Cost:
        cost = super().cost(length, context=context)
        c = self.config
        if not c.window:
            return cost
        far = OPERATORS.get("linear_attention").cost(self.operator_case(length, context))
        sizes = {"B": 1, "T": length, "S": length + c.window, "H": c.heads, "G": c.groups}
        sizes |= {"K": c.head_width, "V": c.head_width}
        near = OPERATORS.get("attention").cost(Case("mixer", sizes, {"window": c.window}))
        return cost + Cost(flops=far.flops + near.flops, bytes=far.bytes + near.bytes)


MIXER = Hedgehog
