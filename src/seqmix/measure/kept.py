"""Results by name, kept in a file until all are there, so that a run that was stopped goes on."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from seqmix.core.files import write_text


class Kept:
    """A memory of what one run has measured. It belongs to `key`: with another key it starts empty."""

    def __init__(self, path: Path | None, key: Mapping[str, Any]) -> None:
        self._path = path
        self._known: dict[str, Any] = {"key": json.loads(json.dumps(key)), "results": {}}
        if path is not None and path.exists():
            try:
                known = json.loads(path.read_text(encoding="utf-8"))
            except ValueError:
                return  # damaged: measured again
            if isinstance(known, dict) and known.get("key") == self._known["key"]:
                self._known = known

    def __contains__(self, name: str) -> bool:
        return name in self._known["results"]

    def __call__(self, name: str, measure: Callable[[], Any]) -> Any:
        """The JSON value of `measure()`, or what an earlier start has found."""
        results = self._known["results"]
        if name not in results:
            results[name] = json.loads(json.dumps(measure()))
            if self._path is not None:
                write_text(self._path, json.dumps(self._known))
        return results[name]

    def finish(self) -> None:
        """Forgets everything: the results stand in the output now."""
        if self._path is not None:
            self._path.unlink(missing_ok=True)
