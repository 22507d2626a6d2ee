"""A progress bar on standard error: how far the run is, its loss and its speed."""

from __future__ import annotations

from types import TracebackType
from typing import TYPE_CHECKING, Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

if TYPE_CHECKING:
    from seqmix.train.plan import Record


class ProgressBar:
    """Counts steps, or seconds where these are the budget."""

    def __init__(self, steps: int | None, seconds: float | None, *, shown: bool) -> None:
        self.total = seconds if steps is None else float(steps)
        self.counts_seconds = steps is None
        self.bar = Progress(
            TextColumn("training"),
            BarColumn(),
            TaskProgressColumn(),
            TextColumn("step {task.fields[step]}"),
            TextColumn("loss {task.fields[loss]}"),
            TextColumn("{task.fields[speed]} tokens/s"),
            TimeRemainingColumn(),
            console=Console(stderr=True),
            refresh_per_second=2,
            disable=not shown,
        )
        self.task = self.bar.add_task("training", total=self.total, step=0, loss="-", speed="-")

    def __enter__(self) -> Self:
        self.bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.bar.stop()

    def update(self, record: Record) -> None:
        """Shows where the run is."""
        if self.bar.disable:
            return
        self.bar.update(
            self.task,
            completed=record.seconds if self.counts_seconds else record.steps,
            step=record.steps,
            loss=f"{record.history[-1]['loss']:.4f}" if record.history else "-",
            speed=f"{record.tokens_per_second:,.0f}",
        )
