"""HGRN-2: a gated recurrence whose forget gate also says how much is written.

    f_t = b + (1 - b) sigmoid(W_f x_t),   S_t = f_t S_{t-1} + (1 - f_t) v_t^T,   y_t = W_o norm(S_t^T silu(W_q x_t))

The lower bound b makes a layer remember at least so much from token to token. The paper learns one per
layer, rising from 0 with depth; here it is a field, by default the mean of the paper's bounds at the start,
and a layout may raise it from block to block.
Qin et al. 2024 (arXiv:2404.07904), section 3.2; the bound: Qin et al. 2023 (arXiv:2311.04823), eq. 5.
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
from seqmix.core.tree import Tree
from seqmix.layers.norm import RMSNorm
from seqmix.mixers._mixer import HeadsConfig, Mixer
from seqmix.ops import Case
from seqmix.ops.linear_attention import linear_attention, linear_attention_on_tree


@dataclass(frozen=True, kw_only=True)
class Config(HeadsConfig):
    lower_bound: float = 0.5  # of the forget gate
    expansion: float = 1.0  # of the state: key width as a multiple of the value width

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.lower_bound < 1:
            raise ConfigError(
                f"hgrn2: lower_bound={self.lower_bound}, wanted at least 0 and below 1 (1 never forgets)."
            )

    @property
    def key_width(self) -> int:
        return max(1, round(self.head_width * self.expansion))


class HGRN2(Mixer):
    """Linear time; state [B, H, K, V]."""

    Config = Config
    operator = "linear_attention"
    examples: ClassVar = {"any_memory": {"lower_bound": 0.0}, "wide_keys": {"expansion": 1.5}}

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        width, keys = config.width, config.key_width * config.heads
        self.query = nn.Linear(width, keys, bias=False)
        self.forget = nn.Linear(width, keys, bias=False)
        self.value = nn.Linear(width, width, bias=False)
        self.norm = RMSNorm(width, eps=1e-5)
        self.output = nn.Linear(width, width, bias=False)

    def initial_state(self, batch: int, like: Tensor) -> State:
        c = self.config
        shape = (batch, c.heads, c.key_width, c.head_width)
        return {"recurrent": like.new_zeros(shape).float()}

    def operands(
        self, x: Tensor, state: State = None, cu_seqlens: Tensor | None = None
    ) -> tuple[dict[str, Any], State]:
        heads, bound = (self.config.heads, -1), self.config.lower_bound
        (forget,) = widen(self.forget(x).unflatten(-1, heads))
        log_forget = F.logsigmoid(forget)
        if bound > 0:  # log(b + (1 - b) sigmoid), without leaving logarithms
            log_bound = torch.tensor([bound, 1 - bound], dtype=forget.dtype, device=x.device).log()
            log_forget = torch.logaddexp(log_bound[0], log_bound[1] + log_forget)
        return {
            "q": F.silu(self.query(x)).unflatten(-1, heads),
            "k": (1 - bound) * torch.sigmoid(-forget),
            "v": self.value(x).unflatten(-1, heads),
            "g": log_forget.clamp_max(0),  # rounding may leave a gate just above 1
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
        return self.output(self.norm(o.flatten(-2))), {"recurrent": recurrent}

    def read_tree(self, x: Tensor, state: State, tree: Tree) -> tuple[Tensor, State]:
        arguments, _ = self.operands(x)
        before = None if state is None else state["recurrent"]
        o, recurrent = linear_attention_on_tree(tree, **arguments, initial_state=before)
        return self.output(self.norm(o.flatten(-2))), {"recurrent": recurrent}

    def operator_case(self, tokens: int, context: int) -> Case:
        c = self.config
        sizes = {"B": 1, "T": tokens, "H": c.heads, "K": c.key_width, "V": c.head_width}
        return Case("mixer", sizes, {"gate": "vector"})


MIXER = HGRN2
