"""Cross-attention: every token of a text reads an average of the values of another one, the memory.

    y_t = W_o sum_s p_ts v_s,   p_ts = softmax_s(q_t . k_s / sqrt(K)),   q = W_q x,   k, v = W_k m, W_v m

x are the features of the text, m those of the memory (Vaswani et al. 2017, arXiv:1706.03762, section 3.2.3). The
memory's keys and values are the state: `remember` makes it, and tokens leave it as it is, so forking, reordering
and saving work as for any state. Not in the registry of mixers, for it needs a second text.
Axes: B batch (N rows of packed texts), T tokens, S tokens of the memory, H heads, K head width, D width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from seqmix.core.errors import ConfigError
from seqmix.core.state import State
from seqmix.mixers._attention import Ragged
from seqmix.mixers._mixer import HeadsConfig, Mixer
from seqmix.ops.attention import attention


class CrossAttention(Mixer):
    """Linear time in either text; the state is as large as the memory."""

    Config = HeadsConfig

    def __init__(self, config: HeadsConfig) -> None:
        super().__init__(config)
        width = config.width
        self.query = nn.Linear(width, width, bias=False)
        self.key = nn.Linear(width, width, bias=False)
        self.value = nn.Linear(width, width, bias=False)
        self.output = nn.Linear(width, width, bias=False)

    def remember(self, memory: Tensor, mask: Tensor | None = None) -> State:
        """The state from the features [B, S, D] of a text, of which `mask` [B, S] marks with 0 what is padding."""
        heads = (self.config.heads, -1)
        visible = torch.ones(memory.shape[:2], dtype=torch.bool, device=memory.device)
        return {
            "keys": self.key(memory).unflatten(-1, heads),
            "values": self.value(memory).unflatten(-1, heads),
            "visible": visible if mask is None else mask != 0,
        }

    def forward(
        self, x: Tensor, state: State = None, *, cu_seqlens: Tensor | None = None
    ) -> tuple[Tensor, State]:
        """x [B, T, D] and a memory's state to y [B, T, D] and the same state; `ConfigError` without a memory."""
        if state is None:
            raise ConfigError(
                "cross-attention: there is no memory to read. Start from the state that `remember` gives."
            )
        q = self.query(x).unflatten(-1, (self.config.heads, -1))
        texts = None if cu_seqlens is None else Ragged.of(x, cu_seqlens)
        if texts is not None:
            q = texts.unpack(q)
        bias, visible = None, state["visible"]
        if not bool(visible.all()):
            bias = q.new_zeros(visible.shape).masked_fill(~visible, -torch.inf)[:, None, None]
        o = attention(q, state["keys"], state["values"], causal=False, bias=bias)
        if texts is not None:
            o = texts.pack(o)
        return self.output(o.flatten(-2)), state

    def initial_state(self, batch: int, like: Tensor) -> State:
        """None: what it starts from is a memory, see `remember`."""
        return None

    def state_bytes(self, length: int) -> int:
        return 0  # it does not grow with the text; what the memory takes, its length decides
