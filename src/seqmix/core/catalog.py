"""A folder is the registry: every public module of a package exports one entry under one name."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterator
from typing import Any

from seqmix.core.errors import UnknownName


class Catalog:
    """Entries of `package`: the module `package.NAME` exports its entry as `export`.

    Listing imports none of the entries, so adding a file is all that registration takes. Hyphens in a
    name are read as underscores.
    """

    def __init__(self, package: str, export: str) -> None:
        self.package = package
        self.export = export

    def names(self) -> list[str]:
        path = importlib.import_module(self.package).__path__
        return sorted(m.name for m in pkgutil.iter_modules(path) if not m.name.startswith("_"))

    def get(self, name: str) -> Any:
        """The entry called `name`; raises `UnknownName` with close matches."""
        module = name.replace("-", "_")
        known = self.names()
        if module not in known:
            raise UnknownName(self.export.lower(), name, known)
        return getattr(importlib.import_module(f"{self.package}.{module}"), self.export)

    def __iter__(self) -> Iterator[str]:
        return iter(self.names())

    def __contains__(self, name: str) -> bool:
        return name.replace("-", "_") in self.names()
