"""Uninitialised memory made visible."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Inside, `torch.empty` and its relatives give NaN, so that a row that nobody wrote cannot pass for zeros."""

    def poisoned(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def allocate(*sizes: Any, **options: Any) -> Tensor:
            tensor = make(*sizes, **options)
            if tensor.is_floating_point() or tensor.is_complex():
                with torch.no_grad():
                    tensor.fill_(torch.nan)
            return tensor

        return allocate

    with (
        patch.object(torch, "empty", poisoned(torch.empty)),
        patch.object(torch, "empty_like", poisoned(torch.empty_like)),
        patch.object(torch, "empty_strided", poisoned(torch.empty_strided)),
        patch.object(Tensor, "new_empty", poisoned(Tensor.new_empty)),
    ):
        yield
