"""Linear attention: softmax attention with the exponential replaced by a product of feature maps.

    y_t = W_o o_t,   o_t = S_t^T f(q_t) / (z_t . f(q_t)),   S_t = S_{t-1} + f(k_t) v_t^T,   z_t = z_{t-1} + f(k_t)

Without `normalize` the division gives way to a norm of S_t^T f(q_t) per head. With `convolution_size` W, a
depthwise convolution of the values over the last W tokens is added to o_t, which sees what lies near.
Katharopoulos et al. 2020 (arXiv:2006.16236), eq. 7-12; the norm: Qin et al. 2022 (arXiv:2210.10340). Simplified linear
attention is `linear_attention(feature_map=relu, convolution_size=5)`: Guo et al. 2024 (arXiv:2405.11582), section 3.3;
there all heads share the convolution's weights, and it is over an image.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from seqmix.core.errors import ConfigError
from seqmix.core.state import State
from seqmix.core.tree import Tree
from seqmix.layers.convolution import ShortConvolution
from seqmix.layers.norm import RMSNorm
from seqmix.mixers._mixer import HeadsConfig, Mixer
from seqmix.ops import Case
from seqmix.ops.linear_attention import linear_attention, linear_attention_on_tree

FEATURE_MAPS: dict[str, Callable[[Tensor], Tensor]] = {
    "elu1": lambda x: F.elu(x) + 1,
    "relu": F.relu,
    "squared_relu": lambda x: F.relu(x).square(),
    "softmax": lambda x: F.softmax(x, dim=-1),
    "identity": lambda x: x,
}


@dataclass(frozen=True, kw_only=True)
class Config(HeadsConfig):
    feature_map: str = "elu1"
    normalize: bool = True  # divide by the sum of the weights; otherwise a norm per head
    convolution_size: int | None = None  # tokens of the convolution of the values; none without
    bias: bool = False  # of queries, keys and values

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.feature_map not in FEATURE_MAPS:
            raise ConfigError(
                f"linear_attention: feature_map={self.feature_map!r}, wanted one of "
                f"{', '.join(FEATURE_MAPS)}."
            )
        if self.normalize and self.feature_map == "identity":
            raise ConfigError(
                "linear_attention: feature_map='identity' gives weights of either sign, whose sum may "
                "vanish. Pass normalize=False, or a feature map that is not negative."
            )
        if self.convolution_size is not None and self.convolution_size < 1:
            raise ConfigError(
                f"linear_attention: convolution_size={self.convolution_size}, wanted at least 1, or none."
            )


class LinearAttention(Mixer):
    """Linear time; state [B, H, K, V], with one more column if normalised, and the convolution's [B, W-1, D]."""

    Config = Config
    operator = "linear_attention"
    examples: ClassVar = {
        "relu": {"feature_map": "relu"},
        "softmax": {"feature_map": "softmax"},
        "norm": {"feature_map": "identity", "normalize": False},
        "simplified": {"feature_map": "relu", "convolution_size": 5, "bias": True},
    }

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        width, bias, size = config.width, config.bias, config.convolution_size
        self.query = nn.Linear(width, width, bias=bias)
        self.key = nn.Linear(width, width, bias=bias)
        self.value = nn.Linear(width, width, bias=bias)
        self.convolution = None if size is None else ShortConvolution(width, size, activation=None)
        self.norm = None if config.normalize else RMSNorm(config.head_width, eps=1e-5)
        self.output = nn.Linear(width, width, bias=False)

    def initial_state(self, batch: int, like: Tensor) -> State:
        c = self.config
        shape = (batch, c.heads, c.head_width, c.head_width + c.normalize)
        state = {"recurrent": like.new_zeros(shape).float()}
        if self.convolution is not None:
            state["convolution"] = self.convolution.initial_state(batch, like)
        return state

    def operands(
        self, x: Tensor, state: State = None, cu_seqlens: Tensor | None = None
    ) -> tuple[dict[str, Any], State]:
        heads = (self.config.heads, -1)
        feature_map = FEATURE_MAPS[self.config.feature_map]
        return {
            "q": feature_map(self.query(x).unflatten(-1, heads)),
            "k": feature_map(self.key(x).unflatten(-1, heads)),
            "v": self.value(x).unflatten(-1, heads),
            "normalize": self.config.normalize,
        }, None

    def forward(
        self, x: Tensor, state: State = None, *, cu_seqlens: Tensor | None = None
    ) -> tuple[Tensor, State]:
        arguments, _ = self.operands(x, state, cu_seqlens)
        o, recurrent = linear_attention(
            **arguments,
            initial_state=None if state is None else state["recurrent"],
            output_final_state=True,
            cu_seqlens=cu_seqlens,
        )
        o = (o if self.norm is None else self.norm(o)).flatten(-2)
        after = {"recurrent": recurrent}
        if self.convolution is not None:
            before = None if state is None else state["convolution"]
            near, after["convolution"] = self.convolution(
                arguments["v"].flatten(-2), before, cu_seqlens
            )
            o = o + near
        return self.output(o), after

    def read_tree(self, x: Tensor, state: State, tree: Tree) -> tuple[Tensor, State]:
        arguments, _ = self.operands(x)
        before = None if state is None else state["recurrent"]
        o, recurrent = linear_attention_on_tree(tree, **arguments, initial_state=before)
        o = (o if self.norm is None else self.norm(o)).flatten(-2)
        after = {"recurrent": recurrent}
        if self.convolution is not None:
            history = None if state is None else state["convolution"]
            near, after["convolution"] = self.convolution.read_tree(
                arguments["v"].flatten(-2), history, tree
            )
            o = o + near
        return self.output(o), after

    def operator_case(self, tokens: int, context: int) -> Case:
        c = self.config
        sizes = {"B": 1, "T": tokens, "H": c.heads, "K": c.head_width}
        return Case("mixer", {**sizes, "V": c.head_width + c.normalize})


MIXER = LinearAttention
