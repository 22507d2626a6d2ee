"""Modular arithmetic without brackets: 3 + 4 * 2 - 1 mod 5, the value of every prefix.

Numbers stand at even positions and operators at odd ones; products bind more tightly than sums, as
in the formal-language experiments of arXiv:2411.12537. An automaton with modulus^2 states (the sum
of the closed terms, the open term) solves it. At a number the label is the value of the expression
that ends there.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from seqmix.core.errors import ConfigError
from seqmix.data.packing import IGNORED
from seqmix.tasks._task import Task
from seqmix.tasks._tracking import TrackingConfig, keep_scored


@dataclass(frozen=True, kw_only=True)
class Config(TrackingConfig):
    """`operators` is a selection of `+`, `-` and `*`."""

    length: int = 41
    modulus: int = 5
    operators: str = "+-*"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.modulus < 2:
            raise ConfigError(f"modulus={self.modulus}, wanted at least 2.")
        chosen = set(self.operators)
        if not chosen or chosen - set("+-*") or len(chosen) < len(self.operators):
            raise ConfigError(f"operators={self.operators!r}, wanted some of '+-*', each once.")


class ModularArithmetic(Task[Config]):
    """Numbers are ids 0 to modulus - 1, operators follow in the order of the configuration."""

    Config = Config
    examples: ClassVar = {
        "sums_last_answer": {"scored": "last", "operators": "+-", "length": 12},
        "modulus_7": {"modulus": 7},
    }

    @property
    def vocabulary(self) -> int:
        return self.config.modulus + len(self.config.operators)

    @property
    def answers(self) -> range:
        return range(self.config.modulus)

    @property
    def shortest(self) -> int:
        return 3

    def chance(self) -> float:
        """The most frequent value's exact share: products make 0 more frequent than the others."""
        modulus, operators = self.config.modulus, self.config.operators
        share = np.full(modulus, 1 / modulus)  # of each value at the first number
        joint = np.outer(np.eye(modulus)[0], share)  # [sum of closed terms, open term]
        values = [share]
        index = np.arange(modulus)
        totals = (index[:, None] + index) % modulus
        products = (index[:, None] * index) % modulus
        for _ in range((self.config.length - 1) // 2):
            after = np.zeros_like(joint)
            for operator in operators:
                if operator == "*":
                    for number in index:
                        np.add.at(after.T, products[:, number], joint.T / modulus)
                else:  # the new term, x or -x, is uniform
                    after += np.bincount(totals.ravel(), joint.ravel())[:, None] / modulus
            joint = after / len(operators)
            values.append(np.bincount(totals.ravel(), joint.ravel()))
        scored = values if self.config.scored == "every" else values[-1:]
        return float(np.mean(scored, axis=0).max())

    def draw(
        self, random: np.random.Generator, rows: int, length: int
    ) -> tuple[np.ndarray, np.ndarray]:
        modulus, operators = self.config.modulus, self.config.operators
        inputs = np.empty((rows, length), dtype=np.int64)
        inputs[:, 0::2] = random.integers(modulus, size=(rows, (length + 1) // 2))
        chosen = random.integers(len(operators), size=(rows, length // 2))
        inputs[:, 1::2] = modulus + chosen
        labels = np.full_like(inputs, IGNORED)
        symbols = np.array(list(operators))[chosen]
        signs, multiplies = np.where(symbols == "-", -1, 1), symbols == "*"
        total = np.zeros(rows, dtype=np.int64)
        term = inputs[:, 0]
        labels[:, 0] = term
        for step in range(1, (length + 1) // 2):
            number, multiply = inputs[:, 2 * step], multiplies[:, step - 1]
            total = np.where(multiply, total, total + term) % modulus
            term = np.where(multiply, term * number, signs[:, step - 1] * number) % modulus
            labels[:, 2 * step] = (total + term) % modulus
        return inputs, keep_scored(labels, self.config.scored, (length - 1) // 2 * 2)

    def oracle(self, inputs: Tensor) -> Tensor:
        """One expression at a time, in Python's integers; an operator gets the value before it."""
        return torch.tensor([self._values(row) for row in inputs.tolist()])

    def _values(self, row: list[int]) -> list[int]:
        modulus, operators = self.config.modulus, self.config.operators
        terms, values = [row[0]], [row[0]]
        for position in range(1, len(row)):
            if position % 2:
                values.append(values[-1])
                continue
            operator, number = operators[row[position - 1] - modulus], row[position]
            if operator == "*":
                terms[-1] = terms[-1] * number % modulus
            else:
                terms = [sum(terms), -number if operator == "-" else number]
            values.append(sum(terms) % modulus)
        return values


TASK = ModularArithmetic
