"""Passkey retrieval: a number is hidden in filler text and asked for at the end.

The problem of arXiv:2305.16300 as bytes, whose ids are those of
`seqmix.data.tokenizer.byte_tokenizer`. The digits of the answer are given one after another, so a
label is scored where the digit before it is read, as in generation.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from seqmix.core.errors import ConfigError
from seqmix.data.packing import IGNORED
from seqmix.tasks._task import Task, TaskConfig

FILLER = (
    b"Rain fell on the hills. The river ran slowly to the sea. Reeds moved in the wind. "
    b"A boat lay on the sand. Smoke rose from the village. Gulls cried over the harbour. "
)
BEFORE = b"The number is "
AFTER = b". Keep it. "
QUESTION = b"\nWhat was it? The number is "


@dataclass(frozen=True, kw_only=True)
class Config(TaskConfig):
    length: int = 256
    digits: int = 5

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.digits < 1:
            raise ConfigError(f"digits={self.digits}, wanted at least 1.")


def _codes(text: bytes) -> np.ndarray:
    return np.frombuffer(text, dtype=np.uint8).astype(np.int64)


def _back_to_sentence() -> np.ndarray:
    """For each place of the filler, how many characters ago its sentence began."""
    starts = np.array([0, *(match.end() for match in re.finditer(rb"\. ", FILLER[:-1]))])
    places = np.arange(len(FILLER))
    return places - starts[np.searchsorted(starts, places, side="right") - 1]


class Passkey(Task[Config]):
    """Inputs are bytes, answers the digits `0` to `9`. Chance is 1/10."""

    Config = Config
    examples: ClassVar = {"two_digits": {"digits": 2, "length": 90}}

    @property
    def vocabulary(self) -> int:
        return 256

    @property
    def answers(self) -> range:
        return range(ord("0"), ord("9") + 1)

    @property
    def shortest(self) -> int:
        return len(BEFORE + AFTER + QUESTION) + 2 * self.config.digits - 1

    def draw(
        self, random: np.random.Generator, rows: int, length: int
    ) -> tuple[np.ndarray, np.ndarray]:
        digits, filler = self.config.digits, _codes(FILLER)
        number = random.integers(ord("0"), ord("9") + 1, size=(rows, digits))
        hidden = len(BEFORE + AFTER) + digits
        body = length - len(QUESTION) - digits + 1
        offset = random.integers(len(filler), size=(rows, 1))
        place = random.integers(body - hidden + 1, size=(rows, 1))
        # The number's sentence stands between two others, or first.
        place = np.maximum(0, place - _back_to_sentence()[(offset + place) % len(filler)])
        position = np.arange(body)
        text = np.where(position < place, position, position - hidden)
        inputs = np.empty((rows, length), dtype=np.int64)
        inputs[:, :body] = filler[(offset + text) % len(filler)]
        sentence = np.empty((rows, hidden), dtype=np.int64)
        sentence[:, : len(BEFORE)] = _codes(BEFORE)
        sentence[:, len(BEFORE) : len(BEFORE) + digits] = number
        sentence[:, len(BEFORE) + digits :] = _codes(AFTER)
        np.put_along_axis(inputs, place + np.arange(hidden), sentence, axis=1)
        inputs[:, body : body + len(QUESTION)] = _codes(QUESTION)
        inputs[:, body + len(QUESTION) :] = number[:, :-1]
        labels = np.full_like(inputs, IGNORED)
        labels[:, -digits:] = number
        return inputs, labels

    def oracle(self, inputs: Tensor) -> Tensor:
        """Searches the text for the sentence that says the number."""
        digits = self.config.digits
        outputs = torch.full_like(inputs, ord("0"))
        for row, values in enumerate(inputs.tolist()):
            start = bytes(values).index(BEFORE) + len(BEFORE)
            outputs[row, -digits:] = inputs[row, start : start + digits]
        return outputs


TASK = Passkey
