"""What a task is: a generator with exact labels, an oracle, a chance level and a metric.

Axes: N examples of a batch, T time.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar, Generic, NamedTuple, TypeVar, cast

import numpy as np
import torch
from torch import Tensor

from seqmix.core.config import Config
from seqmix.core.errors import ConfigError, RangeError, ShapeError
from seqmix.data.packing import IGNORED

SPLITS = ("train", "test")
TEST_SHARE = 4  # one example in four belongs to the test split
ROUNDS = 200  # of drawing, before an example space is called too small


class Batch(NamedTuple):
    """Examples `[N, T]`, int64. `labels[n, t]` is the right output at position t itself, not t + 1.

    A loss on them must not shift: language models here take them as `shift_labels`. -100 marks a
    position that is not scored.
    """

    inputs: Tensor
    labels: Tensor


@dataclass(frozen=True, kw_only=True)
class TaskConfig(Config):
    """Fields that every task has: the training length, and the seed of all draws."""

    length: int = 64
    seed: int = 0

    def __post_init__(self) -> None:
        if self.seed < 0:
            raise ConfigError(f"seed={self.seed}, wanted 0 or more.")


C = TypeVar("C", bound=TaskConfig)


class Task(ABC, Generic[C]):
    """A learning problem. `TASK(config)` or `TASK()` for the default configuration.

    Examples are drawn on demand and belong to a split by a hash of their inputs, so training and
    test share none, whatever the seeds, the indices and the size of the example space.
    """

    Config: ClassVar[type[TaskConfig]]
    # Configurations by name, as changed fields, that the laws hold for beside the default one.
    examples: ClassVar[Mapping[str, Mapping[str, Any]]] = {}

    def __init__(self, config: C | None = None) -> None:
        self.config = cast("C", self.Config() if config is None else config)
        self._check_length(self.config.length)

    @property
    @abstractmethod
    def vocabulary(self) -> int:
        """Inputs and labels are ids below this."""

    @property
    @abstractmethod
    def answers(self) -> range:
        """The ids that a label can be."""

    @property
    @abstractmethod
    def shortest(self) -> int:
        """The smallest length that an example can have."""

    @abstractmethod
    def draw(
        self, random: np.random.Generator, rows: int, length: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Inputs and labels `[rows, length]`, int64, of either split."""

    @abstractmethod
    def oracle(self, inputs: Tensor) -> Tensor:
        """Right outputs `[N, T]` at every scored position, computed from `inputs` alone."""

    def chance(self) -> float:
        """The accuracy of the best constant answer: 1 / number of answers if they are even."""
        return 1 / len(self.answers)

    def batch(
        self, index: int, size: int, *, split: str = "train", length: int | None = None
    ) -> Batch:
        """`size` examples, the same for the same configuration, split, index, size and length.

        `length` stands in for the training length, to test how a model generalises to others.
        """
        length = self.config.length if length is None else length
        self._check_length(length)
        if split not in SPLITS:
            raise RangeError(f"batch: split={split!r}, wanted one of {', '.join(SPLITS)}.")
        if index < 0 or size < 1:
            raise RangeError(f"batch: index={index}, size={size}, wanted at least 0 and 1.")
        share = 1 / TEST_SHARE if split == "test" else 1 - 1 / TEST_SHARE
        random = np.random.default_rng([self.config.seed, SPLITS.index(split), index, length])
        found: list[tuple[np.ndarray, np.ndarray]] = []
        missing = size
        for _ in range(ROUNDS):
            inputs, labels = self.draw(random, int(1.2 * missing / share) + 8, length)
            mine = _is_test(inputs) == (split == "test")
            found.append((inputs[mine][:missing], labels[mine][:missing]))
            missing -= len(found[-1][0])
            if missing == 0:
                columns = (np.concatenate(column) for column in zip(*found, strict=True))
                return Batch(*(torch.from_numpy(column) for column in columns))
        raise RangeError(
            f"batch: at length {length} there are too few different examples to have some in the "
            f"{split} split. Choose a longer length."
        )

    @staticmethod
    def accuracy(predictions: Tensor, labels: Tensor) -> float:
        """The share of scored positions where `predictions`, ids `[N, T]`, equal `labels`."""
        if predictions.shape != labels.shape:
            raise ShapeError(
                f"accuracy: `predictions` has shape {list(predictions.shape)}, wanted "
                f"{list(labels.shape)} as `labels`. For logits pass logits.argmax(-1)."
            )
        scored = labels != IGNORED
        if not scored.any():
            raise RangeError("accuracy: every label is -100, so there is nothing to score.")
        return (predictions == labels)[scored].double().mean().item()

    def _check_length(self, length: int) -> None:
        if length < self.shortest:
            raise RangeError(
                f"{type(self).__name__}: length={length}, wanted at least {self.shortest} "
                f"for {self.config}."
            )


@lru_cache(maxsize=64)
def _odd_numbers(count: int) -> np.ndarray:
    """A fixed pseudo-random odd 64-bit multiplier per position (the splitmix64 finaliser)."""
    state = np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return (state ^ (state >> np.uint64(31))) | np.uint64(1)


def _is_test(inputs: np.ndarray) -> np.ndarray:
    """[N]: whether each row belongs to the test split; depends on nothing but the row."""
    mixed = ((inputs.astype(np.uint64) + np.uint64(1)) * _odd_numbers(inputs.shape[1])).sum(axis=1)
    mixed = (mixed ^ (mixed >> np.uint64(32))) * np.uint64(0xD6E8FEB86659FD93)
    return (mixed >> np.uint64(32)) % np.uint64(TEST_SHARE) == 0


def distinct(random: np.random.Generator, rows: int, population: int, count: int) -> np.ndarray:
    """`[rows, count]` numbers below `population`, different within a row, in random order."""
    keys = random.random((rows, population), dtype=np.float32)
    return first_in_order(keys, count)


def first_in_order(keys: np.ndarray, count: int) -> np.ndarray:
    """The places of the `count` smallest keys of each row, smallest first."""
    places = np.argpartition(keys, count - 1, axis=1)[:, :count]
    order = np.argsort(np.take_along_axis(keys, places, axis=1), axis=1)
    return np.take_along_axis(places, order, axis=1)
