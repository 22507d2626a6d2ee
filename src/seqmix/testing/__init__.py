"""Public laws, for our own parts and for anyone's.

`check_operator(OPERATOR)` runs every law on every form and case and raises at the first that is broken;
`check_mixer(MIXER)` and `check_channel(CHANNEL)` do so on every configuration that the class names.
"""

from __future__ import annotations

import importlib
from typing import Any

_HOMES = {
    "CHANNEL_LAWS": "channels",
    "MIXER_LAWS": "mixers",
    "OPERATOR_LAWS": "operators",
    "TASK_LAWS": "tasks",
    "check_channel": "channels",
    "check_mixer": "mixers",
    "check_model": "models",
    "check_operator": "operators",
    "check_task": "tasks",
    "check_transform": "transforms",
    "poisoned_memory": "_memory",
}

__all__ = [
    "CHANNEL_LAWS",
    "MIXER_LAWS",
    "OPERATOR_LAWS",
    "TASK_LAWS",
    "check_channel",
    "check_mixer",
    "check_model",
    "check_operator",
    "check_task",
    "check_transform",
    "poisoned_memory",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
