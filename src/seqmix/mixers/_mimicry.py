"""Linear attention that mimics softmax attention: what Hedgehog and LAWCAT share.

    y_t = W_o sum_{j <= t} w_tj v_j / sum_{j <= t} w_tj,   w_tj = f(q_t) . d_tj f'(k_j)   with decays d, 1 by default
    f(x) = [softmax(W x), softmax(-W x)]   per head, over its channels; W begins as the identity

Axes: B batch, T time, H heads, G key heads, K head width.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor, nn

from seqmix.core.state import State
from seqmix.mixers._projection import ProjectionConfig, ProjectionMixer, lengths_of, positions_of
from seqmix.ops import Case
from seqmix.ops.linear_attention import linear_attention


class SpikyFeatures(nn.Module):
    """x [B, T, H, K] to [softmax(W x), softmax(-W x)], [B, T, H, 2 K], with a W [K, K] for every head.

    The more a channel stands out, the spikier; the two signs keep what softmax of one alone would lose.
    Zhang et al. 2024 (arXiv:2402.04347), eq. 6; the identity as the beginning: LoLCATs (arXiv:2410.10254), appendix A.
    """

    def __init__(self, heads: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.eye(width).repeat(heads, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        y = torch.einsum("bthk,hfk->bthf", x, self.weight.to(x.dtype))
        return torch.cat([y.softmax(-1), (-y).softmax(-1)], dim=-1)


class MimicMixer(ProjectionMixer):
    """Linear time; state [B, H, 2 K, K + 1] and the number of tokens seen, from which positions follow."""

    config: ProjectionConfig
    operator = "linear_attention"

    def __init__(self, config: ProjectionConfig) -> None:
        super().__init__(config)
        assert config.head_width is not None
        self.query_features = SpikyFeatures(config.heads, config.head_width)
        self.key_features = SpikyFeatures(config.heads, config.head_width)

    def initial_state(self, batch: int, like: Tensor) -> State:
        c = self.config
        recurrent = like.new_zeros(batch, c.heads, 2 * c.head_width, c.head_width + 1).float()
        seen = torch.zeros(batch, dtype=torch.long, device=like.device)
        return {"seen": seen, "recurrent": recurrent}

    @abstractmethod
    def prepare(
        self, x: Tensor, q: Tensor, k: Tensor, state: State, cu_seqlens: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None, dict[str, Any]]:
        """q and k before they turn, log decays of at most 0 or None, and this mixer's own part of the state."""

    def operands(
        self, x: Tensor, state: State = None, cu_seqlens: Tensor | None = None
    ) -> tuple[dict[str, Any], State]:
        c = self.config
        q, k, v = self.project(x)
        q, k, decay, own = self.prepare(x, q, k, state, cu_seqlens)
        seen = None if state is None else state["seen"]
        q, k = self.turn(q, k, positions_of(x, seen, cu_seqlens))
        k, v = (part.repeat_interleave(c.heads // c.groups, dim=2) for part in (k, v))
        arguments = {"q": self.query_features(q), "k": self.key_features(k), "v": v, "g": decay}
        lengths = lengths_of(x, cu_seqlens)
        return {**arguments, "normalize": True}, {
            **own,
            "seen": lengths if seen is None else seen + lengths,
        }

    def forward(
        self, x: Tensor, state: State = None, *, cu_seqlens: Tensor | None = None
    ) -> tuple[Tensor, State]:
        arguments, after = self.operands(x, state, cu_seqlens)
        o, recurrent = linear_attention(
            **arguments,
            initial_state=None if state is None else state["recurrent"],
            output_final_state=True,
            cu_seqlens=cu_seqlens,
        )
        return self.output(o.flatten(-2)), {**after, "recurrent": recurrent}

    def operator_case(self, tokens: int, context: int) -> Case:
        c = self.config
        sizes = {"B": 1, "T": tokens, "H": c.heads, "K": 2 * c.head_width, "V": c.head_width}
        return Case("mixer", sizes, {"normalize": True})
