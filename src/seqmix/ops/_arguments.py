"""Arguments of operators are checked here: what is wrong is said by name, with what to do."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from seqmix.core.errors import DtypeError, RangeError, ShapeError


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
    key = _signature(operator, axes, tensors, sizes)
    if key is not None and (passed := _known.get(key)) is not None:  # another thread may clear it
        return passed.copy()
    found = _check(operator, axes, tensors, sizes)
    if key is not None:
        if len(_known) >= MOST_KNOWN:
            _known.clear()
        _known[key] = found.copy()
    return found


# What has passed: decoding asks the same thousands of times a second.
MOST_KNOWN = 4096
_known: dict[Any, dict[str, int]] = {}


def _signature(
    operator: str,
    axes: Mapping[str, str | tuple[str, ...]],
    tensors: Mapping[str, Tensor | None],
    sizes: dict[str, int],
) -> Any:
    """All that the checks depend on; None where sizes are no plain numbers, as in `torch.compile`."""
    if torch.compiler.is_compiling():
        return None
    parts: list[Any] = [operator, *sizes.items()]
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        if type(tensor) not in (Tensor, Parameter):
            return None
        parts += (name, axes[name], tensor.shape, tensor.dtype, tensor.device)
    return tuple(parts)


def _check(
    operator: str,
    axes: Mapping[str, str | tuple[str, ...]],
    tensors: Mapping[str, Tensor | None],
    sizes: dict[str, int],
) -> dict[str, int]:
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
    """Decays are given as logarithms: raises `RangeError` where one is above 0 or NaN.

    Not inside `torch.compile`, which traces without values.
    """
    if torch.compiler.is_compiling():
        return
    if tensor is not None and tensor.numel() and not bool((tensor.detach() <= 0).all()):
        raise RangeError(
            f"{operator}: `{name}` reaches {float(tensor.detach().max()):.4g}, wanted log decays of at most 0 "
            f"(and no NaN). Pass the logarithm of a decay in (0, 1], e.g. torch.nn.functional.logsigmoid({name})."
        )
