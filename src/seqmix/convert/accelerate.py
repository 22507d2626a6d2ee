"""Hugging Face hybrid models on our operators: `accelerate` replaces the functions that they call, and puts them back.

transformers' modelling files write each recurrence as a function of the module (`causal_conv1d_fn`,
`mamba_selective_scan`, `torch_chunk_gated_delta_rule`, ...), which runs slowly in PyTorch unless a package for
GPUs is installed. Those functions are the places where ours go in; weights, caches and everything else stay.
"""

from __future__ import annotations

import inspect
import re
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import ModuleType
from typing import TYPE_CHECKING, Any

from seqmix.core.extras import require
from seqmix.core.lazy import after_imports

if TYPE_CHECKING:
    from torch import nn

_MODELLING = re.compile(r"(transformers\.models|transformers_modules)\..*\bmodeling_\w+").fullmatch
_INHERITED = object()  # nothing stood in the class itself
_lock = threading.RLock()


@dataclass(frozen=True)
class Replaced:
    """One function or forward that runs here: where it stands, and the operator that computes it."""

    module: str
    name: str
    operator: str


@dataclass
class _Entry:
    original: Any
    users: int = 0


_entries: dict[tuple[Any, str], _Entry] = {}  # (module or class, attribute) -> what stood there


@dataclass(eq=False)
class Acceleration:
    """What `accelerate` replaced. `undo()` puts it back, as does leaving a `with` block."""

    replaced: list[Replaced] = field(default_factory=list)
    _places: list[tuple[Any, str]] = field(default_factory=list, repr=False)
    _stop: Callable[[], None] | None = field(default=None, repr=False)

    def undo(self) -> None:
        """Puts back every reference that no other acceleration still replaces. A second call does nothing."""
        with _lock:
            if self._stop is not None:
                self._stop()
            for owner, name in self._places:
                entry = _entries[owner, name]
                entry.users -= 1
                if not entry.users:
                    if entry.original is _INHERITED:
                        delattr(owner, name)
                    else:
                        setattr(owner, name, entry.original)
                    del _entries[owner, name]
            self._places.clear()
            self.replaced.clear()

    def __enter__(self) -> Acceleration:
        return self

    def __exit__(self, *error: object) -> None:
        self.undo()

    def _add(self, module: ModuleType) -> None:
        from seqmix.convert._places import places

        with _lock:
            for place in places(module):
                key = (place.owner, place.name)
                if key not in _entries:
                    _entries[key] = _Entry(vars(place.owner).get(place.name, _INHERITED))
                    setattr(place.owner, place.name, place.make(getattr(place.owner, place.name)))
                _entries[key].users += 1
                self._places.append(key)
                if place.operator:
                    self.replaced.append(Replaced(module.__name__, place.label, place.operator))


def accelerate(model: nn.Module | None = None) -> Acceleration:
    """Makes the recurrences and short convolutions of Hugging Face models run on our operators.

    Logits, losses, gradients, generation and caches stay what they were, to rounding; what changes is the time.
    It works for inference and for training. Texts packed in one row (`seq_idx`, `cu_seq_lens_q`) are kept apart,
    for which transformers alone asks for another package. Tensors that are not on the CPU go where transformers
    sends them.

    Args:
        model: a transformers model; the functions of its modelling modules are replaced, which other models of
            the same architecture in this process share. None for every architecture, whenever it is imported.

    Returns:
        What was replaced, with `undo()`; usable as a context manager. Accelerating twice changes nothing more,
        and the references come back when the last of the accelerations is undone.

    Raises:
        MissingExtra: when transformers is not installed.

    Example:
        >>> handle = seqmix.accelerate(model)
        >>> model.generate(**inputs)
        >>> handle.undo()
    """
    require("transformers", extra="train")
    acceleration = Acceleration()
    if model is None:
        acceleration._stop = after_imports(_is_modelling, acceleration._add)
    for module in modelling_modules(model):
        acceleration._add(module)
    if model is not None and not acceleration.replaced:
        warnings.warn(
            f"seqmix.accelerate: {type(model).__name__} calls none of the functions that seqmix computes, so "
            "nothing changes. `seqmix explain NAME` shows the layers of a model.",
            stacklevel=2,
        )
    return acceleration


def modelling_modules(model: nn.Module | None = None) -> Iterator[ModuleType]:
    """The modules in which the classes of a model are written, or all of transformers' that are imported."""
    if model is None:
        names = [name for name in list(sys.modules) if _is_modelling(name)]
    else:
        names = sorted({type(layer).__module__ for layer in model.modules()})
    for name in names:
        module = sys.modules.get(name)
        if inspect.ismodule(module):
            yield module


def _is_modelling(name: str) -> bool:
    return _MODELLING(name) is not None
