"""Texts packed in one row, as transformers says where they end: `seq_idx` or `cu_seq_lens_q`.

Some of its models drop these on the way to their mixers, and Mamba's scans are called without them. So the borders
that a model was called with are remembered while its forward runs (`remember`), and when a checkpointed block runs
again in the backward pass (`hand_on`), and are found by the functions that need them (`bounds_of`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import wraps
from threading import local
from typing import Any

import torch
from torch import Tensor

from seqmix.core.errors import ShapeError

_OPTIONS = ("cu_seq_lens_q", "seq_idx")


class _Remembered(local):  # torch.compile follows this, and not a ContextVar
    texts: Mapping[str, Tensor] | None = None


_remembered = _Remembered()


def bounds_of(options: Mapping[str, Any], batch: int, length: int) -> Tensor | None:
    """The borders [N+1] of the texts in `batch * length` tokens laid end to end; None where a row is one text.

    Raises `ShapeError` where `seq_idx` does not have a number for every token.
    """
    texts = options.get("seq_idx")
    if texts is None:
        bounds: Tensor | None = options.get("cu_seq_lens_q")
        if bounds is not None:
            return bounds[0] if bounds.ndim == 2 else bounds
        remembered = _remembered.texts
        return None if remembered is None else bounds_of(remembered, batch, length)
    if tuple(texts.shape) != (batch, length):
        raise ShapeError(
            f"seqmix.accelerate: `seq_idx` has shape {list(texts.shape)}, wanted [{batch}, {length}], the number "
            "of the text of each token. Pass it with whole texts only, not while continuing from a cache."
        )
    begins = torch.ones(batch, length, dtype=torch.bool, device=texts.device)
    begins[:, 1:] = texts[:, 1:] != texts[:, :-1]
    starts = begins.flatten().nonzero().flatten()
    return torch.cat([starts, starts.new_tensor([batch * length])])


def one_row(tensor: Tensor | None) -> Any:
    """`[B, T, ...]` to `[1, B * T, ...]`: the layout of packed texts."""
    return None if tensor is None else tensor.reshape(1, -1, *tensor.shape[2:])


def last_of_rows(state: Tensor, bounds: Tensor, batch: int, length: int) -> Tensor:
    """Of states [N, ...] after each text, those after the last text of each row, [B, ...]."""
    ends = length * torch.arange(1, batch + 1, device=bounds.device)
    return state.index_select(0, torch.searchsorted(bounds, ends) - 1)


def remember(forward: Callable[..., Any]) -> Callable[..., Any]:
    """The same forward, with the borders of its texts known to the functions that it calls without them."""

    @wraps(forward)
    def forward_with_texts(self: Any, *args: Any, **kwargs: Any) -> Any:
        if "seq_idx" not in kwargs and "cu_seq_lens_q" not in kwargs:
            return forward(self, *args, **kwargs)
        texts = {name: kwargs[name] for name in _OPTIONS if kwargs.get(name) is not None}
        return _within(texts or _remembered.texts, forward)(self, *args, **kwargs)

    return forward_with_texts


def hand_on(call: Callable[..., Any]) -> Callable[..., Any]:
    """The same call of a block; if it is checkpointed, the backward pass runs it again with the same borders."""

    @wraps(call)
    def call_with_texts(self: Any, *args: Any, **kwargs: Any) -> Any:
        texts = _remembered.texts
        if texts is None or not (self.gradient_checkpointing and self.training):
            return call(self, *args, **kwargs)
        checkpoint = self._gradient_checkpointing_func
        self._gradient_checkpointing_func = lambda run, *inputs: checkpoint(
            _within(texts, run), *inputs
        )
        try:
            return call(self, *args, **kwargs)
        finally:
            self._gradient_checkpointing_func = checkpoint

    return call_with_texts


def _within(texts: Mapping[str, Tensor] | None, run: Callable[..., Any]) -> Callable[..., Any]:
    def run_with_texts(*args: Any, **kwargs: Any) -> Any:
        before = _remembered.texts
        _remembered.texts = texts
        try:
            return run(*args, **kwargs)
        finally:
            _remembered.texts = before

    return run_with_texts
