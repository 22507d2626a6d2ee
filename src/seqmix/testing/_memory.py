"""Memory made visible: what nobody wrote, what lies beside what somebody may use, and what is made by default."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

GUARD = 256  # bytes before and after: four of the widest vectors
POISON = 0xFF  # in every byte: a NaN in every floating dtype, -1 in every integer dtype
_MAKERS = [(torch, "empty"), (torch, "empty_like"), (torch, "empty_strided"), (Tensor, "new_empty")]
_ZERO_MAKERS = [(torch, "zeros"), (torch, "zeros_like"), (Tensor, "new_zeros")]


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Inside, `torch.empty` and its relatives give NaN, so that a row that nobody wrote cannot pass for zeros."""

    def poison(tensor: Tensor) -> Tensor:
        if tensor.is_floating_point() or tensor.is_complex():
            with torch.no_grad():
                tensor.fill_(torch.nan)
        return tensor

    with _changed_makers(poison):
        yield


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Inside, what is made without a dtype has this one."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextmanager
def guarded_memory() -> Iterator[None]:
    """Inside, what `torch.empty` and its relatives give is NaN and lies between guard words; what `torch.zeros` gives
    lies between them too.

    Raises `AssertionError` at the end if a guard word has been written to.
    """
    buffers: list[Tensor] = []

    def guard(tensor: Tensor) -> Tensor:
        if tensor.device.type != "cpu" or type(tensor) is not Tensor:
            return tensor
        size = tensor.untyped_storage().nbytes()
        buffer = torch.full((GUARD + size + GUARD,), POISON, dtype=torch.uint8)
        buffers.append(buffer)
        offset = GUARD // tensor.element_size()
        guarded = torch.tensor([], dtype=tensor.dtype)
        guarded.set_(buffer.untyped_storage(), offset, tensor.shape, tensor.stride())
        return guarded.requires_grad_(tensor.requires_grad)

    with _changed_makers(guard), _changed_makers(lambda zeros: guard(zeros).zero_(), _ZERO_MAKERS):
        yield
    for buffer in buffers:
        for where, words in (("before", buffer[:GUARD]), ("after", buffer[-GUARD:])):
            if written := int((words != POISON).sum()):
                raise AssertionError(
                    f"{written} bytes {where} a tensor of {len(buffer) - 2 * GUARD} bytes were written to"
                )


def surrounded(tensor: Tensor) -> Tensor:
    """The same values with NaN (-1 if whole numbers) before, after and between the rows of the last axis."""
    if tensor.ndim == 0:
        return tensor.clone()
    margin = GUARD // tensor.element_size()
    shape = (*tensor.shape[:-1], tensor.shape[-1] + margin)
    rows = tensor.shape[:-1].numel() * shape[-1]
    fill = torch.nan if tensor.is_floating_point() else -1
    room = torch.full((margin + rows,), fill, dtype=tensor.dtype)
    copy = room[margin:].view(shape)[..., : tensor.shape[-1]]
    copy.copy_(tensor)
    return copy


@contextmanager
def _changed_makers(
    change: Callable[[Tensor], Tensor], makers: Sequence[tuple[Any, str]] = _MAKERS
) -> Iterator[None]:
    def changed(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda *sizes, **options: change(make(*sizes, **options))

    with ExitStack() as stack:
        for place, name in makers:
            stack.enter_context(patch.object(place, name, changed(getattr(place, name))))
        yield
