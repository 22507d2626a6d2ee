"""What claims about small models of bytes share: windows of a text, and the loss on those held out."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from seqmix.data.language_modelling import language_modelling

VOCABULARY = 258  # bytes, and the ends of documents and windows
ROWS = 64  # windows that a model reads at a time


@cache
def byte_windows(data: str, length: int) -> tuple[Tensor, Tensor]:
    """Windows [N, T] of a text's bytes to train on, and others of it that are held out."""
    parts = language_modelling(data, length=length)
    train, held_out = parts.train.packed, parts.validation.packed
    return (
        train.batch(range(train.windows))["input_ids"],
        held_out.batch(range(held_out.windows - 1))["input_ids"],  # the last one has pads
    )


def spread(windows: Tensor, rows: int) -> Tensor:
    """So many of the windows, evenly spread."""
    return windows[torch.linspace(0, len(windows) - 1, rows).round().long()]


@torch.no_grad()
def loss_on(model: Any, rows: Tensor) -> float:
    """Nats per byte over windows [N, T], each read afresh."""
    parts = rows.split(ROWS)
    return sum(float(model(input_ids=p, labels=p).loss) * len(p) for p in parts) / len(rows)
