"""What claims about tasks share: texts whose end is the answer to their beginning."""

from __future__ import annotations

from typing import Any

import torch
from torch import Generator, Tensor

from seqmix.objectives import TargetObjective, target_logits


class Answer(TargetObjective):
    """The last `tokens` of a text are to be written after what comes before them."""

    def __init__(self, tokens: int) -> None:
        super().__init__()
        self.tokens = tokens

    def inputs(self, ids: Tensor, generator: Generator) -> dict[str, Tensor]:
        return {"source": ids[:, : -self.tokens], "target": ids[:, -self.tokens :]}


@torch.no_grad()
def exactly_right(model: Any, texts: Tensor, tokens: int) -> float:
    """Share of texts after whose beginning every one of the last `tokens` is the likeliest."""
    target = texts[:, -tokens:]
    found = target_logits(model, texts[:, :-tokens], target).argmax(-1)
    return float((found == target).all(1).double().mean())
