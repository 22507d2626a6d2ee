"""Training of Chimera drafters: what the frozen model says of its own text, learned at every distance."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from seqmix.models.chimera import TRIGRAM, Chimera
from seqmix.objectives import Objective
from seqmix.train.objective import train_objective
from seqmix.train.parameters import frozen
from seqmix.train.plan import Record


class _Distillation(Objective):
    """Cross-entropy with the model's own next token distribution, at every distance; windows are numbers of rows."""

    def __init__(self, ids: Tensor, features: Tensor) -> None:
        super().__init__()
        self.rows, self.features = ids, features

    def inputs(self, ids: Tensor, generator: Generator) -> dict[str, Tensor]:
        rows = ids.flatten()
        return {"ids": self.rows[rows], "features": self.features[rows]}

    def loss(self, model: Any, inputs: dict[str, Tensor]) -> Tensor:
        ids, features = inputs["ids"], inputs["features"]
        length = ids.shape[1]
        with torch.no_grad():
            wanted = model.known[0].model.logits(features).softmax(-1)
        near = model.trigrams(ids.unfold(1, TRIGRAM, 1))  # from the third token on
        keys, values = model.remember(features)
        losses = []
        for distance in range(1, model.depth + 1):
            first, seen = max(distance, TRIGRAM - 1), length - distance
            logits = model.ahead(
                near[:, first - TRIGRAM + 1 :],
                features[:, first - distance : seen],
                keys[:, :seen],
                values[:, :seen],
                distance,
            )
            losses.append(F.cross_entropy(logits.flatten(0, 1), wanted[:, first:].flatten(0, 1)))
        return torch.stack(losses).mean()


def train_chimera(drafter: Chimera, windows: Tensor, *, steps: int, **training: Any) -> Record:
    """Trains the drafter on windows [N, T] of token ids, of which the frozen model reads each once.

    The other arguments are those of `seqmix.train.objective.train_objective`.
    """
    model = drafter.known[0].model
    with torch.no_grad():
        parts = [
            model.backbone(model.embedding(part))[0]
            for part in windows.split(training.get("batch", 16))
        ]
    objective = _Distillation(windows, torch.cat(parts))
    with frozen(model):
        return train_objective(
            drafter,  # type: ignore[arg-type]
            torch.arange(len(windows)).unsqueeze(1),
            objective,
            steps=steps,
            **training,
        )
