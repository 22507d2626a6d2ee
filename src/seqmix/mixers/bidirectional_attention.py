"""Bidirectional attention: every token reads an average of all values of its text, the later ones included.

    y_t = W_o sum_j p_tj v_j,   p_tj = softmax_j(q_t . k_j / sqrt(K)),   q and k rotated by their positions

The attention of encoders: Vaswani et al. 2017 (arXiv:1706.03762), section 3.2; Devlin et al. 2019
(arXiv:1810.04805). Its weights are those of `attention`, so the same ones read in one direction or in both.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from seqmix.core.errors import ConfigError
from seqmix.core.state import State
from seqmix.core.tree import Tree
from seqmix.mixers._attention import WHOLE_TEXT, AttentionConfig, AttentionMixer
from seqmix.ops import Case
from seqmix.ops.attention import attention


@dataclass(frozen=True, kw_only=True)
class Config(AttentionConfig):
    """As of `attention`; with a window, t sees the tokens nearer than that on both sides."""


class BidirectionalAttention(AttentionMixer):
    """Quadratic time; no state, for a text is read whole: what comes later would change what was said before."""

    Config = Config
    causal = False
    exceptions: ClassVar = dict.fromkeys(
        (*WHOLE_TEXT, "a_tree_is_read_as_its_paths"),
        "a text is read in one call, or its end is not seen",
    )
    examples: ClassVar = {
        "grouped": {"heads": 4, "key_heads": 2, "qk_norm": True},
        "window": {"window": 5},
        "hard": {"best": 12},  # with few, rounding to bfloat16 changes which they are
        "no_positions": {"rope_base": None},
        "long_texts": {"rope_factor": 2.0, "rope_original": 8},
    }

    def forward(
        self, x: Tensor, state: State = None, *, cu_seqlens: Tensor | None = None
    ) -> tuple[Tensor, State]:
        """x [B, T, D], whole texts, to y [B, T, D] and None; raises `ConfigError` for a state to go on from."""
        if state is not None:
            raise ConfigError(
                "bidirectional_attention: `state` was given, but a text that is read in both directions has "
                "to be read in one call. Leave out the state, or use attention or prefix_attention."
            )
        arguments, _ = self.operands(x, None, cu_seqlens)
        o = attention(**arguments, cu_seqlens=cu_seqlens)
        return self.output(o.flatten(-2)), None

    def read_tree(self, x: Tensor, state: State, tree: Tree) -> tuple[Tensor, State]:
        return self.step(x, state)

    def step(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        raise ConfigError(
            "bidirectional_attention cannot read a text token by token. Call it on the whole text."
        )

    def initial_state(self, batch: int, like: Tensor) -> State:
        return None

    def state_bytes(self, length: int) -> int:
        return 0

    def operator_case(self, tokens: int, context: int) -> Case:
        case = super().operator_case(tokens, context)
        return Case(case.name, case.sizes, {**case.options, "causal": False})

    def _visibility(self) -> dict[str, Any]:
        return super()._visibility() | {"causal": False}


MIXER = BidirectionalAttention
