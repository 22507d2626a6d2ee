"""What a comparison holds equal and how large it is: presets, and the settings that a command adds."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from seqmix.core.config import Config
from seqmix.core.errors import ConfigError, RangeError

SIZES = ("parameters", "width")
EFFORTS = ("tokens", "seconds")


@dataclass(frozen=True, kw_only=True)
class Preset(Config):
    """Sizes of a comparison. `tokens` or `seconds` of training count for each candidate and seed."""

    width: int
    depth: int
    heads: int
    length: int
    batch: int
    tokens: int
    seconds: float
    learning_rate: float
    contexts: tuple[int, ...]
    measure_seconds: float  # for each speed and context


PRESETS = {
    "quick": Preset(
        width=96,
        depth=4,
        heads=4,
        length=256,
        batch=2,
        tokens=200_000,
        seconds=20,
        learning_rate=6e-3,
        contexts=(512, 2048, 8192),
        measure_seconds=0.3,
    ),
    "standard": Preset(
        width=256,
        depth=8,
        heads=4,
        length=512,
        batch=16,
        tokens=20_000_000,
        seconds=3600,
        learning_rate=2e-3,
        contexts=(512, 2048, 8192, 16384),
        measure_seconds=3.0,
    ),
}


def parse_equal(text: str) -> tuple[str, str]:
    """What is equal among candidates: their size (`parameters` or `width`) and effort (`tokens` or `seconds`).

    Names are separated by commas; what is left out is `parameters` and `tokens`.
    """
    size, effort = SIZES[0], EFFORTS[0]
    seen = []
    for name in (part.strip() for part in text.split(",")):
        if name in SIZES:
            size = name
        elif name in EFFORTS:
            effort = name
        else:
            known = [*SIZES, *EFFORTS]
            close = difflib.get_close_matches(name, known, n=1)
            hint = f" Did you mean {close[0]}?" if close else ""
            raise ConfigError(
                f"equal={text!r}: {name!r} cannot be held equal.{hint} Give one of {', '.join(SIZES)} (size) "
                f'and one of {", ".join(EFFORTS)} (training), such as "parameters, seconds".'
            )
        seen.append(SIZES if name in SIZES else EFFORTS)
    if len(seen) != len(set(seen)):
        raise ConfigError(
            f"equal={text!r} names two of one kind. Give one of {', '.join(SIZES)} and one of "
            f"{', '.join(EFFORTS)}."
        )
    return size, effort


def preset_with(name: str, changes: dict[str, Any]) -> Preset:
    """The preset with every change that is not None; raises `RangeError` for sizes below 1."""
    if name not in PRESETS:
        raise ConfigError(f"preset={name!r}, wanted one of {', '.join(PRESETS)}.")
    given = {key: value for key, value in changes.items() if value is not None}
    if "contexts" in given:
        given["contexts"] = tuple(sorted(set(given["contexts"])))
    preset = replace(PRESETS[name], **given)
    for field in fields(preset):
        value = getattr(preset, field.name)
        lowest = min(value, default=0) if isinstance(value, Sequence) else value
        if lowest <= 0:
            raise RangeError(f"{field.name}={value!r}, wanted more than 0.")
    return preset


def check_effort(
    size: str, effort: str, *, tokens: int | None, seconds: float | None, parameters: int | None
) -> None:
    """Raises where an amount is given that the chosen equality would ignore."""
    given = {"tokens": tokens, "seconds": seconds}
    (other,) = set(EFFORTS) - {effort}
    if given[other] is not None:
        raise ConfigError(
            f"{other}={given[other]} has no effect where {effort} are equal. "
            f"Leave it out, or give equal={other!r}."
        )
    if parameters is not None and size != "parameters":
        raise ConfigError(
            f"parameters={parameters} has no effect where the width is equal. "
            "Leave it out, or give equal='parameters'."
        )
