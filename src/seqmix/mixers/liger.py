"""Liger attention: a gated recurrence whose decays are made from the pretrained keys, beside a window of attention.

    S_t = exp(g_t) S_{t-1} + f(k_t) v_t^T,   g_t = logsigmoid(k_t) / temperature,   f = softmax over a head's channels
    y_t = W_o (S_t^T f(q_t) + w_t) / 2,      w_t: softmax attention over the last `window` tokens

q, k and v are those of attention, so that no parameter is new; only w_t uses their positions.
Lan et al. 2025 (arXiv:2503.01496), section 3. The pooling that makes gates from keys is the identity where a gate has
as many channels as a key, as here and in the authors' gated linear attention.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor

from seqmix.core.cost import Cost
from seqmix.core.errors import ConfigError
from seqmix.core.numerics import widen
from seqmix.core.state import State
from seqmix.core.tree import Tree
from seqmix.mixers._attention import AttentionConfig, AttentionMixer
from seqmix.mixers._mixer import Mixer
from seqmix.ops import OPERATORS, Case
from seqmix.ops.linear_attention import linear_attention


@dataclass(frozen=True, kw_only=True)
class Config(AttentionConfig):
    window: int = 64
    temperature: float = 16.0  # larger keeps decays nearer to 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.window is None or self.temperature <= 0:
            raise ConfigError(
                f"liger: window={self.window}, temperature={self.temperature}, wanted a window and a temperature "
                "above 0. Use attention to see everything."
            )


class Liger(AttentionMixer):
    """Linear time; state [B, H, K, K], and the last window - 1 keys and values."""

    Config = Config
    config: Config
    operator = None  # two of them
    examples: ClassVar = {
        "grouped": {"heads": 4, "key_heads": 2, "window": 5, "sinks": 1, "qk_norm": True},
        "own_heads": {"head_width": 6, "scale": 0.5, "bias": True, "output_bias": True},
        "long_texts": {"rope_factor": 2.0, "rope_original": 8, "rotary": 0.5},
    }

    def initial_state(self, batch: int, like: Tensor) -> State:
        c = self.config
        recurrent = like.new_zeros(batch, c.heads, c.head_width, c.head_width).float()
        return {"window": super().initial_state(batch, like), "recurrent": recurrent}

    def operands(
        self, x: Tensor, state: State = None, cu_seqlens: Tensor | None = None
    ) -> tuple[dict[str, Any], State]:
        raise ConfigError("Liger joins two operators, so it has no single mixing matrix.")

    def forward(
        self, x: Tensor, state: State = None, *, cu_seqlens: Tensor | None = None
    ) -> tuple[Tensor, State]:
        q, k, v = self.project(x)
        before = {"window": None, "recurrent": None} if state is None else state
        near, window = self.read(q, k, v, before["window"], cu_seqlens)
        shared = self.config.heads // self.config.groups
        gate = F.logsigmoid(widen(k)[0]) / self.config.temperature
        gate, k, v = (part.repeat_interleave(shared, dim=2) for part in (gate, k.softmax(-1), v))
        far, recurrent = linear_attention(
            q.softmax(-1),
            k,
            v,
            gate,
            scale=1.0,
            initial_state=before["recurrent"],
            output_final_state=True,
            cu_seqlens=cu_seqlens,
        )
        y = self.output(((near + far) / 2).flatten(-2))
        return y, {"window": window, "recurrent": recurrent}

    def read_tree(self, x: Tensor, state: State, tree: Tree) -> tuple[Tensor, State]:
        return Mixer.read_tree(self, x, state, tree)  # attention alone is half of it

    def cost(self, length: int, *, context: int = 0) -> Cost:
        c = self.config
        sizes = {"B": 1, "T": length, "H": c.heads, "K": c.head_width, "V": c.head_width}
        far = OPERATORS.get("linear_attention").cost(Case("mixer", sizes, {"gate": "vector"}))
        near = OPERATORS.get("attention").cost(self.operator_case(length, context))
        both = Cost(flops=far.flops + near.flops, bytes=far.bytes + near.bytes)
        return super().cost(length, context=context) + both

    def state_bytes(self, length: int) -> int:
        c = self.config
        return super().state_bytes(length) + 4 * c.heads * c.head_width**2


MIXER = Liger
