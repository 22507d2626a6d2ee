"""Reading with a `FutureTokenModel`: the decoder's first token is the next one, so every way to decode works."""

from __future__ import annotations

from torch import Tensor

from seqmix.core.state import State, select_rows
from seqmix.generate._reader import Reader, Reading
from seqmix.models.future_tokens import FutureTokenModel


class FutureTokenReader(Reader):
    """Features are the state vectors."""

    def __init__(self, model: FutureTokenModel) -> None:
        self.model = model.eval()

    def read(self, ids: Tensor, state: State = None, *, keep: int = 1) -> Reading:
        states, state = self.model.read(ids, state)
        kept = states[:, -keep:]
        flat = kept.flatten(0, 1)
        logits = self.model.logits(flat, ids.new_empty(len(flat), 0))
        return Reading(logits.view(*kept.shape[:2], -1), states, state)

    def select(self, state: State, rows: list[int]) -> State:
        return select_rows(state, rows)
