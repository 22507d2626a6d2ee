"""Optional packages are absent or work; a broken one shows its own cause."""

from __future__ import annotations

import importlib
from types import ModuleType

from seqmix.core.errors import MissingExtra


def require(module: str, *, extra: str) -> ModuleType:
    """Imports `module`; raises `MissingExtra` naming the extra that brings it when it is absent."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name != module.partition(".")[0]:
            raise
        raise MissingExtra(
            f"{module} is needed here and is not installed: pip install 'seqmix[{extra}]'"
        ) from None
