"""seqmix: choose, train, compress and run efficient sequence models, with every claim measured.

    seqmix.compare(data, candidates, ...)    which architecture fits a text, a machine and a budget
    seqmix.compress(model, data, ...)        a cheaper model: pruned, sliced, factorised, quantised, or all of it
    seqmix.convert(model, data, to=...)      a pretrained Transformer with other mixers
    seqmix.train(model, data, ...)           a language model from a layout such as `3x[mamba2], attention`
    seqmix.evaluate(model, data)             perplexity and bits per byte
    seqmix.generate(model, prompt)           text
    seqmix.load(model)                       a trained or pretrained model and its tokenizer
    seqmix.reproduce(claim)                  a paper's claim, measured here
    seqmix.accelerate(model)                 a Hugging Face hybrid model on the operators of this package
    seqmix.ops, seqmix.mixers                the parts

Everything is loaded on first use, so importing the package costs next to nothing.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

from seqmix.models.registration import register_with_transformers

if TYPE_CHECKING:
    from seqmix import mixers, ops
    from seqmix.claims import reproduce
    from seqmix.convert.accelerate import accelerate
    from seqmix.generate import generate
    from seqmix.measure.compare import compare
    from seqmix.models.pretrained import load
    from seqmix.search import compress, convert  # type: ignore[no-redef]
    from seqmix.train import evaluate, train

__version__ = "0.1.0"

_FUNCTIONS = {  # public name -> the module that has it
    "accelerate": "seqmix.convert.accelerate",
    "compare": "seqmix.measure.compare",
    "compress": "seqmix.search",
    "convert": "seqmix.search",
    "evaluate": "seqmix.train",
    "generate": "seqmix.generate",
    "load": "seqmix.models.pretrained",
    "reproduce": "seqmix.claims",
    "train": "seqmix.train",
}
_PACKAGES = ("mixers", "ops")

__all__ = [
    "__version__",
    "accelerate",
    "compare",
    "compress",
    "convert",
    "evaluate",
    "generate",
    "load",
    "mixers",
    "ops",
    "reproduce",
    "train",
]


def __getattr__(name: str) -> Any:
    if name in _FUNCTIONS:
        value = getattr(importlib.import_module(_FUNCTIONS[name]), name)
        globals()[name] = value
        return value
    if name in _PACKAGES:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


class _Package(ModuleType):
    """Importing the subpackage `seqmix.train` would bind that module to the name of the public function.

    `seqmix.train` is the function whatever was imported first; the subpackage's other names are reached by
    `from seqmix.train import ...`, which looks in `sys.modules`.
    """

    def __setattr__(self, name: str, value: object) -> None:
        if not (name in _FUNCTIONS and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
register_with_transformers()
