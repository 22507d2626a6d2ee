"""Induction heads: a special token occurs once, and again at the end: recall what followed it.

From arXiv:2312.00752: a vocabulary of 16, training length 256, test lengths from 2^6 to 2^20.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from seqmix.core.errors import ConfigError
from seqmix.data.packing import IGNORED
from seqmix.tasks._task import Task, TaskConfig


@dataclass(frozen=True, kw_only=True)
class Config(TaskConfig):
    length: int = 256
    vocabulary: int = 16

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.vocabulary < 3:
            raise ConfigError(
                f"vocabulary={self.vocabulary}, wanted at least 3 "
                "(the special token and two others)."
            )


class InductionHeads(Task[Config]):
    """The last id is the special token. Only the last position is scored. Chance: 1 / other ids."""

    Config = Config
    examples: ClassVar = {"short": {"length": 24, "vocabulary": 4}}

    @property
    def vocabulary(self) -> int:
        return self.config.vocabulary

    @property
    def answers(self) -> range:
        return range(self.vocabulary - 1)

    @property
    def shortest(self) -> int:
        return 4

    def draw(
        self, random: np.random.Generator, rows: int, length: int
    ) -> tuple[np.ndarray, np.ndarray]:
        special = self.vocabulary - 1
        inputs = random.integers(special, size=(rows, length))
        place = random.integers(length - 2, size=rows)
        inputs[np.arange(rows), place] = special
        inputs[:, -1] = special
        labels = np.full_like(inputs, IGNORED)
        labels[:, -1] = inputs[np.arange(rows), place + 1]
        return inputs, labels

    def oracle(self, inputs: Tensor) -> Tensor:
        first = (inputs == self.vocabulary - 1).long().argmax(dim=1, keepdim=True)
        outputs = torch.zeros_like(inputs)
        outputs[:, -1:] = inputs.gather(1, first + 1)
        return outputs


TASK = InductionHeads
