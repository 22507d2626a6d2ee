"""A short causal convolution with its own weights, as most recurrent mixers put before their operator."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from seqmix.core.tree import Tree
from seqmix.ops.short_convolution import short_convolution


class ShortConvolution(nn.Module):
    """y_t = f(sum_i weight[:, W-1-i] x_{t-i} + bias) per channel; the state is the last W-1 inputs, [B, W-1, D]."""

    def __init__(
        self, width: int, size: int = 4, *, bias: bool = False, activation: str | None = "silu"
    ) -> None:
        super().__init__()
        self.size = size
        self.activation = activation
        self.weight = nn.Parameter(torch.randn(width, size) * size**-0.5)
        self.bias = nn.Parameter(torch.zeros(width)) if bias else None

    def initial_state(self, batch: int, like: Tensor) -> Tensor:
        """Zeros [B, W-1, D]."""
        return like.new_zeros(batch, self.size - 1, self.weight.shape[0]).float()

    def forward(
        self, x: Tensor, state: Tensor | None = None, cu_seqlens: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """x [B, T, D] to y [B, T, D] and the state after x."""
        y, state = short_convolution(
            x,
            self.weight,
            self.bias,
            activation=self.activation,
            initial_state=state,
            output_final_state=True,
            cu_seqlens=cu_seqlens,
        )
        assert state is not None
        return y, state

    def read_tree(self, x: Tensor, state: Tensor | None, tree: Tree) -> tuple[Tensor, Tensor]:
        """x [B, n + T, D], n tokens and the nodes after them, to y [B, n + T, D] and the state after the n tokens.

        Every node is read behind the W-1 inputs before it on its path, as a text of W tokens.
        """
        trunk = x.shape[1] - len(tree)
        y, state = self(x[:, :trunk], state)
        reach = self.size - 1
        known = torch.cat([state.to(x.dtype), x[:, trunk:]], dim=1)  # [B, W - 1 + T, D]
        before = [tree.before(node, reach) for node in range(len(tree))]
        places = reach + torch.tensor(before, dtype=torch.long, device=x.device)
        history = known[:, places].flatten(0, 1)  # [B * T, W - 1, D]
        branches, _ = self(x[:, trunk:].flatten(0, 1).unsqueeze(1), history)
        return torch.cat([y, branches.view(x.shape[0], len(tree), -1)], dim=1), state

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, size={self.size}, activation={self.activation}"
