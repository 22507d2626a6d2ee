"""How the next token of one text is chosen, and how likely it was."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sampling:
    """softmax(logits / temperature), narrowed by the other fields; temperature 0 takes the likeliest token.

    `top_k`: the so many likeliest tokens; `top_p`: the fewest likeliest ones that have this probability together;
    `min_p`: those with at least this share of the largest probability. Before, `bias` is added to the logits of its
    tokens, `frequency_penalty` is taken off for every time that the answer has a token already, and
    `presence_penalty` once.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    bias: Mapping[int, float] = field(default_factory=dict)

    @property
    def is_plain(self) -> bool:
        """Whether the likeliest token of the logits as they are is wanted."""
        penalties = self.presence_penalty or self.frequency_penalty
        return self.temperature == 0 and not penalties and not self.bias

    def choose(self, logits: Tensor, answer: Sequence[int], generator: torch.Generator) -> int:
        """The next token, of logits [V] and the tokens of the answer so far."""
        logits = logits.float()
        if self.bias or ((self.presence_penalty or self.frequency_penalty) and answer):
            logits = self._changed(logits, answer)
        if self.temperature == 0:
            return int(logits.argmax())
        # Sorted once, whatever narrows it; ties keep the order of ids.
        logits, tokens = (logits / self.temperature).sort(descending=True, stable=True)
        if self.top_k is not None:
            logits = logits[: self.top_k]
        shares = logits.double().softmax(-1)
        before = shares.cumsum(-1) - shares  # so the likeliest token always stays
        kept = (before < self.top_p) & (shares >= self.min_p * shares[0])
        kept[0] = True
        shares = shares * kept
        total = shares.cumsum(-1)
        drawn = torch.rand((), dtype=torch.float64, generator=generator) * total[-1]
        return int(tokens[int((total <= drawn).sum().clamp_max(int(kept.nonzero().max())))])

    def _changed(self, logits: Tensor, answer: Sequence[int]) -> Tensor:
        logits = logits.clone()
        for token, bias in self.bias.items():
            logits[token] += bias
        if answer:
            tokens, counts = torch.tensor(answer).unique(return_counts=True)
            logits[tokens] -= self.presence_penalty + self.frequency_penalty * counts
        return logits


def likelihood(logits: Tensor, token: int, top: int) -> tuple[float, list[tuple[int, float]]]:
    """log p of a token, and the `top` likeliest tokens with theirs; of the model itself, before any change."""
    shares = logits.float().log_softmax(-1)
    best = shares.topk(min(top, len(shares)))
    pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
    return float(shares[token]), list(pairs)
