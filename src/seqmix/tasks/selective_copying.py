"""Selective copying: items stand at random places among blanks; repeat them in order at the end.

From arXiv:2312.00752, there with 16 items, a vocabulary of 16 and length 4096. The last `items`
positions hold a marker, and the labels are there. The random places defeat a fixed convolution.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from seqmix.core.errors import ConfigError
from seqmix.data.packing import IGNORED
from seqmix.tasks._task import Task, TaskConfig, distinct

BLANK = 0


@dataclass(frozen=True, kw_only=True)
class Config(TaskConfig):
    """`length` counts everything, the answers' positions included."""

    length: int = 256
    items: int = 16
    vocabulary: int = 16

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.items < 1 or self.vocabulary < 4:
            raise ConfigError(
                f"items={self.items}, vocabulary={self.vocabulary}, wanted at least 1 and 4 "
                "(a blank, a marker and two kinds of items)."
            )


class SelectiveCopying(Task[Config]):
    """Id 0 is the blank, the last id the marker, the others are items. Chance is 1 / item ids."""

    Config = Config
    examples: ClassVar = {"few_items": {"items": 3, "length": 11, "vocabulary": 5}}

    @property
    def vocabulary(self) -> int:
        return self.config.vocabulary

    @property
    def answers(self) -> range:
        return range(1, self.vocabulary - 1)

    @property
    def shortest(self) -> int:
        return 2 * self.config.items

    def draw(
        self, random: np.random.Generator, rows: int, length: int
    ) -> tuple[np.ndarray, np.ndarray]:
        count = self.config.items
        items = random.integers(1, self.vocabulary - 1, size=(rows, count))
        places = np.sort(distinct(random, rows, length - count, count), axis=1)
        inputs = np.full((rows, length), BLANK, dtype=np.int64)
        np.put_along_axis(inputs, places, items, axis=1)
        inputs[:, -count:] = self.vocabulary - 1
        labels = np.full_like(inputs, IGNORED)
        labels[:, -count:] = items
        return inputs, labels

    def oracle(self, inputs: Tensor) -> Tensor:
        """Moves the items to the front in order (a stable sort), then reads them off at the end."""
        count = self.config.items
        order = torch.argsort((inputs[:, :-count] == BLANK).long(), dim=1, stable=True)
        outputs = torch.full_like(inputs, BLANK)
        outputs[:, -count:] = inputs.gather(1, order[:, :count])
        return outputs


TASK = SelectiveCopying
