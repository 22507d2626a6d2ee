"""Documents laid end to end in windows that remember where each document begins.

Every document is followed by `eos`, and the whole stream is cut into windows of T tokens.
Neighbouring windows share one token, the last of the one and the first of the next, because the
first token of a window is input only: so every token that follows another token of its document is
predicted exactly once.

Axes: B windows in a batch, T time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from seqmix.core.errors import DataError, RangeError, ShapeError

IGNORED = -100  # the label that no loss and no metric counts


@dataclass(frozen=True, eq=False)
class Packed:
    """A token stream `[tokens]`, the place where each document starts, and how to window them.

    `pad` is the id that fills the last window; where it is None, an incomplete last window is
    dropped.
    """

    tokens: Tensor
    starts: Tensor
    length: int
    pad: int | None = None

    @cached_property
    def windows(self) -> int:
        """How many windows there are."""
        steps = len(self.tokens) - 1
        stride = self.length - 1
        return steps // stride if self.pad is None else -(-steps // stride)

    @cached_property
    def _is_scored(self) -> Tensor:
        """[tokens]: the token is predicted in some window from a token of its own document."""
        scored = torch.ones(len(self.tokens), dtype=torch.bool)
        scored[self.starts] = False
        if self.pad is None:
            scored[self.windows * (self.length - 1) + 1 :] = False
        return scored

    @cached_property
    def scored_tokens(self) -> int:
        """How many labels of all windows together count in the loss."""
        return int(self._is_scored.sum())

    def scored_bytes(self, token_bytes: np.ndarray) -> int:
        """The UTF-8 bytes of all scored tokens; `token_bytes` is that of `seqmix.data.tokenizer`.

        bits per byte = (sum of the losses of all scored tokens, in nats) / log(2) / scored_bytes.
        """
        return int(token_bytes[self.tokens[self._is_scored].numpy()].sum())

    def batch(self, rows: Sequence[int] | np.ndarray) -> dict[str, Tensor]:
        """`input_ids`, `labels` and `segments` `[B, T]`, int64.

        Labels stand under their own tokens (the model shifts them); a label whose predecessor is in
        another window or document, or that is padding, is -100. Segments number the documents of a
        row from 0; padding is a segment of its own.
        """
        first = torch.as_tensor(rows, dtype=torch.int64)[:, None] * (self.length - 1)
        places = first + torch.arange(self.length)
        inside = places < len(self.tokens)
        places = places.clamp_max(len(self.tokens) - 1)
        input_ids = self.tokens[places].long()
        labels = input_ids.masked_fill(~(self._is_scored[places] & inside), IGNORED)
        labels[:, 0] = IGNORED
        documents = torch.searchsorted(self.starts, places, right=True)
        segments = documents - documents[:, :1] + (~inside).long()
        if self.pad is not None:
            input_ids = input_ids.masked_fill(~inside, self.pad)
        return {"input_ids": input_ids, "labels": labels, "segments": segments}


class WindowDataset(Dataset[dict[str, Tensor]]):
    """The windows of a `Packed` as a torch data set, in their order; shuffling is the Trainer's."""

    def __init__(self, packed: Packed) -> None:
        self.packed = packed

    def __len__(self) -> int:
        return self.packed.windows

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """One window: `input_ids`, `labels`, `segments`, each `[T]`."""
        if not -len(self) <= index < len(self):
            raise IndexError(f"window {index} of {len(self)}")
        return {name: rows[0] for name, rows in self.packed.batch([index % len(self)]).items()}


def pack(
    documents: Sequence[Sequence[int] | np.ndarray],
    length: int,
    *,
    eos: int,
    pad: int | None = None,
) -> Packed:
    """Packs `documents`, lists of ids, into windows of `length` tokens.

    For training leave `pad` out: an incomplete last window is dropped. For evaluation give `pad`:
    the last window is filled up and every token counts exactly once. Raises `DataError` where not
    one window comes out: fewer than `length` tokens in training, fewer than 2 in evaluation.
    """
    if length < 2:
        raise RangeError(f"pack: length={length}, wanted at least 2: an input token and its next.")
    rows = [np.append(document, eos).astype(np.int32) for document in documents]
    total = sum(len(row) for row in rows)
    needed = length if pad is None else 2
    if total < needed:
        raise DataError(
            f"The data has {total} tokens and one window needs {needed}. "
            "Give a longer text or a smaller length."
        )
    sizes = np.array([len(row) for row in rows], dtype=np.int64)
    return Packed(
        tokens=torch.from_numpy(np.concatenate(rows)),
        starts=torch.from_numpy(np.cumsum(sizes) - sizes),
        length=length,
        pad=pad,
    )


def cu_seqlens_from_segments(segments: Tensor) -> Tensor:
    """Where each document begins in the batch read as one row `[1, B*T]`, then B*T: int32 `[N+1]`.

    `segments` is `[B, T]`; a document begins where the number changes and at the start of every
    row.
    """
    if segments.ndim != 2 or segments.numel() == 0:
        raise ShapeError(
            f"cu_seqlens_from_segments: `segments` has shape {list(segments.shape)}, wanted [B, T] "
            "with at least one token. For one row pass segments[None]."
        )
    begins = torch.ones_like(segments, dtype=torch.bool)
    begins[:, 1:] = segments[:, 1:] != segments[:, :-1]
    starts = begins.flatten().nonzero().flatten()
    return torch.cat([starts, starts.new_tensor([segments.numel()])]).to(torch.int32)
