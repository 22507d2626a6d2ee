"""The word problem of a permutation group: the running product.   y[t] = x[0] x[1] ... x[t].

Tracking S5 or A5 is NC1-complete, beyond constant-depth models with diagonal recurrences; S3 and A4
are solvable groups (arXiv:2404.08819). Inputs are uniform over the group, and so is every label.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from itertools import permutations
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from seqmix.core.errors import ConfigError
from seqmix.tasks._task import Task
from seqmix.tasks._tracking import TrackingConfig, keep_scored

GROUPS = ("s3", "s4", "s5", "a3", "a4", "a5")


@dataclass(frozen=True, kw_only=True)
class Config(TrackingConfig):
    """`group`: the symmetric group `s3` to `s5`, or the alternating group `a3` to `a5`."""

    length: int = 32
    group: str = "s3"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.group not in GROUPS:
            raise ConfigError(f"group={self.group!r}, wanted one of {', '.join(GROUPS)}.")


@lru_cache
def elements(group: str) -> np.ndarray:
    """[elements, points]: the images of each element, in lexicographic order, identity first."""
    points = int(group[1])
    images = np.array(list(permutations(range(points))))
    if group[0] == "s":
        return images
    upper = np.triu_indices(points, 1)
    inversions = (images[:, upper[0]] > images[:, upper[1]]).sum(axis=1)
    return images[inversions % 2 == 0]


@lru_cache
def product_table(group: str) -> np.ndarray:
    """[elements, elements]: the id of a b, which applies a first and b to its result."""
    images = elements(group)
    products = images[:, images].transpose(1, 0, 2)  # [a, b, point] = b[a[point]]
    number = images @ (images.shape[1] ** np.arange(images.shape[1]))
    order = np.argsort(number)
    wanted = products @ (images.shape[1] ** np.arange(images.shape[1]))
    return order[np.searchsorted(number, wanted, sorter=order)]


class PermutationComposition(Task[Config]):
    """Inputs and labels are elements of the group; id 0 is the identity. Chance is 1 / order."""

    Config = Config
    examples: ClassVar = {
        "s5": {"group": "s5"},
        "a5_last_answer": {"group": "a5", "scored": "last", "length": 9},
    }

    @property
    def vocabulary(self) -> int:
        return len(elements(self.config.group))

    @property
    def answers(self) -> range:
        return range(self.vocabulary)

    @property
    def shortest(self) -> int:
        return 3

    def draw(
        self, random: np.random.Generator, rows: int, length: int
    ) -> tuple[np.ndarray, np.ndarray]:
        table = product_table(self.config.group)
        inputs = random.integers(len(table), size=(rows, length))
        labels = inputs.copy()
        for t in range(1, length):
            labels[:, t] = table[labels[:, t - 1], inputs[:, t]]
        return inputs, keep_scored(labels, self.config.scored, length - 1)

    def oracle(self, inputs: Tensor) -> Tensor:
        """Moves the points themselves, and looks up at each step which element did that."""
        images = torch.from_numpy(elements(self.config.group))
        moved = images[inputs]  # [N, T, points]
        for t in range(1, inputs.shape[1]):
            moved[:, t] = torch.gather(moved[:, t], 1, moved[:, t - 1])
        return (moved[:, :, None] == images).all(dim=-1).long().argmax(dim=-1)


TASK = PermutationComposition
