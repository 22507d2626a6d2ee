"""How one form of an operator is tried: with what inputs, in which dtype, and against what it is compared."""

from __future__ import annotations

import sys
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from seqmix.core.errors import NoUsableForm, SeqmixError
from seqmix.core.numerics import assert_as_accurate, assert_equal_within
from seqmix.ops._operator import Case, Operator
from seqmix.testing import _axes as ax
from seqmix.testing._axes import Inputs, Values
from seqmix.testing._memory import default_dtype

EXACT = 1e-9  # two ways to compute one thing in float64, relative to the largest entry (and to one)
EXACT_FLOAT32 = 2e-5  # the same for forms that take only float32


class Inapplicable(Exception):
    """The law has nothing to say of this form and case; the message says why."""


def runnable(operator: Operator, form: str, case: Case, *, crossing: bool = False) -> Case:
    """The case, or a shorter one that the form can run (some forms are for a few tokens only).

    With `crossing` the text is first made long enough to cross the border of a chunk.
    """
    longest = max(case["T"], operator.chunk + 7) if crossing else case["T"]
    for length in sorted({longest, case["T"], 4, 3, 2, 1} - {*range(longest + 1, 5)}, reverse=True):
        shorter = ax.with_length(case, length)
        try:
            ax.call(operator, form, ax.draw(operator, shorter))
        except NoUsableForm as error:
            reason = str(error)
        else:
            return shorter
    raise Inapplicable(reason)


def sharp(
    operator: Operator, form: str, case: Case, *, crossing: bool = False
) -> tuple[Case, Inputs, float]:
    """A runnable case, its inputs in the widest dtype that the form takes, and the tolerance that follows."""
    case = runnable(operator, form, case, crossing=crossing)
    dtype, tolerance = sharpest(operator, form, case)
    return case, ax.draw(operator, case, dtype=dtype), tolerance


def sharpest(operator: Operator, form: str, case: Case) -> tuple[torch.dtype, float]:
    try:
        ax.call(operator, form, ax.draw(operator, case, dtype=torch.float64))
    except NoUsableForm:
        return torch.float32, EXACT_FLOAT32
    return torch.float64, EXACT


_KEPT = 512
_known: OrderedDict[Any, tuple[Values, Values]] = OrderedDict()


def by_definition(
    operator: Operator, case: Case, dtype: torch.dtype, *, extreme: bool = False
) -> tuple[Values, Values]:
    """Results and gradients of the definition on the case's inputs; kept, since every form is compared with them."""
    sizes, options = tuple(sorted(case.sizes.items())), repr(sorted(case.options.items()))
    key = (operator.function, operator.definition, case.name, sizes, options, dtype, extreme)
    if key not in _known:
        inputs = ax.draw(operator, case, extreme=extreme, dtype=dtype)
        _known[key] = ax.differentiate(
            operator, inputs, lambda i: ax.call(operator, "definition", i)
        )
        if len(_known) > _KEPT:
            _known.popitem(last=False)
    return _known[key]


def equal(got: Values, wanted: Values, tolerance: float, what: str = "") -> None:
    if got.keys() != wanted.keys():
        raise AssertionError(f"{what}: results {sorted(got)}, wanted {sorted(wanted)}")
    for name in wanted:
        assert_equal_within(got[name], wanted[name], what=f"{name}{what}", tolerance=tolerance)


def same_bits(first: tuple[Values, Values], second: tuple[Values, Values], what: str) -> None:
    for part in (0, 1):
        for name, value in first[part].items():
            if not torch.equal(value, second[part][name]):
                raise AssertionError(f"{name} differs {what}")


def by_form(
    operator: Operator,
    form: str,
    case: Case,
    dtype: torch.dtype,
    *,
    extreme: bool = False,
    place: Callable[[Tensor], Tensor] = torch.clone,
    default: torch.dtype = torch.float32,
) -> tuple[Values, Values]:
    inputs = ax.draw(operator, case, extreme=extreme, dtype=dtype)

    def call(inputs: Inputs) -> Values:
        with default_dtype(default):
            return ax.call(operator, form, inputs)

    if form in operator.forms and not operator.forms[form].trains:
        placed = ax.replace_tensors(operator, inputs, lambda _, x: place(x))
        return call(placed), {}
    return ax.differentiate(operator, inputs, call, place=place)


def agree(operator: Operator, form: str, case: Case, *, extreme: bool = False) -> None:
    """Exactly in float64, and in float32 as nearly as the definition itself."""
    exact = by_definition(operator, case, torch.float64, extreme=extreme)
    plain = by_definition(operator, case, torch.float32, extreme=extreme)
    got = by_form(operator, form, case, torch.float32, extreme=extreme)
    for part in (0, 1):
        for name, value in got[part].items():
            what = f"{name} at T={case['T']} in float32"
            assert_as_accurate(value, exact[part][name], plain[part][name], what=what)
    if sharpest(operator, form, case)[0] == torch.float64:
        sharp_got = by_form(operator, form, case, torch.float64, extreme=extreme)
        for part in (0, 1):
            equal(
                sharp_got[part], exact[part] if sharp_got[part] else {}, EXACT, f" at T={case['T']}"
            )


def refuses(
    operator: Operator, form: str, inputs: Inputs, blamed: Iterable[str], what: str
) -> None:
    try:
        ax.call(operator, form, inputs)
    except SeqmixError as error:
        if not any(f"`{name}`" in str(error) for name in blamed):
            raise AssertionError(f"the error for {what} does not name it: {error}") from error
    except Exception as error:
        raise AssertionError(f"{what} was not refused but failed: {error!r}") from error
    else:
        raise AssertionError(f"{what} was accepted")


@contextmanager
def installed(operator: Operator) -> Iterator[None]:
    """Inside, the operator's public function runs this description: how a changed copy is tried."""
    module = sys.modules[operator.function.__module__]
    before = module.OPERATOR
    module.OPERATOR = operator
    try:
        yield
    finally:
        module.OPERATOR = before
