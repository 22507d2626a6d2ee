"""Public laws, for our own parts and for anyone's.

`check_operator(OPERATOR)` runs every law on every form and case and raises at the first that is broken.
"""

from __future__ import annotations

import importlib
from typing import Any

_HOMES = {
    "OPERATOR_LAWS": "operators",
    "check_operator": "operators",
    "poisoned_memory": "_memory",
}

__all__ = ["OPERATOR_LAWS", "check_operator", "poisoned_memory"]  # noqa: F822 (loaded on first use)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
