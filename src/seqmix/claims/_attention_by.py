"""Models whose attention another function computes, so that all else of a comparison is the same."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

from torch import Tensor

from seqmix.mixers import _attention, bidirectional_attention
from seqmix.models import _decoding


@contextmanager
def attention_by(function: Callable[..., Tensor]) -> Iterator[list[float]]:
    """Inside the block attention mixers call `function`, which takes the arguments of `seqmix.ops.attention`.

    Gives the seconds of each call.
    """
    seconds: list[float] = []

    def read(*inputs: Tensor, **options: Any) -> Tensor:
        start = time.perf_counter()
        o = function(*inputs, **options)
        seconds.append(time.perf_counter() - start)
        return o

    with (
        mock.patch.object(_attention, "attention", read),
        mock.patch.object(bidirectional_attention, "attention", read),
        mock.patch.object(_decoding, "MOST", {}),  # no block in one call, attention and all
    ):
        yield seconds
