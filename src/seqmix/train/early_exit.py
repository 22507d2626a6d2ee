"""Training of early exits by the whole model, which is left as it is.

    loss = sum over exits of mean_t [ KL(p_t || p'_t) + BCE(c_t, [argmax p_t = argmax p'_t]) ]

p_t are the model's probabilities of the next token, p'_t those of an exit, c_t its confidence.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from seqmix.models.early_exit import EarlyExits
from seqmix.objectives import Objective
from seqmix.train.objective import train_objective
from seqmix.train.parameters import frozen
from seqmix.train.plan import Record


class Agreement(Objective):
    """For `EarlyExits`: they say what the whole model says, and where they do."""

    def inputs(self, ids: Tensor, generator: Generator) -> dict[str, Tensor]:
        return {"ids": ids}

    def loss(self, model: Any, inputs: dict[str, Tensor]) -> Tensor:
        head = model.known[0].model.logits
        with torch.no_grad():
            hidden, features = model.hidden(inputs["ids"])
            wanted = head(features).float().log_softmax(-1)
        losses = []
        for each, h in zip(model.exits, hidden, strict=True):
            features, confidence, _ = each(h)
            logs = head(features).float().log_softmax(-1)
            same = (logs.argmax(-1) == wanted.argmax(-1)).float()
            apart = F.kl_div(logs, wanted, log_target=True, reduction="none").sum(-1).mean()
            losses.append(apart + F.binary_cross_entropy_with_logits(confidence.float(), same))
        return torch.stack(losses).sum()


def train_exits(exits: EarlyExits, windows: Tensor, *, steps: int, **training: Any) -> Record:
    """Trains the exits on windows [N, T] of token ids.

    The other arguments are those of `seqmix.train.objective.train_objective`.
    """
    with frozen(exits.known[0]):
        return train_objective(
            exits,  # type: ignore[arg-type]
            windows,
            Agreement(),
            steps=steps,
            **training,
        )
