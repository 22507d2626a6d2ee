"""A model's state as transformers passes it around."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from seqmix.core.errors import ConfigError, RangeError
from seqmix.core.state import State, fork, num_rows, select_rows


class StateCache(Cache):
    """The state of a model as transformers passes it around: `state` is the value, `length` its tokens.

    `length` counts columns of the batch, pads included, as `generate` does. A state can be taken back with
    `crop` after `activate_past_recording`: the tokens that stay are then read again from the last state
    before them, for a recurrence cannot be run backwards. `crop` forgets what was recorded.
    """

    def __init__(self, state: State = None, length: int = 0) -> None:
        super().__init__(layers=[])
        self.state = state
        self.length = length
        self._recorded: list[tuple[int, State, Callable[[int], State]]] | None = None

    def __repr__(self) -> str:
        return f"StateCache(rows={num_rows(self.state)}, length={self.length})"

    def __len__(self) -> int:
        return 0 if self.state is None else len(self.state)

    def __bool__(self) -> bool:
        return True

    def copy(self) -> StateCache:
        """Another cache with the same state; states are values, so the two go separate ways."""
        return StateCache(self.state, self.length)

    def advance(self, state: State, tokens: int, replay: Callable[[int], State]) -> None:
        """Takes the state after `tokens` more columns; `replay(n)` computes the one after the first n."""
        if self._recorded is not None:
            self._recorded.append((self.length, self.state, replay))
        self.state = state
        self.length += tokens

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.length

    def get_max_length(self, layer_idx: int | None = None) -> int:
        return -1

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        return self.length + query_length, 0

    def has_previous_state(
        self, layer_idx: int | None = None, state_idx: int | None = None
    ) -> bool:
        return self.state is not None

    @property
    def batch_size(self) -> int:
        return num_rows(self.state) or -1

    @property
    def is_initialized(self) -> bool:
        return self.state is not None

    @property
    def is_croppable(self) -> bool:
        return self._recorded is not None

    def activate_past_recording(self) -> None:
        if self._recorded is None:
            self._recorded = []

    def crop(self, tokens_to_remove: int) -> None:
        """Takes back the last `-tokens_to_remove` columns; raises `RangeError` beyond what was recorded."""
        if tokens_to_remove > 0:
            raise RangeError(
                f"crop: tokens_to_remove={tokens_to_remove}, wanted 0 or a negative count."
            )
        target = self.length + tokens_to_remove
        recorded = self._recorded or []
        if tokens_to_remove < 0:
            if not recorded or target < recorded[0][0]:
                raise RangeError(
                    f"crop: cannot go back {-tokens_to_remove} tokens, only "
                    f"{self.length - recorded[0][0] if recorded else 0} were recorded. Call "
                    "activate_past_recording() before reading them, or keep a copy() of the cache."
                )
            start, before, replay = next(step for step in reversed(recorded) if step[0] <= target)
            self.state = before if start == target else replay(target - start)
            self.length = target
        recorded.clear()

    def _change_rows(self, change: Callable[[State], State]) -> None:
        if self._recorded:
            self._recorded.clear()  # what was recorded has the old rows
        self.state = change(self.state)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._change_rows(lambda state: select_rows(state, beam_idx))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._change_rows(lambda state: fork(state, repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        rows = indices.nonzero().flatten() if indices.dtype == torch.bool else indices
        self._change_rows(lambda state: select_rows(state, rows))

    def reset(self) -> None:
        self._change_rows(lambda _: None)
        self.length = 0

    def update(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        raise ConfigError("A StateCache holds the state of a seqmix model, not keys and values.")
