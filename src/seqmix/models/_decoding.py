"""Blocks in one compiled call, where not too many tokens go through them.

While a model decodes, calling its parts one by one takes longer than what they compute, and a fifth of the time of a
short prompt.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from seqmix.core.state import Growing, State
from seqmix.kernels import decoding
from seqmix.kernels._custom import needs_no_dispatcher
from seqmix.kernels._native import native
from seqmix.layers.positions import FEW, Stretch, compute_turns, turns_of_few
from seqmix.models._halves import (
    KnownBlocks,
    as_read,
    channel_half,
    halves_of,
    is_plain,
    is_untouched,
    mixer_half,
)
from seqmix.ops._operator import note_form
from seqmix.ops._packing import Packing

if TYPE_CHECKING:
    from seqmix.models.backbone import Block

# Tokens of all texts, of the dtypes that kernels read. With more, PyTorch multiplies as fast in float32; in bfloat16 it
# is slow on most processors.
MOST = {torch.float32: 512, torch.bfloat16: 4096}
PADDED = 4  # times as many tokens as there are, where all packed texts were as long as the longest, at most


class _Memory(NamedTuple):
    """What attention reads and writes beside its weights.

    `after` is the state with room for what is new, `places` are the positions of what is new and their shape, [B, T] or
    [1, T] if they are those of all texts, and `bounds` are those of packed texts.
    """

    after: dict[str, Any]
    places: tuple[tuple[int, ...], tuple[int, int]]
    bounds: Tensor | None = None


class _Call:
    """Halves that one compiled call computes, one after the other, for x [B, T, D], or packed texts [1, total, D]."""

    def __init__(self, x: Tensor, cu_seqlens: Tensor | None = None) -> None:
        self.x = x
        self.cu_seqlens = cu_seqlens
        self._many: dict[tuple[Any, ...], tuple[Tensor, Tensor]] = {}
        self.width = x.shape[-1]
        self._halves: list[tuple[decoding.Half, decoding.Memory]] = []
        self._forms: frozenset[str] = frozenset()

    def attend(self, half: decoding.Half, attention: Any, state: State) -> State:
        """Adds a half of attention, to the state after it; None, and nothing is added, where the state does not fit."""
        c = attention.config
        if self.cu_seqlens is None:
            memory = _memory(c, self.x, state)
        else:
            memory = _packed_memory(c, self.x, state, self._texts)
        if memory is None:
            return None
        turns: tuple[Any, Any] = (None, None)
        if c.rope_base is not None:
            turns = self._turns(*memory.places, c.rope_base, c.turning, attention.stretch)
        keys, values, start = (memory.after[name] for name in ("keys", "values", "start"))
        self.add(half, (keys.room, values.room, keys.length, start, *turns, memory.bounds))
        return memory.after

    def _turns(
        self,
        places: tuple[int, ...],
        shape: tuple[int, int],
        base: float,
        width: int,
        stretch: Stretch | None,
    ) -> tuple[Tensor, Tensor]:
        """Cosines and signed sines of these places: of many once for all layers of the call."""
        if len(places) <= FEW:
            return turns_of_few(places, shape, base, width, stretch, torch.float32)
        key = (places, base, width, stretch)
        if key not in self._many:
            positions = torch.tensor(places, device="cpu").view(shape)
            self._many[key] = compute_turns(positions, base, width, stretch, torch.float32)
        return self._many[key]

    @cached_property
    def _texts(self) -> Packing:
        return Packing("attention", self.cu_seqlens, self.x)

    def add(self, half: decoding.Half, memory: decoding.Memory = decoding.NO_MEMORY) -> None:
        self._halves.append((half, memory))
        self._forms |= half.forms
        self.width = half.outputs

    def run(self) -> Tensor:
        for form in self._forms:
            note_form(form, "native")
        return decoding.decode(self.x, self._halves)


def blocks_step(
    blocks: Iterable[tuple[Block, State]],
    x: Tensor,
    known: KnownBlocks | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, list[State]] | None:
    """x [B, T, D] through as many whole blocks, from the first on, as kernels compute; each is given with its state.

    To what the last of them writes and the states after; None where there are none. With `cu_seqlens` x is
    [1, total, D], packed texts.
    """
    if not _is_few(x):
        return None
    call, after = _Call(x, cu_seqlens), []
    find = halves_of if known is None else known.of
    for block, state in blocks:
        halves = find(block, x, call.width)
        if halves is None:
            break
        if halves.mixer is not None:
            state = call.attend(halves.mixer, halves.attention, state)
            if state is None:
                break
        if halves.channel is not None:
            call.add(halves.channel)
        after.append(state)
    return (call.run(), after) if after else None


def mixer_step(
    block: Block, x: Tensor, state: State, cu_seqlens: Tensor | None = None
) -> tuple[Tensor, State] | None:
    """x [B, T, D] and the state to x + mixer(norm(x)) and the state after; None where no kernel does it."""
    half = mixer_half(block, x, x.shape[-1]) if _is_few(x) else None
    if half is None:
        return None
    call = _Call(x, cu_seqlens)
    after = call.attend(half, block._modules["mixer"], state)
    return None if after is None else (call.run(), after)


def channel_step(block: Block, x: Tensor) -> Tensor | None:
    """x [B, T, D] to x + channel(norm(x)); None where no kernel does it."""
    half = channel_half(block, x, x.shape[-1]) if _is_few(x) else None
    if half is None:
        return None
    call = _Call(x)
    call.add(half)
    return call.run()


def _memory(config: Any, x: Tensor, state: State) -> _Memory | None:
    """For tokens x [B, T, D] after a state, or at the beginning of texts; None for a state that does not fit."""
    rows, tokens = x.shape[:2]
    if state is None:
        after = _empty_room(config, x, rows, tokens)
        return _Memory(after, (tuple(range(tokens)), (1, tokens)))
    if not _is_state(state, rows, x, config):
        return None
    first, starts = state["keys"].length, state["start"].tolist()
    after = state | {name: state[name].extended(tokens) for name in ("keys", "values")}
    if len({*starts}) == 1:
        del starts[1:]
    places = tuple([first - begin + t for begin in starts for t in range(tokens)])
    return _Memory(after, (places, (len(starts), tokens)))


def _packed_memory(config: Any, x: Tensor, state: State, texts: Packing) -> _Memory | None:
    """The same of texts of several lengths, packed in x [1, total, D]. Their rows end together again.

    None as well for texts of very different lengths, which would take the room of many long ones.
    """
    new, rows = texts.lengths.tolist(), texts.num_texts
    if rows * texts.longest > PADDED * x.shape[1]:
        return None
    if state is None:
        state = _empty_room(config, x, rows, 0)
    if not _is_state(state, rows, x, config):
        return None
    before = state["keys"].length
    held = [before - begin for begin in state["start"].tolist()]
    total = [old + count for old, count in zip(held, new, strict=True)]
    longest = max(total)
    after: dict[str, Any] = {}
    for name in ("keys", "values"):
        old = state[name].tensor
        room = old.new_zeros(rows, longest, *old.shape[2:])
        for row, (some, every) in enumerate(zip(held, total, strict=True)):
            if some:
                begin = longest - every
                room[row, begin : begin + some] = old[row, before - some :]
        after[name] = Growing(room)
    after["start"] = longest - torch.tensor(total, device="cpu")
    places = tuple([old + t for old, count in zip(held, new, strict=True) for t in range(count)])
    return _Memory(after, (places, (1, len(places))), texts.bounds)


def _empty_room(config: Any, x: Tensor, rows: int, length: int) -> dict[str, Any]:
    """The state of attention after so many tokens that are not there yet."""
    shape = rows, length, config.groups, config.head_width
    kept = {name: Growing(x.new_empty(shape)) for name in ("keys", "values")}
    return {**kept, "start": torch.zeros(rows, dtype=torch.long, device="cpu")}


def head_step(head: nn.Module, features: Tensor) -> Tensor | None:
    """Features [B, T, D] to their logits [B, T, V]; None where no kernel does it, or they are many."""
    if type(head) is not nn.Linear or not _is_few(features):
        return None
    weight, bias = head.weight, head.bias
    if weight.dtype != features.dtype or weight.shape[1] != features.shape[-1]:
        return None
    if not (is_plain(weight) and is_plain(bias) and is_untouched(head)):
        return None
    return decoding.linear_step(features, weight, as_read(bias))


def _is_few(x: Tensor) -> bool:
    """Whether there are kernels for such tokens, and they are worth their while."""
    if native is None or torch.is_grad_enabled() or not needs_no_dispatcher(x, (x,)):
        return False
    if x.ndim != 3 or not 0 < x.shape[0] * x.shape[1] <= MOST.get(x.dtype, 0):
        return False
    if x.stride(-1) != 1:
        return False
    return not (torch.is_autocast_enabled("cpu") or _has_any_global_hook())


def _is_state(state: State, rows: int, x: Tensor, config: Any) -> bool:
    """Whether a state of attention is one of so many texts, in the dtype of x."""
    if not all(_is_kept(state[name], rows, x, config) for name in ("keys", "values")):
        return False
    start: Tensor = state["start"]
    if type(start) is not Tensor or not start.is_cpu or start.dtype != torch.int64:
        return False
    return start.is_contiguous() and start.shape == (rows,)


def _is_kept(kept: Any, rows: int, x: Tensor, config: Any) -> bool:
    """Whether these are keys or values of so many texts, in the dtype of x."""
    if type(kept) is not Growing:
        return False
    tensor = kept.room
    if type(tensor) is not Tensor or not tensor.is_cpu or tensor.stride(-1) != 1:
        return False
    found, _, groups, width = tensor.shape
    return (
        tensor.dtype == x.dtype
        and found == rows
        and groups == config.groups
        and width == config.head_width
    )
