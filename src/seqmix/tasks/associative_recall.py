"""Multi-query associative recall (MQAR): key-value pairs, then each key once more, in any order.

Facts from arXiv:2312.04927 and its code: the first 2 * pairs tokens are different keys, each
followed by its value; a query stands at an even distance 2 g behind them, where the g are drawn
without replacement with probability proportional to (g + 1)^(power - 1); at a query the answer is
the key's value. Published runs use a vocabulary of 8192, lengths 64 to 512 with 4 to 64 pairs, and
power 0.01.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from torch import Tensor

from seqmix.core.errors import ConfigError
from seqmix.data.packing import IGNORED
from seqmix.tasks._task import Task, TaskConfig, distinct, first_in_order

FILLERS = ("blank", "random")


@dataclass(frozen=True, kw_only=True)
class Config(TaskConfig):
    """`filler`: what stands between the queries, the id 0 or any `random` id."""

    length: int = 64
    pairs: int = 8
    vocabulary: int = 128
    power: float = 0.01
    filler: str = "blank"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.pairs < 1 or self.power <= 0:
            raise ConfigError(f"pairs={self.pairs}, power={self.power}, wanted both above 0.")
        if self.vocabulary // 2 - 1 < self.pairs:
            raise ConfigError(
                f"vocabulary={self.vocabulary} has too few keys for pairs={self.pairs}, "
                f"wanted at least {2 * self.pairs + 2}."
            )
        if self.filler not in FILLERS:
            raise ConfigError(f"filler={self.filler!r}, wanted one of {', '.join(FILLERS)}.")


class AssociativeRecall(Task[Config]):
    """Keys are the lower half of the ids without 0, values the upper half. Chance is 1 / values."""

    Config = Config
    examples: ClassVar = {
        "every_key": {"pairs": 4, "length": 17, "vocabulary": 10, "filler": "random"},
        "many_pairs": {"power": 1.0, "vocabulary": 1024, "pairs": 32, "length": 256},
    }

    @property
    def vocabulary(self) -> int:
        return self.config.vocabulary

    @property
    def answers(self) -> range:
        return range(self.vocabulary // 2, self.vocabulary)

    @property
    def shortest(self) -> int:
        return 4 * self.config.pairs

    def draw(
        self, random: np.random.Generator, rows: int, length: int
    ) -> tuple[np.ndarray, np.ndarray]:
        pairs, half = self.config.pairs, self.vocabulary // 2
        keys = 1 + distinct(random, rows, half - 1, pairs)
        values = random.integers(half, self.vocabulary, size=(rows, pairs))
        inputs = np.zeros((rows, length), dtype=np.int64)
        if self.config.filler == "random":
            inputs = random.integers(self.vocabulary, size=(rows, length))
        inputs[:, 0 : 2 * pairs : 2] = keys
        inputs[:, 1 : 2 * pairs : 2] = values
        # Exponential races: the smallest of e / weight are a weighted draw without replacement.
        weights = np.arange(1, (length - 2 * pairs) // 2 + 1) ** (self.config.power - 1)
        gaps = first_in_order(random.standard_exponential((rows, len(weights))) / weights, pairs)
        places = 2 * pairs + 2 * gaps
        np.put_along_axis(inputs, places, keys, axis=1)
        labels = np.full_like(inputs, IGNORED)
        np.put_along_axis(labels, places, values, axis=1)
        return inputs, labels

    def oracle(self, inputs: Tensor) -> Tensor:
        """Looks every token up among the keys; one that is none of them gets the first value."""
        table = inputs[:, : 2 * self.config.pairs]
        same = inputs[:, :, None] == table[:, None, 0::2]
        return table[:, 1::2].gather(1, same.long().argmax(dim=-1))


TASK = AssociativeRecall
