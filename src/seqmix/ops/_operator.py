"""What an operator is: one mathematical function, its definition, and the forms that compute it."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Generator, Tensor

from seqmix.core.cost import Cost
from seqmix.core.errors import DtypeError, NoUsableForm, RangeError, ShapeError, UnknownName
from seqmix.core.state import State, concatenate_rows, map_state


def _always(*inputs: Any, **options: Any) -> None:
    return None


def longer_than(most: int) -> Callable[..., str | None]:
    """Why the loop over tokens, the fastest form for a few, does not run on more than `most` of them."""

    def why_not(first: Tensor, *inputs: Any, **options: Any) -> str | None:
        length = first.shape[1]
        if length <= most:
            return None
        return f"{length} tokens are more than {most}: use form='definition' for the loop"

    return why_not


@dataclass(frozen=True)
class Form:
    """One way to compute an operator, with the definition's signature.

    `why_not` gets the same arguments and returns None, or one sentence that says why it cannot run.
    """

    run: Callable[..., Any]
    why_not: Callable[..., str | None] = _always
    trains: bool = True


@dataclass(frozen=True)
class Case:
    """Sizes (by axis letter) and options for which an operator is checked, timed or costed."""

    name: str
    sizes: Mapping[str, int]
    options: Mapping[str, Any] = field(default_factory=dict)

    def __getitem__(self, key: str) -> Any:
        return self.sizes[key] if key in self.sizes else self.options[key]

    def get(self, key: str, default: Any = None) -> Any:
        return self.sizes.get(key, self.options.get(key, default))

    def at(self, name: str | None = None, **sizes: int) -> Case:
        """The same case with other sizes."""
        return replace(self, name=name or self.name, sizes={**self.sizes, **sizes})


@dataclass(frozen=True, kw_only=True)
class Operator:
    """One operator: what a reader checks against the paper, and what every other part derives from it.

    `axes` gives the layout of each tensor argument of `function` as axis letters, e.g. "B T H K" (several
    layouts in a tuple); a token `T*steps` is a product with an integer option. The letters T and S are time.
    `value` names the argument in which the operator is linear, from which mixing matrices are derived.
    Zero padding of every time-wise input of a form (after the public function has prepared it) must leave
    the state unchanged, which is how packed sequences are computed.
    """

    function: Callable[..., Any]
    equation: str
    source: str
    axes: Mapping[str, str | tuple[str, ...]]
    definition: Callable[..., Any]
    forms: Mapping[str, Form]
    sample: Callable[[Case, Generator], dict[str, Any]]
    cases: Sequence[Case]
    timing: Sequence[Case]
    cost: Callable[[Case], Cost]
    value: str | None = None
    chunk: int = 64
    extreme: Callable[[Case, Generator], dict[str, Any]] | None = None

    @property
    def name(self) -> str:
        return self.function.__name__

    @property
    def has_state(self) -> bool:
        return "initial_state" in self.axes

    def reasons(self, *inputs: Any, **options: Any) -> dict[str, str | None]:
        """For each form, in order of preference: None if it can run on these inputs, else why not."""
        return {n: form.why_not(*inputs, **options) for n, form in self.forms.items()}

    def run(self, form: str | None, *inputs: Any, **options: Any) -> Any:
        """Runs the named form, or the first that can; the definition is the last resort, with a warning."""
        if form is not None and form != "definition":
            if form not in self.forms:
                raise UnknownName(f"form of {self.name}", form, [*self.forms, "definition"])
            if reason := self.forms[form].why_not(*inputs, **options):
                raise NoUsableForm(self.name, {form: reason})
            return self._call(form, self.forms[form].run, inputs, options)
        rejected: dict[str, str] = {}
        if form is None:
            for name, candidate in self.forms.items():
                reason = candidate.why_not(*inputs, **options)
                if reason is None:
                    return self._call(name, candidate.run, inputs, options)
                rejected[name] = reason
            _warn_once(self.name, rejected)
        return self._call("definition", self.definition, inputs, options)

    def _call(self, form: str, run: Callable[..., Any], inputs: Any, options: Any) -> Any:
        for record in _records:
            record.add((self.name, form))
        device = inputs[0].device.type
        if not torch.amp.is_autocast_available(device):
            return run(*inputs, **options)
        with torch.autocast(
            device, enabled=False
        ):  # the public function has chosen the dtype already
            return run(*inputs, **options)


_records: list[set[tuple[str, str]]] = []
_warned: set[str] = set()


@contextmanager
def record_forms() -> Iterator[set[tuple[str, str]]]:
    """Collects the (operator, form) pairs that run inside the block: which implementation was in use."""
    record: set[tuple[str, str]] = set()
    _records.append(record)
    try:
        yield record
    finally:
        _records[:] = [other for other in _records if other is not record]


def _warn_once(operator: str, rejected: dict[str, str]) -> None:
    if operator not in _warned:
        _warned.add(operator)
        reasons = "; ".join(f"{name}: {reason}" for name, reason in rejected.items())
        warnings.warn(
            f"{operator} runs its definition, a slow loop over tokens ({reasons}).", stacklevel=4
        )


def check_tensors(
    operator: str,
    axes: Mapping[str, str | tuple[str, ...]],
    tensors: Mapping[str, Tensor | None],
    **sizes: int,
) -> dict[str, int]:
    """Checks each tensor against its axes and returns the size of every letter.

    Sizes are bound in the order of `tensors`, after those given. None stands for an absent optional
    argument. Raises `ShapeError` or `DtypeError` naming the argument, what came and what was wanted.
    """
    device = None
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        if not isinstance(tensor, Tensor):
            raise DtypeError(
                f"{operator}: `{name}` is {type(tensor).__name__}, wanted a torch.Tensor. "
                "Convert it with torch.as_tensor."
            )
        if not tensor.is_floating_point():
            raise DtypeError(
                f"{operator}: `{name}` has dtype {_dtype(tensor)}, wanted a floating-point dtype. "
                f"Pass {name}.float()."
            )
        if device is not None and tensor.device != device:
            raise DtypeError(
                f"{operator}: `{name}` is on {tensor.device}, the arguments before it on {device}. "
                f"Pass {name}.to({str(device)!r})."
            )
        device = tensor.device
        allowed = axes[name]
        layouts = allowed if isinstance(allowed, tuple) else (allowed,)
        sizes = _bind(operator, name, tensor, [layout.split() for layout in layouts], sizes)
        if (
            not tensor.numel() and name != "initial_state"
        ):  # a kernel of one tap has an empty history
            raise ShapeError(
                f"{operator}: `{name}` has shape {list(tensor.shape)}, wanted at least one of everything. "
                "Leave out the call where there are no tokens."
            )
    return sizes


def _bind(
    operator: str, name: str, tensor: Tensor, layouts: list[list[str]], sizes: dict[str, int]
) -> dict[str, int]:
    shape = list(tensor.shape)
    for layout in layouts:
        bound = dict(sizes)
        if len(layout) == len(shape) and all(
            _matches(token, size, bound) for token, size in zip(layout, shape, strict=True)
        ):
            return bound
    wanted = " or ".join(
        f"[{', '.join(layout)}] = [{', '.join(_size(token, sizes) for token in layout)}]"
        for layout in layouts
    )
    raise ShapeError(
        f"{operator}: `{name}` has shape {shape}, wanted {wanted}.{_mend(name, shape, layouts, sizes)}"
    )


def _matches(token: str, size: int, sizes: dict[str, int]) -> bool:
    """Whether `size` fits the axis; binds a letter seen for the first time."""
    letter, _, option = token.partition("*")
    if option:
        return size == sizes[letter] * sizes[option] if letter in sizes else False
    return sizes.setdefault(letter, size) == size


def _size(token: str, sizes: dict[str, int]) -> str:
    if token in sizes:
        return str(sizes[token])
    letter, _, option = token.partition("*")
    if option and letter in sizes:
        return str(sizes[letter] * sizes[option])
    return "any"


def _mend(name: str, shape: list[int], layouts: list[list[str]], sizes: dict[str, int]) -> str:
    for layout in layouts:
        if len(layout) == len(shape) and len(shape) > 2:
            swapped = [shape[0], shape[2], shape[1], *shape[3:]]
            if swapped != shape and all(
                _size(token, sizes) in ("any", str(size))
                for token, size in zip(layout, swapped, strict=True)
            ):
                return f" It looks head-first: pass {name}.transpose(1, 2)."
    if all(len(layout) != len(shape) for layout in layouts):
        return f" It has {len(shape)} axes: reshape or unsqueeze it to this layout (time second)."
    return " Make its sizes agree with the arguments before it."


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def check_not_positive(operator: str, name: str, tensor: Tensor | None) -> None:
    """Decays are given as logarithms: raises `RangeError` where one is above 0 or NaN."""
    if tensor is not None and tensor.numel() and not bool((tensor.detach() <= 0).all()):
        raise RangeError(
            f"{operator}: `{name}` reaches {float(tensor.detach().max()):.4g}, wanted log decays of at most 0 "
            f"(and no NaN). Pass the logarithm of a decay in (0, 1], e.g. torch.nn.functional.logsigmoid({name})."
        )


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
    """Texts of different lengths laid end to end in one row `[1, total, ...]`, bounded by `cu_seqlens [N+1]`."""

    def __init__(self, operator: str, cu_seqlens: Tensor, like: Tensor) -> None:
        bounds = (
            cu_seqlens.detach().to("cpu", torch.long) if isinstance(cu_seqlens, Tensor) else None
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
        self._bounds, self._lengths, self._device = bounds, lengths, like.device
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
        tokens, places = self._bounds[texts][row] + place, row * longest + place
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
