"""What an operator is: one mathematical function, its definition, and the forms that compute it."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Generator, Tensor

from seqmix.core.cost import Cost
from seqmix.core.errors import NoUsableForm, UnknownName


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

    `why_not` gets the same arguments and returns None, or one sentence that says why it cannot run. A `fused`
    form computes the public function as a whole, from the arguments as they came: see `Operator.fused`.
    """

    run: Callable[..., Any]
    why_not: Callable[..., str | None] = _always
    trains: bool = True
    fused: bool = False


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

    def fused(self, form: str | None, *inputs: Any, **options: Any) -> Callable[..., Any] | None:
        """The fused form that was asked for by name, or the first that can run; None if it is not one's turn.

        The public function asks here after its checks, with its arguments as they came (what `why_not` of the
        form takes), and returns what the form returns. Raises `NoUsableForm` as `run` does.
        """
        for name, candidate in self.forms.items():
            if candidate.fused and form in (None, name):
                reason = candidate.why_not(*inputs, **options)
                if reason is None:
                    return partial(self._call_fused, name, candidate.run)
                if form == name:
                    raise NoUsableForm(self.name, {name: reason})
        return None

    def _call_fused(self, form: str, run: Callable[..., Any], *inputs: Any, **options: Any) -> Any:
        return self._call(form, run, inputs, options)

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
                if candidate.fused:
                    continue
                reason = candidate.why_not(*inputs, **options)
                if reason is None:
                    return self._call(name, candidate.run, inputs, options)
                rejected[name] = reason
            _warn_once(self.name, rejected)
        return self._call("definition", self.definition, inputs, options)

    def _call(self, form: str, run: Callable[..., Any], inputs: Any, options: Any) -> Any:
        note_form(self.name, form)
        device = inputs[0].device.type
        if not (torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)):
            return run(*inputs, **options)
        with torch.autocast(device, enabled=False):  # the dtype is chosen already
            return run(*inputs, **options)


def with_extremes(
    sample: Callable[[Case, Generator], dict[str, Any]], name: str
) -> Callable[[Case, Generator], dict[str, Any]]:
    """An operator's `extreme`: what `sample` gives, but argument `name` from nothing to very large, side by side."""

    def extreme(case: Case, generator: Generator) -> dict[str, Any]:
        inputs = sample(case, generator)
        levels = torch.tensor([0.0, 1e-20, -1.0, 1e10, -1e10])
        inputs[name] = levels[torch.randint(len(levels), inputs[name].shape, generator=generator)]
        return inputs

    return extreme


def note_form(operator: str, form: str) -> None:
    """Tells `record_forms` which form of an operator runs; what computes several operators at once says so itself."""
    for record in _records:
        record.add((operator, form))


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
