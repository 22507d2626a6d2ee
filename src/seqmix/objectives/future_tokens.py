"""Future token prediction: from the state vector of a token, a decoder predicts the next N tokens.

    loss = sum_j w_j mean_t -log p(x_{t+j} | s_t, x_{t+1} ... x_{t+j-1}),   w_j = decay^(j-1) / sum_i decay^(i-1)

For `FutureTokenModel`. Walker 2024 (arXiv:2410.18160): tokens further ahead count exponentially less.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from seqmix.core.errors import ConfigError
from seqmix.objectives._objective import (
    Inputs,
    Objective,
    ObjectiveConfig,
    check_shares,
    check_text,
)


@dataclass(frozen=True, kw_only=True)
class Config(ObjectiveConfig):
    ahead: int = 8  # tokens N
    decay: float = 0.8  # of the weight, from a token to the next
    every: int = 4  # tokens from one state that is scored to the next; the first is drawn

    def __post_init__(self) -> None:
        check_shares("future_tokens", decay=self.decay)
        for name in ("ahead", "every"):
            if getattr(self, name) < 1:
                raise ConfigError(
                    f"future_tokens: {name}={getattr(self, name)}, wanted at least 1."
                )


class FutureTokens(Objective):
    """The encoder reads the whole text; every so many of its states are scored."""

    Config: ClassVar = Config

    def inputs(self, ids: Tensor, generator: Generator) -> Inputs:
        c = self.config
        check_text("future_tokens", ids, c.ahead + c.every)
        first = int(torch.randint(c.every, (), generator=generator))
        return {
            "input_ids": ids,
            "places": torch.arange(first, ids.shape[1] - c.ahead, c.every),
        }

    def loss(self, model: Any, inputs: Inputs) -> Tensor:
        """The weighted mean over states and tokens ahead, in nats."""
        ids, places, n = inputs["input_ids"], inputs["places"], self.config.ahead
        states, _ = model.read(ids)
        ahead = ids.unfold(1, n, 1)[:, places + 1].flatten(0, 1)  # [M, N]
        logits = model.logits(states[:, places].flatten(0, 1), ahead[:, :-1])
        losses = F.cross_entropy(logits.flatten(0, 1), ahead.flatten(), reduction="none")
        weights = self.config.decay ** torch.arange(n, dtype=losses.dtype, device=losses.device)
        return losses.view(-1, n).mean(0) @ (weights / weights.sum())


OBJECTIVE = FutureTokens
