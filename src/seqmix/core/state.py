"""A state is a value: what a model remembers of the texts it has read, one row per text.

A state is any nesting of dicts, lists and tuples over tensors whose first axis is the batch, `Growing`
tensors (key-value caches), and None. Nothing that a model does changes a state that it was given, so a
state can be kept, forked, reordered, rolled back and saved, for attention, recurrences, convolution
histories and any mix of them alike.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from seqmix.core.errors import CheckpointError, RangeError
from seqmix.core.files import write_atomically

State = Any  # a nesting of dict, list, tuple over Tensor, Growing and None


class _Storage:
    """Room for a growing tensor, and the number of the version that wrote to it last."""

    def __init__(self, data: Tensor | Callable[[], Tensor]) -> None:
        self._data = data
        self._with_gradients = torch.is_grad_enabled()
        self.stamp = 0

    @property
    def data(self) -> Tensor:
        if not isinstance(self._data, Tensor):
            # Looked at first without gradients, it must still be what it would have been when it was due.
            with torch.inference_mode(False), torch.set_grad_enabled(self._with_gradients):
                self._data = self._data()
        return self._data


class Growing:
    """A tensor `[B, S, ...]` that grows along S; appending gives a new value and leaves the old one as it was.

    Versions share one storage with spare room. The newest version appends in place, which costs no copy of
    what is there; an older one (a fork, a roll-back) copies first. So appending to a key-value cache is as
    cheap as in a mutable cache, and a cache still is a value. Where autograd records, every append copies.
    """

    def __init__(self, data: Tensor) -> None:
        self._storage = _Storage(data)
        self._length = data.shape[1]
        self._stamp = 0

    @classmethod
    def deferred(cls, make: Callable[[], Tensor], length: int) -> Growing:
        """The tensor `make() [B, length, ...]`, made when it is first looked at: training never looks."""
        grown = cls.__new__(cls)
        grown._storage, grown._length, grown._stamp = _Storage(make), length, 0
        return grown

    @property
    def tensor(self) -> Tensor:
        """The `[B, S, ...]` contents, a view."""
        return self._storage.data[:, : self._length]

    @property
    def room(self) -> Tensor:
        """The contents `[B, S, ...]` and, behind them, what there is room for."""
        return self._storage.data

    @property
    def length(self) -> int:
        return self._length

    def append(self, new: Tensor) -> Growing:
        """This tensor followed by `new [B, T, ...]`."""
        # Autograd wants no in-place writes: a query with a gradient keeps the keys, even if they have none.
        if torch.is_grad_enabled():
            return Growing(torch.cat([self.tensor, new], dim=1))
        grown = self.extended(new.shape[1])
        grown._storage.data[:, self._length : grown._length] = new
        return grown

    def extended(self, count: int) -> Growing:
        """This tensor with `count` more entries that hold anything: the caller writes them, before any other use."""
        storage, length = self._storage, self._length + count
        frozen = storage.data.is_inference() and not torch.is_inference_mode_enabled()
        if storage.stamp != self._stamp or length > storage.data.shape[1] or frozen:
            shape = list(self.tensor.shape)
            shape[1] = length + max(32, length // 4)
            data = storage.data.new_zeros(shape)
            data[:, : self._length] = self.tensor
            storage = _Storage(data)
        storage.stamp += 1
        grown = Growing.__new__(Growing)
        grown._storage, grown._length, grown._stamp = storage, length, storage.stamp
        return grown

    def __repr__(self) -> str:
        return f"Growing({list(self.tensor.shape)}, {self.tensor.dtype})"


def map_state(function: Callable[..., Tensor], state: State, *others: State) -> State:
    """Applies `function` to every tensor of `state` (and the matching ones of `others`), keeping the nesting."""
    if state is None:
        return None
    if isinstance(state, Tensor):
        return function(state, *others)
    if isinstance(state, Growing):
        return Growing(function(state.tensor, *(other.tensor for other in others)))
    if isinstance(state, dict):
        return {k: map_state(function, v, *(o[k] for o in others)) for k, v in state.items()}
    if isinstance(state, list | tuple):
        parts = [map_state(function, v, *(o[i] for o in others)) for i, v in enumerate(state)]
        return type(state)(parts)
    raise TypeError(f"a state holds tensors, not {type(state).__name__}")


def leaves(state: State) -> Iterator[Tensor]:
    """Every tensor of the state, in order."""
    if isinstance(state, Tensor):
        yield state
    elif isinstance(state, Growing):
        yield state.tensor
    elif state is not None:
        for part in state.values() if isinstance(state, dict) else state:
            yield from leaves(part)


def num_rows(state: State) -> int:
    """The batch size; 0 for a state without tensors."""
    return next((leaf.shape[0] for leaf in leaves(state)), 0)


def num_bytes(state: State) -> int:
    """Bytes that the contents take (not the spare room of growing tensors)."""
    return sum(leaf.numel() * leaf.element_size() for leaf in leaves(state))


def select_rows(state: State, rows: Tensor | Sequence[int]) -> State:
    """The given rows, in the given order; a row may repeat. Beam search reorders with it."""
    first = next(leaves(state), None)
    if first is None:
        return state
    rows = torch.as_tensor(rows, dtype=torch.long, device=first.device)
    if rows.numel() and not 0 <= int(rows.min()) <= int(rows.max()) < first.shape[0]:
        raise RangeError(
            f"select_rows: `rows` runs from {int(rows.min())} to {int(rows.max())}, "
            f"but the state has rows 0 to {first.shape[0] - 1}."
        )
    return map_state(lambda leaf: leaf.index_select(0, rows), state)


def fork(state: State, copies: int) -> State:
    """Every row `copies` times in a row: `[a, b]` becomes `[a, a, b, b]` for two copies."""
    return map_state(lambda leaf: leaf.repeat_interleave(copies, dim=0), state)


def concatenate_rows(states: Sequence[State]) -> State:
    """One state with the rows of all.

    Texts end together: what grows with a text is aligned to the right, with zeros before the shorter ones, and
    where a part of a state tells the beginning of its rows (`start [B]`), it tells them anew.
    """
    first = states[0]
    if isinstance(first, Growing):
        return Growing(torch.cat(_end_together([each.tensor for each in states])))
    if isinstance(first, dict) and "start" in first:
        keys = first["keys"]
        lengths = [
            (s["keys"].tensor if isinstance(keys, Growing) else s["keys"]).shape[1] for s in states
        ]
        rest = {
            name: concatenate_rows([s[name] for s in states])
            if isinstance(part, Growing) or part.ndim < 2
            else torch.cat(_end_together([s[name] for s in states]))
            for name, part in first.items()
        }
        starts = [s["start"] + max(lengths) - n for s, n in zip(states, lengths, strict=True)]
        return {**rest, "start": torch.cat(starts)}
    if isinstance(first, dict):
        return {name: concatenate_rows([s[name] for s in states]) for name in first}
    if isinstance(first, list | tuple):
        return type(first)(concatenate_rows(parts) for parts in zip(*states, strict=True))
    return map_state(lambda *parts: torch.cat(parts, dim=0), first, *states[1:])


def _end_together(tensors: Sequence[Tensor]) -> list[Tensor]:
    """`[B, S, ...]` of several lengths S, with zeros before the shorter ones."""
    longest = max(tensor.shape[1] for tensor in tensors)
    return [
        torch.cat([t.new_zeros(t.shape[0], longest - t.shape[1], *t.shape[2:]), t], dim=1)
        if t.shape[1] < longest
        else t
        for t in tensors
    ]


def trim_rows(state: State, longest: int) -> State:
    """The same state without the columns before the texts, of which the longest has `longest` tokens.

    They are there after a longer text has left the batch.
    """
    if isinstance(state, Growing):
        return Growing(state.tensor[:, -longest:].clone()) if state.length > longest else state
    if isinstance(state, dict) and "start" in state:
        unused = int(state["start"].min())
        if not unused:
            return state
        cut = {
            name: map_state(lambda leaf: leaf[:, unused:].clone() if leaf.ndim > 1 else leaf, part)
            for name, part in state.items()
        }
        return {**cut, "start": state["start"] - unused}
    if isinstance(state, dict):
        return {name: trim_rows(part, longest) for name, part in state.items()}
    if isinstance(state, list | tuple):
        return type(state)(trim_rows(part, longest) for part in state)
    return state


def detach(state: State) -> State:
    """The same values, cut from the autograd graph (truncated back-propagation through time)."""
    return map_state(lambda leaf: leaf.detach(), state)


class History:
    """The last `depth` states of a text, so that up to `depth - 1` tokens can be taken back.

    States share storage where they can, so keeping key-value caches costs nothing extra; a recurrent state
    is kept once per token.
    """

    def __init__(self, state: State, *, depth: int) -> None:
        if depth < 1:
            raise RangeError(f"History: depth={depth}, wanted at least 1.")
        self._states: list[State] = [state]
        self._depth = depth

    @property
    def state(self) -> State:
        """The newest state."""
        return self._states[-1]

    def push(self, state: State) -> None:
        """Remembers the state after one more token."""
        self._states = [*self._states, state][-self._depth :]

    def roll_back(self, tokens: int) -> State:
        """Takes back `tokens` tokens and returns the state before them; raises `RangeError` beyond the depth."""
        if not 0 <= tokens < len(self._states):
            raise RangeError(
                f"roll_back: tokens={tokens}, but this history reaches back {len(self._states) - 1} tokens. "
                "Make it with a larger `depth`."
            )
        self._states = self._states[: len(self._states) - tokens]
        return self.state


def save_state(state: State, path: str | Path, *, note: Mapping[str, str] | None = None) -> Path:
    """Writes the state to one safetensors file (no pickle), atomically; `read_note` reads the note back."""
    from safetensors.torch import save_file

    tensors: dict[str, Tensor] = {}
    structure = json.dumps(_describe(state, "state", tensors))
    metadata = {**(note or {}), "format": "seqmix-state", "structure": structure}
    return write_atomically(path, lambda temporary: save_file(tensors, temporary, metadata))


def load_state(path: str | Path, *, device: str | torch.device = "cpu") -> State:
    """Reads what `save_state` wrote; raises `CheckpointError` for anything else."""
    with _opened(path, device) as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
        return _rebuild(json.loads(file.metadata()["structure"]), tensors)


def read_note(path: str | Path) -> dict[str, str]:
    """The note that `save_state` wrote beside a state; nothing else is read. Raises `CheckpointError` as it does."""
    with _opened(path) as file:
        return {k: v for k, v in file.metadata().items() if k not in ("format", "structure")}


@contextmanager
def _opened(path: str | Path, device: str | torch.device = "cpu") -> Iterator[Any]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="pt", device=str(device)) as file:
            if (file.metadata() or {}).get("format") != "seqmix-state":
                raise CheckpointError(
                    f"{path} is a safetensors file, but not one that save_state wrote."
                )
            yield file
    except FileNotFoundError:
        raise CheckpointError(f"There is no state at {path}.") from None
    except (
        SafetensorError,
        KeyError,
        TypeError,
        ValueError,
        AttributeError,
        RecursionError,
    ) as error:
        raise CheckpointError(f"{path} is damaged or not a state: {error}.") from None


def _describe(state: State, name: str, tensors: dict[str, Tensor]) -> Any:
    if state is None:
        return None
    if isinstance(state, Tensor | Growing):
        tensors[name] = (state if isinstance(state, Tensor) else state.tensor).contiguous().clone()
        return {"tensor" if isinstance(state, Tensor) else "growing": name}
    if isinstance(state, dict):
        return {"dict": {k: _describe(v, f"{name}.{k}", tensors) for k, v in state.items()}}
    kind = "list" if isinstance(state, list) else "tuple"
    return {kind: [_describe(v, f"{name}.{i}", tensors) for i, v in enumerate(state)]}


def _rebuild(structure: Any, tensors: dict[str, Tensor]) -> State:
    if structure is None:
        return None
    (kind, content), *_ = structure.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "growing":
        return Growing(tensors[content])
    if kind == "dict":
        return {k: _rebuild(v, tensors) for k, v in content.items()}
    parts = [_rebuild(v, tensors) for v in content]
    return parts if kind == "list" else tuple(parts)
