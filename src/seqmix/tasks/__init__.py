"""Learning problems with exact answers: one file per task, which exports it as TASK."""

from seqmix.core.catalog import Catalog
from seqmix.tasks._task import Batch, Task, TaskConfig

TASKS = Catalog("seqmix.tasks", "TASK")

__all__ = ["TASKS", "Batch", "Task", "TaskConfig"]
