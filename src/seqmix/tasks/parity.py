"""Parity: is the number of ones so far odd?   y[t] = (x[0] + ... + x[t]) mod 2.

The smallest problem that a linear recurrence cannot track at all lengths with eigenvalues in [0, 1]
only (arXiv:2411.12537). There the last answer counts, training lengths are 3 to 40 and test lengths
40 to 256.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from seqmix.tasks._task import Task
from seqmix.tasks._tracking import TrackingConfig, keep_scored


@dataclass(frozen=True, kw_only=True)
class Config(TrackingConfig):
    length: int = 40


class Parity(Task[Config]):
    """Inputs and labels are 0 or 1. Chance is 1/2."""

    Config = Config
    examples: ClassVar = {"last_answer": {"scored": "last", "length": 17}}

    @property
    def vocabulary(self) -> int:
        return 2

    @property
    def answers(self) -> range:
        return range(2)

    @property
    def shortest(self) -> int:
        return 4

    def draw(
        self, random: np.random.Generator, rows: int, length: int
    ) -> tuple[np.ndarray, np.ndarray]:
        inputs = random.integers(2, size=(rows, length))
        labels = np.bitwise_xor.accumulate(inputs, axis=1)
        return inputs, keep_scored(labels, self.config.scored, length - 1)

    def oracle(self, inputs: Tensor) -> Tensor:
        return torch.cumsum(inputs, dim=1) % 2


TASK = Parity
