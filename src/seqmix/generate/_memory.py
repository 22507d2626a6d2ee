"""A reader that remembers the beginnings of texts which it has read, and reads none of them twice.

Axes: N rows, T time, V vocabulary, D width.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor

from seqmix.core.errors import RangeError
from seqmix.core.state import State
from seqmix.generate._reader import Reader, Reading

Beginning = tuple[int, ...]


class Memory(Reader):
    """Reads with `reader` what it has not read yet. Its states are the texts themselves, one tuple of tokens per row.

    So whatever searches with it, beams or a tree, shares what it has read, whoever asked for it first. It keeps the
    state of every beginning that was the end of a reading: a new one for every prompt, and let go with it.
    """

    def __init__(self, reader: Reader) -> None:
        self.reader = reader
        self.known: dict[Beginning, tuple[Reading, int]] = {}  # a reading, and the row in it
        self.asked = 0  # tokens asked for
        self.tokens = 0  # tokens that the model has read

    def read(self, ids: Tensor, state: State = None, *, keep: int = 1) -> Reading:
        if keep != 1:
            raise RangeError(
                f"Memory.read: keep={keep}, wanted 1: only the last token is remembered."
            )
        self.asked += ids.numel()
        before: Sequence[Beginning] = [()] * len(ids) if state is None else state
        texts = [(*old, *new) for old, new in zip(before, ids.tolist(), strict=True)]
        self._learn([text for text in dict.fromkeys(texts) if text not in self.known])
        found = [self.known[text] for text in texts]
        logits, features = (
            torch.stack([reading[part][row, -1:] for reading, row in found]) for part in (0, 1)
        )
        return Reading(logits, features, texts)

    def select(self, state: State, rows: list[int]) -> State:
        return [state[row] for row in rows]

    def _learn(self, texts: list[Beginning]) -> None:
        """Reads what is missing of the texts, those that go on equally far from one reading as one batch."""
        groups: dict[tuple[int, int, int], list[Beginning]] = defaultdict(list)
        for text in texts:
            length = len(text) - 1
            while length and text[:length] not in self.known:
                length -= 1
            source = id(self.known[text[:length]][0]) if length else 0
            groups[source, length, len(text)].append(text)
        for (_, length, _), alike in groups.items():
            self._read(alike, length)

    def _read(self, texts: list[Beginning], length: int) -> None:
        state = None
        if length:
            sources = [self.known[text[:length]] for text in texts]
            state = self.reader.select(sources[0][0].state, [row for _, row in sources])
        ids = torch.tensor([text[length:] for text in texts])
        reading = self.reader.read(ids, state)
        self.tokens += ids.numel()
        for row, text in enumerate(texts):
            self.known[text] = (reading, row)
