"""Texts of different lengths in one row, bounded by `cu_seqlens`: run in groups of similar length."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from seqmix.core.errors import RangeError, ShapeError
from seqmix.core.state import State, concatenate_rows, map_state


class Batch:
    """Texts of one length, a row each `[B, T, ...]`: what an operator runs on without `cu_seqlens`."""

    def __init__(self, like: Tensor) -> None:
        self.num_texts = like.shape[0]
        self.lengths = torch.full((like.shape[0],), like.shape[1], device=like.device)

    def run(
        self, compute: Callable[..., Any], inputs: Sequence[Tensor | None], state: State = None
    ) -> tuple[Tensor, State]:
        """`compute(*inputs, state)`: the output [B, T, ...] and the state after it."""
        output, state = compute(*inputs, state)
        return output, state


class Packing(Batch):
    """Texts of different lengths laid end to end in one row `[1, total, ...]`, bounded by `cu_seqlens [N+1]`.

    `bounds` are these on the CPU, in int64.
    """

    def __init__(self, operator: str, cu_seqlens: Tensor, like: Tensor) -> None:
        bounds = (
            cu_seqlens.detach().to("cpu", torch.long).contiguous()
            if isinstance(cu_seqlens, Tensor)
            else None
        )
        if bounds is None or cu_seqlens.is_floating_point() or bounds.ndim != 1 or len(bounds) < 2:
            raise ShapeError(
                f"{operator}: `cu_seqlens` must be an integer tensor [N+1] of boundaries such as [0, 5, 12], "
                f"got {cu_seqlens!r}."
            )
        batch, total = like.shape[:2]
        if batch != 1:
            raise ShapeError(
                f"{operator}: with `cu_seqlens` the batch must be 1, got {batch}. "
                "Flatten the batch: x.reshape(1, B * T, ...)."
            )
        lengths = bounds.diff()
        if bounds[0] != 0 or bounds[-1] != total or bool((lengths < 0).any()):
            raise RangeError(
                f"{operator}: `cu_seqlens` must rise from 0 to the total length {total}, got {bounds.tolist()}."
            )
        self.bounds, self._lengths, self._device = bounds, lengths, like.device
        self.lengths = lengths.to(like.device)
        self.num_texts = len(lengths)
        self.longest = int(lengths.max())

    def run(
        self, compute: Callable[..., Any], inputs: Sequence[Tensor | None], state: State = None
    ) -> tuple[Tensor, State]:
        """`compute(*rows, state)` on zero-padded rows `[n, longest, ...]` of texts of similar length.

        A group takes texts at least half as long as its longest, so that no more than half of what is computed
        is padding and there are at most log2(longest) groups, whatever the lengths. Empty texts keep their
        state. An input may have several entries per token, `[1, total * times, ...]`; the state is any nesting
        of tensors with N rows. Gives the output `[1, total, ...]` and the state after each text.
        """
        groups, empty = self._groups()
        tokens = torch.cat([group.tokens for group in groups])
        sizes = [len(group.tokens) for group in groups]
        parts = [self._split(x, tokens, sizes) for x in inputs]
        outputs, states = [], []
        for group, *own in zip(groups, *parts, strict=True):
            output, after = compute(*map(group.pad, own), _rows(state, group.texts))
            outputs.append(output.flatten(0, 1).index_select(0, group.places))
            states.append(after)
        back = tokens.argsort()
        output = torch.cat(outputs).index_select(0, back).unsqueeze(0)
        texts = torch.cat([*(group.texts for group in groups), empty])
        if len(empty):
            states.append(_rows(state, empty))
        joined = concatenate_rows(states)
        return output, _rows(joined, texts.argsort())

    def unpack(self, tensor: Tensor) -> Tensor:
        """`[1, total, ...]` to one zero-padded row per text, `[N, longest, ...]`."""
        padded: Tensor = self._every_text().pad(tensor[0].unsqueeze(1))
        return padded

    def pack(self, tensor: Tensor) -> Tensor:
        """`[N, longest, ...]` to `[1, total, ...]`."""
        return tensor.flatten(0, 1).index_select(0, self._every_text().places).unsqueeze(0)

    def _every_text(self) -> _Group:
        return self._group(torch.arange(self.num_texts))

    def _groups(self) -> tuple[list[_Group], Tensor]:
        """The texts by length, the longest first, and those that are empty."""
        order = self._lengths.argsort(descending=True, stable=True)
        filled = int((self._lengths > 0).sum())
        left, empty = order[:filled], order[filled:]
        groups = []
        while len(left):
            lengths = self._lengths[left]
            taken = int((2 * lengths >= lengths[0]).sum())
            groups.append(self._group(left[:taken]))
            left = left[taken:]
        return groups, empty.to(self._device)

    def _group(self, texts: Tensor) -> _Group:
        lengths = self._lengths[texts]
        longest = int(lengths.max())
        row = torch.repeat_interleave(lengths)
        place = torch.arange(len(row)) - (lengths.cumsum(0) - lengths)[row]
        tokens, places = self.bounds[texts][row] + place, row * longest + place
        return _Group(len(texts), longest, *(x.to(self._device) for x in (texts, tokens, places)))

    def _split(
        self, tensor: Tensor | None, tokens: Tensor, sizes: list[int]
    ) -> Sequence[Tensor | None]:
        """`[1, total * times, ...]` to a part `[tokens, times, ...]` per group; one gather for all of them."""
        if tensor is None:
            return [None] * len(sizes)
        by_token = tensor.reshape(len(tokens), -1, *tensor.shape[2:])
        parts: Sequence[Tensor] = by_token.index_select(0, tokens).split(sizes)
        return parts


@dataclass(frozen=True)
class _Group:
    """Some texts of a packing: `tokens` are their tokens in the row, `places` where those go among n * longest."""

    rows: int
    longest: int
    texts: Tensor
    tokens: Tensor
    places: Tensor

    def pad(self, part: Tensor | None) -> Any:
        """`[tokens, times, ...]` to `[n, longest * times, ...]`, zeros after the end of each text."""
        if part is None:
            return None
        padded = part.new_zeros(self.rows * self.longest, *part.shape[1:])
        padded = padded.index_copy(0, self.places, part)
        return padded.reshape(self.rows, -1, *part.shape[2:])


def _rows(state: State, rows: Tensor) -> State:
    return map_state(lambda leaf: leaf.index_select(0, rows), state)


def in_rows(operator: str, cu_seqlens: Tensor | None, like: Tensor) -> Batch:
    """How the texts of `like [B, T, ...]` are laid out: one per row, or packed in one row by `cu_seqlens`."""
    return Batch(like) if cu_seqlens is None else Packing(operator, cu_seqlens, like)
