"""Which custom operators a computation calls, with what."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

Calls = dict[Any, tuple[Any, ...]]


class _Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: Calls = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace not in ("aten", "prim", "prims"):
            self.calls.setdefault(func, (args, kwargs or {}))
        return func(*args, **(kwargs or {}))


@contextmanager
def recorded_calls() -> Iterator[Calls]:
    """Collects operator -> (arguments, keywords) of the first call of every operator that is not PyTorch's own."""
    with _Recorder() as recorder:
        yield recorder.calls


def check_registration(operator: Any, args: Any, kwargs: Any) -> None:
    """Raises where schema, shape function or gradient of a custom operator do not do what PyTorch expects."""

    def fresh(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        trains = value.is_floating_point() and not operator._schema.is_mutable
        return value.detach().clone().requires_grad_(trains)

    utilities = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(
        operator,
        tuple(fresh(value) for value in args),
        {name: fresh(value) for name, value in kwargs.items()},
        test_utils=utilities,
    )
