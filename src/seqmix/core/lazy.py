"""Something to do once another package has been imported, without importing it here."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType


class _AfterImport:
    """A finder that finds nothing itself: it adds `callback` to the loader that the others find."""

    def __init__(
        self, wanted: Callable[[str], bool], callback: Callable[[ModuleType], object], *, once: bool
    ) -> None:
        self.wanted = wanted
        self.callback = callback
        self.once = once
        self.is_searching = False

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if self.is_searching or not self.wanted(name):
            return None
        self.is_searching = True
        try:
            spec = importlib.util.find_spec(name)
        finally:
            self.is_searching = False
        if spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def execute_and_call(module: ModuleType) -> None:
            execute(module)
            if self in sys.meta_path:
                if self.once:
                    self.stop()
                self.callback(module)

        spec.loader.exec_module = execute_and_call  # type: ignore[method-assign]
        return spec

    def stop(self) -> None:
        if self in sys.meta_path:
            sys.meta_path.remove(self)


def when_imported(module: str, callback: Callable[[], object]) -> None:
    """Calls `callback` once, right after the top-level `module` is imported; now if it already is."""
    loaded = sys.modules.get(module)
    if loaded is not None and not getattr(loaded.__spec__, "_initializing", False):
        callback()
        return
    sys.meta_path.insert(
        0, _AfterImport(lambda name: name == module, lambda _: callback(), once=True)
    )


def after_imports(
    wanted: Callable[[str], bool], callback: Callable[[ModuleType], object]
) -> Callable[[], None]:
    """Calls `callback(module)` right after each import of a module of a wanted name; returns how to stop that."""
    finder = _AfterImport(wanted, callback, once=False)
    sys.meta_path.insert(0, finder)
    return finder.stop
