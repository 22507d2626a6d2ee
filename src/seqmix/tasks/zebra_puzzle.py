"""Zebra puzzle: who lives where, from clues that together leave one possibility.

Houses stand in a row; in each there is one value of every attribute (a colour, an animal, ...), no value twice. A clue
is three tokens, a relation and two things: they are in the same house, the first is in the next house to the left of
the second, they are neighbours, or a value is in the house of a number. Clues are drawn at random from those that are
true, until only one possibility is left. The answer lists the values house by house.
After arXiv:2505.05755 (puzzles of arXiv:2409.10502, there with up to 6 houses and attributes, and clues of
seven kinds).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from itertools import permutations, product
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from seqmix.core.errors import ConfigError
from seqmix.data.packing import IGNORED
from seqmix.tasks._task import Task, TaskConfig, first_in_order

SAME, LEFT, NEXT, AT = range(4)  # relations


@dataclass(frozen=True, kw_only=True)
class Config(TaskConfig):
    """`clues`: the most that a puzzle has; drawn ones that need more are left out."""

    length: int = 40
    houses: int = 3
    attributes: int = 3
    clues: int = 9

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (2 <= self.houses <= 4 and 2 <= self.attributes <= 3 and self.clues >= self.houses):
            raise ConfigError(
                f"houses={self.houses}, attributes={self.attributes}, clues={self.clues}, wanted 2 to 4 "
                "houses, 2 or 3 attributes and at least as many clues as houses."
            )


@lru_cache
def possibilities(houses: int, attributes: int) -> np.ndarray:
    """[possibilities, values]: the house of each value; value v of attribute a has the number houses * a + v."""
    orders = list(permutations(range(houses)))
    return np.array([sum(choice, ()) for choice in product(orders, repeat=attributes)])


@lru_cache
def all_clues(houses: int, attributes: int) -> tuple[np.ndarray, np.ndarray]:
    """Clues [clues, 3], relation and two things, and in which possibilities they are true [clues, possibilities]."""
    where = possibilities(houses, attributes).T
    clues, truths = [], []
    for one, other in permutations(range(houses * attributes), 2):
        step = where[other] - where[one]
        if one < other and one // houses != other // houses:
            clues.append((SAME, one, other))
            truths.append(step == 0)
        clues.append((LEFT, one, other))
        truths.append(step == 1)
        if one < other:
            clues.append((NEXT, one, other))
            truths.append(abs(step) == 1)
    for one, house in product(range(houses * attributes), range(houses)):
        clues.append((AT, one, house))
        truths.append(where[one] == house)
    return np.array(clues), np.array(truths)


class ZebraPuzzle(Task[Config]):
    """Ids are the values, the numbers of the houses, the relations, a question mark and a blank."""

    Config = Config
    examples: ClassVar = {"two_attributes": {"attributes": 2, "clues": 7, "length": 30}}

    @property
    def values(self) -> int:
        return self.config.houses * self.config.attributes

    @property
    def vocabulary(self) -> int:
        return self.values + self.config.houses + 4 + 2

    @property
    def answers(self) -> range:
        return range(self.values)

    @property
    def answer_length(self) -> int:
        """Positions of the answer."""
        return self.values

    @property
    def shortest(self) -> int:
        return 3 * self.config.clues + self.values

    def draw(
        self, random: np.random.Generator, rows: int, length: int
    ) -> tuple[np.ndarray, np.ndarray]:
        c = self.config
        where = possibilities(c.houses, c.attributes)
        clues, truths = all_clues(c.houses, c.attributes)
        found: list[tuple[np.ndarray, np.ndarray]] = []
        missing = rows
        while missing > 0:
            solution = random.integers(len(where), size=2 * missing + 8)
            keys = random.random((len(solution), len(clues)))
            keys[~truths[:, solution].T] = 2.0
            order = first_in_order(keys, c.clues)
            left = np.logical_and.accumulate(truths[order], axis=1).sum(axis=2)  # possibilities
            solved = left[:, -1] == 1
            count = (left > 1).sum(axis=1) + 1
            tokens = clues[order]
            tokens[..., 2] += np.where(tokens[..., 0] == AT, self.values, 0)
            tokens[..., 0] += self.values + c.houses
            unused = np.arange(c.clues) >= count[:, None]
            tokens[unused] = self.vocabulary - 1
            tokens = tokens[:, ::-1].reshape(len(solution), -1)  # blanks first
            found.append((tokens[solved], where[solution[solved]]))
            missing -= int(solved.sum())
        told, houses = (np.concatenate(part)[:rows] for part in zip(*found, strict=True))
        answer = np.argsort(houses, axis=1, kind="stable")  # values by house, then by attribute
        inputs = np.full((rows, length), self.vocabulary - 1)
        inputs[:, -self.values - told.shape[1] : -self.values] = told
        inputs[:, -self.values] = self.vocabulary - 2
        inputs[:, -self.values + 1 :] = answer[:, :-1]
        labels = np.full_like(inputs, IGNORED)
        labels[:, -self.values :] = answer
        return inputs, labels

    def oracle(self, inputs: Tensor) -> Tensor:
        """Tries every possibility."""
        c = self.config
        where = possibilities(c.houses, c.attributes)
        clues, truths = all_clues(c.houses, c.attributes)
        truth = {tuple(clue): row for clue, row in zip(clues.tolist(), truths, strict=True)}
        outputs = torch.zeros_like(inputs)
        for row, ids in enumerate(inputs[:, : -self.values].tolist()):
            told = [token for token in ids if token != self.vocabulary - 1]
            possible = np.ones(len(where), dtype=bool)
            for relation, one, other in zip(told[::3], told[1::3], told[2::3], strict=True):
                kind = relation - self.values - c.houses
                possible &= truth[kind, one, other - (self.values if kind == AT else 0)]
            houses = where[possible.argmax()]
            outputs[row, -self.values :] = torch.from_numpy(np.argsort(houses, kind="stable"))
        return outputs


TASK = ZebraPuzzle
