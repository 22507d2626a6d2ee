"""What the laws know of an operator: the axes of its arguments. Nothing here depends on an operator's name."""

from __future__ import annotations

import inspect
import zlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from seqmix.core.state import leaves
from seqmix.ops._operator import Case, Operator

Inputs = dict[str, Any]
Values = dict[str, Tensor]


def accepts(operator: Operator, argument: str) -> bool:
    """Whether the public function has an argument of this name."""
    return argument in inspect.signature(operator.function).parameters


def with_length(case: Case, length: int) -> Case:
    """The case at another T; S moves along, so that queries keep their distance to the first key."""
    sizes = {"T": length}
    if "S" in case.sizes:
        sizes["S"] = case["S"] - case["T"] + length
    return case.at(None, **sizes)


def draw(
    operator: Operator, case: Case, *, seed: int = 0, extreme: bool = False, dtype: Any = None
) -> Inputs:
    """Arguments of the public function: the operator's own sample, always the same for the same case."""
    generator = torch.Generator().manual_seed(zlib.crc32(case.name.encode()) + seed)
    make = operator.extreme if extreme and operator.extreme else operator.sample
    inputs = make(case, generator)
    return inputs if dtype is None else cast(operator, inputs, dtype)


def tensors(operator: Operator, inputs: Inputs) -> Values:
    """The arguments whose axes are known."""
    return {n: x for n, x in inputs.items() if n in operator.axes and isinstance(x, Tensor)}


def replace_tensors(
    operator: Operator, inputs: Inputs, change: Callable[[str, Tensor], Tensor]
) -> Inputs:
    return {**inputs, **{n: change(n, x) for n, x in tensors(operator, inputs).items()}}


def cast(operator: Operator, inputs: Inputs, dtype: torch.dtype) -> Inputs:
    return replace_tensors(operator, inputs, lambda _, x: x.to(dtype))


def layout(operator: Operator, case: Case, name: str, tensor: Tensor) -> list[str]:
    """The axis letters of this tensor, among the layouts that its argument may have."""
    layouts = operator.axes[name]
    choices = [layouts] if isinstance(layouts, str) else list(layouts)
    fitting = [c.split() for c in choices if len(c.split()) == tensor.ndim]
    for tokens in fitting:
        sizes = [size_of(case, token) for token in tokens]
        if all(
            size in (None, 1, had) or had == 1
            for size, had in zip(sizes, tensor.shape, strict=True)
        ):
            return tokens
    return fitting[0]


def size_of(case: Case, token: str) -> int | None:
    """The size of an axis such as `T` or `T*steps`; None where the case does not say."""
    letter, _, option = token.partition("*")
    size = case.get("B" if letter == "R" else letter)
    return size if size is None or not option else size * case.get(option, 1)


def places(
    operator: Operator, case: Case, name: str, tensor: Tensor, letters: str
) -> list[tuple[int, str, int]]:
    """(dimension, letter, entries per index) of every axis with one of `letters`; broadcast axes are left out."""
    found = []
    for dimension, token in enumerate(layout(operator, case, name, tensor)):
        letter, _, option = token.partition("*")
        times = case.get(option, 1) if option else 1
        if letter in letters and (tensor.shape[dimension] > 1 or size_of(case, token) == 1):
            found.append((dimension, letter, times))
    return found


def along(
    operator: Operator,
    case: Case,
    inputs: Inputs,
    letters: str,
    change: Callable[[Tensor, int, str, int], Tensor],
) -> Inputs:
    """Applies `change(tensor, dimension, letter, entries per index)` to every axis with one of `letters`."""

    def changed(name: str, tensor: Tensor) -> Tensor:
        for dimension, letter, times in places(operator, case, name, tensor, letters):
            tensor = change(tensor, dimension, letter, times)
        return tensor

    return replace_tensors(operator, inputs, changed)


def cut(operator: Operator, case: Case, inputs: Inputs, start: int, stop: int) -> Inputs:
    """Tokens `start` to `stop` of every argument that has a time axis."""
    return along(
        operator,
        case,
        inputs,
        "TS",
        lambda x, dimension, _, times: x.narrow(dimension, start * times, (stop - start) * times),
    )


def rows(operator: Operator, case: Case, inputs: Inputs, order: Sequence[int]) -> Inputs:
    """The given batch rows, and the same rows of the initial state."""
    index = torch.as_tensor(order)
    return along(
        operator, case, inputs, "BR", lambda x, dimension, *_: x.index_select(dimension, index)
    )


def call(operator: Operator, form: str | None, inputs: Inputs) -> Values:
    """The public function's results by name: `o`, and the tensors of the final state if there is one."""
    if not operator.has_state:
        return {"o": operator.function(**inputs, form=form)}
    output, state = operator.function(**inputs, output_final_state=True, form=form)
    named = {f"final_state{i or ''}": leaf for i, leaf in enumerate(leaves(state))}
    return {"o": output, **named}


def differentiate(
    operator: Operator,
    inputs: Inputs,
    compute: Callable[[Inputs], Values],
    *,
    cotangent_dtype: torch.dtype | None = None,
    place: Callable[[Tensor], Tensor] = torch.clone,
) -> tuple[Values, Values]:
    """Results, and the gradients of every tensor argument under fixed random cotangents of every result.

    `place` copies the arguments, and the gradients of results on their way back, to where they are to lie.
    """
    given = tensors(operator, inputs)
    variables = {n: place(x.detach()).requires_grad_() for n, x in given.items()}
    results = compute({**inputs, **variables})
    generator = torch.Generator().manual_seed(7)
    total = torch.zeros((), dtype=torch.float64)
    for result in results.values():
        if place is not torch.clone and result.requires_grad:
            result.register_hook(place)
        cotangent = torch.randn(result.shape, generator=generator)
        if cotangent_dtype is not None:
            cotangent = cotangent.to(cotangent_dtype)
        total = total + (result.double() * cotangent.double()).sum()
    grads = torch.autograd.grad(total, list(variables.values()), allow_unused=True)
    named = {
        f"gradient of {n}": torch.zeros_like(x) if g is None else g
        for (n, x), g in zip(variables.items(), grads, strict=True)
    }
    return {n: x.detach() for n, x in results.items()}, named
