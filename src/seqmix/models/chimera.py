"""Chimera: a drafter of two layers that knows what the frozen model has read.

    t_i = W_2 silu(W_1 [E x_{i-2}, E x_{i-1}, E x_i])                     the trigram layer
    q_i = t_i + A_d f_m,   g_i = f_m + q_i + attention(q_i; f_1 ... f_m)   the full-context layer

f_1 ... f_m are the features of the tokens that the model has read, x_i is a guess d = i - m tokens further, and the
model's own embedding E and head turn tokens into vectors and g_i into logits of the token after x_i. Short dependencies
come from the tokens, guesses included, and long ones from the model. A_d, one matrix for every distance, are the
decoding heads. Zeng et al. 2024 (arXiv:2402.15758); there the layer over the context is a whole block of a transformer.

Axes: B rows, T time, Q queries, V vocabulary, D width, H heads.
"""

from __future__ import annotations

from torch import Tensor, nn

from seqmix.core.errors import RangeError
from seqmix.models.hf import SeqmixForCausalLM
from seqmix.ops.attention import attention

TRIGRAM = 3


class Chimera(nn.Module):
    """The two layers for a model, which is left as it is; guesses up to `depth` tokens further than it has read."""

    def __init__(self, base: SeqmixForCausalLM, *, depth: int = 3, heads: int = 4) -> None:
        super().__init__()
        width = base.model.spec.width
        if depth < 1 or width % heads:
            raise RangeError(
                f"depth={depth}, heads={heads}, wanted a depth of at least 1 and heads that divide width={width}."
            )
        self.depth, self.heads = depth, heads
        self.known = [base]  # in a list, so that its weights are none of this module
        self.near = nn.Sequential(
            nn.Linear(TRIGRAM * width, width // 2, bias=False),
            nn.SiLU(),
            nn.Linear(width // 2, width, bias=False),
        )
        self.anchors = nn.ModuleList(nn.Linear(width, width, bias=False) for _ in range(depth))
        self.query = nn.Linear(width, width, bias=False)
        self.key = nn.Linear(width, width, bias=False)
        self.value = nn.Linear(width, width, bias=False)
        self.output = nn.Linear(width, width, bias=False)
        for layer in (self.near[-1], *self.anchors, self.output):
            nn.init.zeros_(
                layer.weight
            )  # at first it guesses what the model would, a few tokens late

    def trigrams(self, ids: Tensor) -> Tensor:
        """t [B, Q, D] of the last three tokens [B, Q, 3], the newest one last."""
        return self.near(self.known[0].model.embedding(ids).flatten(-2))

    def remember(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values [B, T, H, K] of what the model has read, features [B, T, D]."""
        heads = (self.heads, -1)
        return self.key(features).unflatten(-1, heads), self.value(features).unflatten(-1, heads)

    def ahead(
        self, near: Tensor, anchor: Tensor, keys: Tensor, values: Tensor, distance: int
    ) -> Tensor:
        """Logits [B, Q, V] after guesses with t `near [B, Q, D]`, which are `distance` behind `anchor [B, Q, D]`.

        Queries are aligned with the end of the keys [B, T, H, K]: the last one sees all, the one before it all but one.
        """
        q = near + self.anchors[distance - 1](anchor)
        read = attention(self.query(q).unflatten(-1, (self.heads, -1)), keys, values)
        g = anchor + q + self.output(read.flatten(-2))
        logits: Tensor = self.known[0].model.logits(g)
        return logits
