"""A memory passed from window to window, added to a pretrained decoder by fine-tuning.

    f_i = decoder([m_i, x_i]),   m_{i+1} = W_2 gelu(W_1 mean_t f_{i,t} + b_1) + b_2,   m_0 as from f = 0

A text is read in windows x_i. What is passed on is one vector, so time is linear in the length of the text, and the
state does not grow. The thesis gives the vector to an attention layer as one more key and value; here it stands before
the window as one more embedded token, which every layer of every mixer reads, and nothing inside the decoder changes.
Yoshida 2024 (arXiv:2408.16241), chapter on recurrence; Yoshida et al. 2020 (arXiv:2008.07027), section 3.

Axes: B batch, T time, D width, V vocabulary.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from seqmix.core.cost import Cost
from seqmix.core.errors import RangeError, ShapeError
from seqmix.linears import linear_cost
from seqmix.models.hf import SeqmixForCausalLM


class Recurrent(nn.Module):
    """A causal language model that reads windows of `window` tokens and passes one vector [B, D] from each to the next.

    The weights of `model` are shared, not copied. The new layers start so that the memory is zero. Raises `RangeError`
    for a window below 1.
    """

    def __init__(self, model: SeqmixForCausalLM, *, window: int) -> None:
        super().__init__()
        if window < 1:
            raise RangeError(f"window={window}, wanted at least 1.")
        width = model.config.hidden_size
        self.window = window
        self.decoder = model.model
        self.memory = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, width))
        nn.init.zeros_(self.memory[2].weight)
        nn.init.zeros_(self.memory[2].bias)

    def forward(self, ids: Tensor, memory: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Logits [B, T, V] of ids [B, T], whole windows and a last shorter one, and the memory [B, D] after them."""
        decoder = self.decoder
        if memory is None:
            memory = self.memory(decoder.embedding.weight.new_zeros(len(ids), self.width))
        logits = []
        for window in ids.split(self.window, dim=1):
            x = torch.cat([memory.unsqueeze(1), decoder.embedding(window)], dim=1)
            features, _ = decoder.backbone(x)
            features = features[:, 1:]
            logits.append(decoder.logits(features))
            memory = self.memory(features.mean(dim=1))
        return torch.cat(logits, dim=1), memory

    def loss(self, ids: Tensor) -> Tensor:
        """The mean cross-entropy in nats of every token of ids [B, T] but the first."""
        if ids.ndim != 2 or ids.shape[1] < 2:
            raise ShapeError(
                f"`ids` has shape {list(ids.shape)}, wanted [B, T] with T of 2 or more."
            )
        logits, _ = self(ids[:, :-1])
        return F.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten())

    @property
    def width(self) -> int:
        return int(self.memory[0].in_features)

    def cost(self, length: int) -> Cost:
        """Predicted cost of reading `length` tokens of one text in float32, with the state of a window at its end."""
        whole, rest = divmod(length, self.window)
        total = Cost()
        for tokens in [self.window] * whole + [rest] * (rest > 0):
            cost = self.decoder.cost(tokens + 1)
            new = sum((linear_cost(layer, 1) for layer in self.memory), Cost())
            total += Cost(flops=cost.flops, bytes=cost.bytes) + new
        return total + Cost(state_bytes=self.decoder.cost(min(length, self.window) + 1).state_bytes)
