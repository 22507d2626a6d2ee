"""Configurations are small frozen dataclasses of plain JSON values beside the class they build."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from seqmix.core.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Config:
    """Base of every configuration: unknown fields are refused, and the values survive JSON."""

    @classmethod
    def fields(cls) -> list[str]:
        return [field.name for field in dataclasses.fields(cls)]

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], *, owner: str | None = None) -> Self:
        """Builds the configuration; raises `ConfigError` for a field that it does not have."""
        owner = owner or cls.__qualname__
        for name in values:
            if name not in cls.fields():
                close = difflib.get_close_matches(name, cls.fields(), n=1, cutoff=0.5)
                hint = f" Did you mean {close[0]!r}?" if close else ""
                raise ConfigError(
                    f"{owner} has no field {name!r}.{hint} Its fields: {', '.join(cls.fields())}."
                )
        for field in dataclasses.fields(cls):
            if field.name in values:
                _check_type(owner, field, values[field.name])
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


_CHECKED: dict[str, Any] = {"int": int, "float": (int, float), "bool": bool, "str": str}


def _check_type(owner: str, field: dataclasses.Field[Any], value: Any) -> None:
    """Plain types only: `int`, `float`, `bool`, `str`, each with `| None`; anything else passes."""
    declared = field.type.__name__ if isinstance(field.type, type) else str(field.type)
    kinds = [kind.strip() for kind in declared.split("|")]
    if not all(kind in _CHECKED or kind == "None" for kind in kinds):
        return
    for kind in kinds:
        if kind == "None":
            fits = value is None
        else:  # a bool is an int to Python, not to a reader
            fits = isinstance(value, _CHECKED[kind]) and (kind == "bool") == isinstance(value, bool)
        if fits:
            return
    raise ConfigError(f"{owner}: {field.name}={value!r} is not of type {declared}.")
