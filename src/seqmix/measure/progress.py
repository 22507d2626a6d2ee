"""The progress bar of a comparison, on stderr."""

from __future__ import annotations

from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bars


class Progress:
    """How many trials are finished and what happens now; `shown` False draws nothing."""

    def __init__(self, total: int, *, shown: bool) -> None:
        self._bars = Bars(
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.description}", markup=False),
            console=Console(stderr=True),
            disable=not shown,
        )
        self._task = self._bars.add_task("starting", total=total)

    def __enter__(self) -> Self:
        self._bars.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.show("done" if error is None else "stopped; the same command goes on from here")
        self._bars.stop()

    def finished(self, trials: int) -> None:
        self._bars.update(self._task, completed=trials)

    def show(self, activity: str) -> None:
        self._bars.update(self._task, description=activity)
