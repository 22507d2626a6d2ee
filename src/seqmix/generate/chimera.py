"""Trees of guesses of a trained Chimera (`seqmix.models.chimera`), which reads the model's own features."""

from __future__ import annotations

import torch
from torch import Tensor

from seqmix.core.errors import RangeError
from seqmix.generate._method import Task
from seqmix.generate.speculative_tree import Guesses, Shape, TreeDraft, TreeDrafter, grow
from seqmix.models.chimera import TRIGRAM, Chimera


class ChimeraTree(TreeDrafter):
    """The likeliest continuations under a trained `Chimera`."""

    def __init__(self, drafter: Chimera, shape: Shape | None = None) -> None:
        self.drafter = drafter
        self.shape = shape or Shape(depth=drafter.depth)
        if self.shape.depth > drafter.depth:
            raise RangeError(
                f"shape.depth={self.shape.depth}, and the drafter is trained for {drafter.depth}. Give it as depth "
                "of the drafter before training."
            )

    def start(self, task: Task) -> TreeDraft:
        return _ChimeraDraft(self.drafter, self.shape, task.prompt[0].tolist())


class _ChimeraDraft(TreeDraft):
    def __init__(self, drafter: Chimera, shape: Shape, prompt: list[int]) -> None:
        self.drafter, self.shape = drafter, shape
        self.prompt = prompt[:1] * (TRIGRAM - 1) + prompt  # there are three tokens at any time
        self.keys: Tensor | None = None
        self.values: Tensor | None = None

    def guess(self, written: list[int], features: Tensor) -> Guesses:
        anchor = features[None, -1:]
        keys, values = self.drafter.remember(features.unsqueeze(0))
        if self.keys is not None and self.values is not None:
            keys = torch.cat([self.keys, keys], dim=1)
            values = torch.cat([self.values, values], dim=1)
        self.keys, self.values = keys, values
        level = [(self.prompt + written)[-TRIGRAM:]]
        distance = 0

        def logits() -> Tensor:
            nonlocal distance
            distance += 1
            rows = len(level)
            near = self.drafter.trigrams(torch.tensor(level, device=features.device).unsqueeze(1))
            known, held, read = (x.expand(rows, *x.shape[1:]) for x in (anchor, keys, values))
            return self.drafter.ahead(near, known, held, read, distance)[:, -1]

        def extend(rows: list[int], tokens: list[int]) -> Tensor:
            nonlocal level
            level = [[*level[row][1:], token] for row, token in zip(rows, tokens, strict=True)]
            return logits()

        return grow(self.shape, logits(), extend)
